"""Problems of layers that do not fit in memory lie in files, and nothing about the training tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import families, some_tokens, tiny_source
from tiny_runs import settings, weights
from torch import Tensor

from drotator import sharing
from drotator.architecture import ModelSource
from drotator.artifacts import RunFolder
from drotator.config import PruneConfig
from drotator.objectives import LayerProblem
from drotator.pipeline import run_prune
from drotator.pruning import LayerContext, learn_rotation, open_layer, starting_rotation
from drotator.resources import Stopwatch
from drotator.sharing import PARTS, ProblemStore
from drotator.statistics import ActivationStream
from drotator.training import TrainedRotation

CPU = torch.device("cpu")
UNIFORM, SENSITIVE = ({"name": "pruning_error", "weights": word} for word in ("uniform", "sensitivity"))

by_weights = pytest.mark.parametrize("objective", [UNIFORM, SENSITIVE], ids=["uniform", "sensitivity"])


def given(objective: dict[str, str], **more: object) -> PruneConfig:
    return settings(Path("nowhere"), rotation="shared", objective=objective, steps=12, **more)


def problems_of(source: ModelSource, chosen: PruneConfig) -> list[LayerProblem]:
    """Problems of all layers, each on the hidden states that enter it in the dense model."""
    stream, found = ActivationStream.start(source, some_tokens(3, 20), 2, CPU), []
    for index in range(source.num_layers):
        layer = source.layer(index)
        place = (source.spec, source.sizes, source.num_layers, stream, Stopwatch(CPU))
        found.append(open_layer(LayerContext(index, layer, *place), chosen).problem)
        stream.advance(layer, index, None)
    return found


def store_of(
    problems: list[LayerProblem], folder: Path, chosen: PruneConfig, budget: float | None = None
) -> ProblemStore:
    store = ProblemStore(folder, chosen, problems[0].sizes, CPU)
    if budget is not None:
        store.budget = budget
    for problem in problems:
        store.append(problem)
    return store


def learn(store: ProblemStore, chosen: PruneConfig) -> TrainedRotation:
    start = starting_rotation(store.problem(0), len(store), chosen)
    return learn_rotation(store, start, chosen, can_capture=store.is_resident)


def tensors_of(problem: LayerProblem) -> dict[tuple[str, str], Tensor]:
    return {(part, name): tensor for part in PARTS for name, tensor in getattr(problem, part).items()}


def assert_same_problem(found: LayerProblem, expected: LayerProblem) -> None:
    tensors = tensors_of(found)
    assert found.sizes == expected.sizes
    assert tensors.keys() == tensors_of(expected).keys()
    for key, tensor in tensors_of(expected).items():
        assert tensors[key].dtype is tensor.dtype
        assert torch.equal(tensors[key], tensor), key


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(UNIFORM, id="uniform"),
        pytest.param(SENSITIVE, id="sensitivity"),
    ],
)
def test_problems_in_files_give_the_rotation_that_problems_in_memory_give(
    objective: dict[str, str], tmp_path: Path
) -> None:
    source, chosen = tiny_source(tmp_path / "model", "llama"), given(objective)
    problems = problems_of(source, chosen)
    resident, partly, filed = (
        store_of(problems, tmp_path / name, chosen, budget)
        for name, budget in (("resident", 1e12), ("partly", 2.5 * bytes_of(problems[0])), ("filed", 0))
    )
    assert (resident.is_resident, partly.is_resident, filed.is_resident) == (True, False, False)
    assert [len(store.resident) for store in (resident, partly, filed)] == [3, 1, 0]
    expected = learn(resident, chosen)
    assert expected.objective_after < 0.98 * expected.objective_before
    for store in (partly, filed):
        found = learn(store, chosen)
        assert found.history == expected.history
        assert torch.equal(found.rotation.R1, expected.rotation.R1)
        assert torch.equal(found.rotation.R2, expected.rotation.R2)


def bytes_of(problem: LayerProblem) -> int:
    return sum(tensor.numel() * 4 for tensor in tensors_of(problem).values())


@families
@by_weights
@pytest.mark.parametrize("pruner", ["magnitude", "sparsegpt"])
def test_a_problem_comes_back_from_its_file_bitwise(
    family: str, objective: dict[str, str], pruner: str, tmp_path: Path
) -> None:
    source, chosen = tiny_source(tmp_path / "model", family), given(objective, pruner=pruner)
    problems = problems_of(source, chosen)
    assert bool(problems[0].hessians) == (pruner == "sparsegpt")
    assert bool(problems[0].sensitivities) == (objective is SENSITIVE)
    store = store_of(problems, tmp_path / "problems", chosen, budget=0)
    for position, problem in enumerate(problems):
        assert_same_problem(store.problem(position), problem)


def test_a_problem_that_fits_is_kept_as_it_is_and_takes_of_the_budget(tmp_path: Path) -> None:
    source, chosen = tiny_source(tmp_path / "model", "llama"), given(UNIFORM)
    problems = problems_of(source, chosen)
    size = 2 * bytes_of(problems[0])  # with the objective's copy
    store = store_of(problems, tmp_path / "problems", chosen, budget=2 * size + 1)
    assert store.budget == 1
    assert [store.problem(position) is problems[position] for position in range(3)] == [True, True, False]
    assert [store[position] is store[position] for position in range(3)] == [True, True, False]
    assert [path.name for path in (tmp_path / "problems").iterdir()] == ["002.safetensors"]
    exactly = store_of(problems[:1], tmp_path / "exactly", chosen, budget=size)
    less = store_of(problems[:1], tmp_path / "less", chosen, budget=size - 1)
    assert (exactly.is_resident, less.is_resident) == (True, False)


def test_a_store_is_a_sequence_of_its_objectives(tmp_path: Path) -> None:
    source, chosen = tiny_source(tmp_path / "model", "llama"), given(UNIFORM)
    problems = problems_of(source, chosen)
    store = store_of(problems, tmp_path / "problems", chosen, budget=2 * bytes_of(problems[0]))
    start = starting_rotation(problems[0], 1, chosen)
    expected = [float(sharing.objective_of(problem, chosen)(start.R1, start.R2)) for problem in problems]
    assert len(store) == 3
    assert [float(objective(start.R1, start.R2)) for objective in store] == expected
    assert len(set(expected)) == 3
    for position in (-1, 3):
        with pytest.raises(IndexError):
            store[position]


def test_clearing_removes_the_files_and_what_is_kept(tmp_path: Path) -> None:
    source, chosen = tiny_source(tmp_path / "model", "llama"), given(UNIFORM)
    problems = problems_of(source, chosen)
    store = store_of(problems, tmp_path / "problems", chosen, budget=2 * bytes_of(problems[0]))
    assert len(list((tmp_path / "problems").iterdir())) == 2
    store.clear()
    assert not (tmp_path / "problems").exists()
    assert store.resident == {}
    nothing = store_of(problems, tmp_path / "none", chosen, budget=1e12)
    assert not (tmp_path / "none").exists()
    nothing.clear()  # there is nothing to remove


def test_the_budget_is_a_share_of_the_memory_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, chosen = tiny_source(tmp_path / "model", "llama"), given(UNIFORM)
    assert 2**20 < sharing.memory_of(CPU) < 2**50
    monkeypatch.setattr(sharing, "memory_of", lambda device: 1000)
    assert ProblemStore(tmp_path, chosen, source.sizes, CPU).budget == 1000 * sharing.DEVICE_SHARE
    assert 0 < sharing.DEVICE_SHARE < 1


def test_a_run_whose_problems_lie_in_files_is_bitwise_the_same_and_leaves_none(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(
        inputs,
        rotation={"name": "shared", "groups": 2, "permute": "both"},
        objective=UNIFORM,
        evaluation={"perplexity": []},
    )
    written: list[str] = []
    rotations: list[tuple[int, bool]] = []
    run_prune(chosen, tmp_path / "resident", baseline=False)
    monkeypatch.setattr(sharing, "DEVICE_SHARE", 0.0)
    save = sharing.save_tensors

    def saving(path: Path, *rest: object) -> None:
        written.append(str(path.relative_to(tmp_path / "filed")))
        save(path, *rest)  # type: ignore[arg-type]

    save_rotation = RunFolder.save_rotation

    def saving_rotation(run: RunFolder, index: int, trained: TrainedRotation) -> None:
        rotations.append((index, (run.path / "problems").exists()))
        save_rotation(run, index, trained)

    monkeypatch.setattr(sharing, "save_tensors", saving)
    monkeypatch.setattr(RunFolder, "save_rotation", saving_rotation)
    run_prune(chosen, tmp_path / "filed", baseline=False)
    # Of the two groups the first is one layer, which is learned alone.
    assert written == ["problems/000.safetensors", "problems/001.safetensors"]
    found, expected = weights(tmp_path / "filed"), weights(tmp_path / "resident")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # They are gone before there are rotations: a run that is killed between the two makes both again.
    assert rotations == [(0, False), (1, False), (2, False)]
    assert not (tmp_path / "filed" / "problems").exists()


def test_a_file_of_a_killed_run_is_written_over(tmp_path: Path) -> None:
    source, chosen = tiny_source(tmp_path / "model", "llama"), given(UNIFORM)
    problems = problems_of(source, chosen)
    (tmp_path / "problems").mkdir()
    (tmp_path / "problems" / "000.safetensors").write_bytes(b"left")
    store = store_of(problems, tmp_path / "problems", chosen, budget=0)
    assert_same_problem(store.problem(0), problems[0])
    assert load_file(store.file(0)).keys() == {".".join(key) for key in tensors_of(problems[0])}
