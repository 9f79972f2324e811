"""The problems of a run of layers give the same training from files as from memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_pruning import context_of, settings
from tiny_models import tiny_source

from drotator.objectives import LayerProblem
from drotator.pruning import learn_rotation, open_layer, starting_rotation
from drotator.sharing import ProblemStore, memory_of, problem_of, tensors_of
from drotator.training import TrainedRotation

CPU = torch.device("cpu")


@pytest.fixture
def problems(tmp_path: Path) -> list[LayerProblem]:
    source = tiny_source(tmp_path / "model", "llama")
    return [open_layer(context_of(source, index), settings()).problem for index in range(3)]


def store_of(problems: list[LayerProblem], folder: Path, budget: float) -> ProblemStore:
    store = ProblemStore(folder, settings(), problems[0].sizes, CPU)
    store.budget = budget
    for problem in problems:
        store.append(problem)
    return store


def trained(store: ProblemStore) -> TrainedRotation:
    start = starting_rotation(store.problem(0), len(store), settings())
    return learn_rotation(store, start, settings(steps=5), can_capture=store.is_resident)


def size_of(problem: LayerProblem) -> int:
    return 2 * sum(tensor.nbytes for tensor in tensors_of(problem).values())


@pytest.mark.parametrize("num_resident", [0, 1, 2])
def test_training_from_files_is_training_from_memory(
    problems: list[LayerProblem], num_resident: int, tmp_path: Path
) -> None:
    expected = trained(store_of(problems, tmp_path / "unused", 1e12))
    store = store_of(problems, tmp_path / "files", num_resident * size_of(problems[0]))
    assert len(list((tmp_path / "files").iterdir())) == 3 - num_resident
    assert not store.is_resident
    found = trained(store)
    assert found.history == pytest.approx(expected.history, rel=1e-6)
    torch.testing.assert_close(found.rotation.R1, expected.rotation.R1, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.rotation.R2, expected.rotation.R2, rtol=0, atol=1e-6)
    store.clear()
    assert not (tmp_path / "files").exists()


def test_what_fits_writes_no_file(problems: list[LayerProblem], tmp_path: Path) -> None:
    store = store_of(problems, tmp_path / "files", 1e12)
    assert store.is_resident
    assert not (tmp_path / "files").exists()
    store.clear()


def test_a_problem_survives_its_file(problems: list[LayerProblem], tmp_path: Path) -> None:
    store = store_of(problems, tmp_path / "files", 0)
    for position, problem in enumerate(problems):
        found, expected = tensors_of(store.problem(position)), tensors_of(problem)
        assert found.keys() == expected.keys()
        assert any(name.startswith("sensitivities.") for name in found)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert tensors_of(problem_of(tensors_of(problems[0]), problems[0].sizes)).keys() == tensors_of(problems[0]).keys()
    with pytest.raises(IndexError):
        store[3]


def test_the_memory_of_the_cpu_is_the_machines() -> None:
    assert 2**20 < memory_of(CPU) < 2**50
