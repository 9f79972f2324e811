"""`drotator bench` on shapes that a test can afford: what is timed, what is written, what is said."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_configs import settings_of
from tiny_models import tiny_config, tiny_source
from torch import Tensor, nn

from drotator import benchmark_pruning
from drotator.benchmark import run_bench
from drotator.benchmark_forms import parts_of
from drotator.benchmark_inference import FixedCache
from drotator.benchmark_pruning import time_step
from drotator.config import BenchConfig, ObjectiveConfig, PruneConfig, PrunerConfig, SparsityConfig
from drotator.distributed import World
from drotator.measurement import Bench, duration, time_call
from drotator.objectives import LayerProblem, build_objective
from drotator.paper_formulation import paper_step, sparsegpt_by_columns
from drotator.pruners.sparsegpt import prune_sparsegpt
from drotator.rotation import Rotation
from drotator.shapes import random_moments, shapes_of
from drotator.statistics import ActivationStream

CPU = torch.device("cpu")
CONTRACT = [
    "name",
    "model",
    "objective",
    "optimizer",
    "milliseconds",
    "bound_milliseconds",
    "paper_milliseconds",
    "peak_bytes",
    "gpus",
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr("drotator.measurement.BUDGET_SECONDS", 0.002)


def bench_settings(folder: Path, *words: str, **sizes: Any) -> BenchConfig:
    tiny_config("llama", **sizes).save_pretrained(folder / "config")
    few = ("calibration.num_samples=3", "calibration.seqlen=16", "calibration.batch_size=2", "optimizer.steps=2")
    path = f"model.path={folder / 'config'}"
    return settings_of("bench", "model=local", path, *few, "bench.steps=2", "device=cpu", *words)


def run(folder: Path, *words: str, **sizes: Any) -> list[dict[str, Any]]:
    """Do a run in folder/run and return its rows, which have to keep the contract."""
    first = run_bench(bench_settings(folder, *words, **sizes), folder / "run")
    assert [path.name for path in (folder / "run").iterdir()] == ["bench.json"], "what was measured on is not kept"
    rows = json.loads((folder / "run" / "bench.json").read_text())
    assert first == rows[0]["milliseconds"]
    for row in rows:
        assert list(row)[: len(CONTRACT)] == CONTRACT
        assert row["model"] == "local"
        assert row["milliseconds"] > 0 and row["bound_milliseconds"] > 0 and row["peak_bytes"] > 0
        assert row["gpus"] == 0
        assert isinstance(row["objective"], str) and isinstance(row["optimizer"], str)
    assert len({(row["name"], row["objective"]) for row in rows}) == len(rows)
    return list(rows)


def test_pruning_measures_every_part_and_the_paper_beside_it(tmp_path, capsys):
    words = ("bench.objectives=[entropy,pruning_error]", "bench.paper=true")
    rows = run(tmp_path, *words)
    names = [row["name"] for row in rows]
    assert names == [
        "rotation step, entropy, spectral",
        "rotations of the model, 2 steps",
        "rotation step, pruning_error, spectral",
        "rotations of the model, 2 steps",
        "update of R1, spectral",
        "retraction of R1",
        "Hessian of 32 inputs, 32 tokens",
        "Hessian of 48 inputs, 32 tokens",
        "Hessians of a layer, 48 tokens",
        "sparsegpt, 7 linears",
        "sparsegpt, column by column",
        "layer: load",
        "layer: calibrate",
        "layer: rotate",
        "layer: prune",
        "layer: all stages",
        "model of 3 layers: load",
        "model of 3 layers: calibrate",
        "model of 3 layers: rotate",
        "model of 3 layers: prune",
        "model of 3 layers: all stages",
    ]
    steps = [row for row in rows if row["name"].startswith("rotation")]
    assert [row["objective"] for row in steps] == ["entropy", "entropy", "pruning_error", "pruning_error"]
    assert all(row["paper_milliseconds"] > 0 for row in steps)
    assert all(row["paper_milliseconds"] is None for row in rows if row not in steps)
    assert steps[0]["times"] == pytest.approx(steps[0]["paper_milliseconds"] / steps[0]["milliseconds"])
    assert steps[1]["milliseconds"] >= 2 * 3 * steps[0]["milliseconds"]
    assert steps[1]["paper_milliseconds"] == pytest.approx(2000 * 3 * steps[0]["paper_milliseconds"])
    stages = [row["milliseconds"] for row in rows if row["name"].startswith("layer: ")]
    assert stages[-1] == pytest.approx(sum(stages[:-1]))
    model = [row["milliseconds"] for row in rows if row["name"].startswith("model of")]
    assert model[:-1] == pytest.approx([3 * milliseconds for milliseconds in stages[:-1]])
    assert model[-1] > sum(model[:-1])
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "measured here" in shown
    assert "Paper's formulation" in shown
    assert "Triton kernel does not run here" in shown
    assert "Pipeline: measured on 3 x 16 random tokens and 2 of 3 layers" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("words", "has_steps"),
    [
        (["rotation=none", "pruner=wanda", "bench.layers=1"], False),
        (["optimizer=adam_qr", "optimizer.steps=1", "pruner=magnitude", "bench.layers=0"], True),
        (["rotation=shared", "pruner=none", "optimizer=riemannian_adam", "optimizer.steps=1"], True),
    ],
)
def test_other_settings_leave_out_what_they_do_not_have(tmp_path, words, has_steps):
    names = [row["name"] for row in run(tmp_path, *words)]
    assert any(name.startswith("rotation step") for name in names) == has_steps
    assert any("7 linears" in name for name in names) == ("pruner=none" not in words)
    assert any(name.startswith("model of") for name in names) == ("bench.layers=0" not in words)


def test_a_step_is_timed_without_what_a_training_costs_beside_its_steps(monkeypatch):
    lengths = []

    def train(objectives: Any, start: Any, settings: PruneConfig, world: World, *, precision: str) -> None:
        lengths.append(settings.optimizer.steps)
        time.sleep(0.05 + 0.01 * (settings.optimizer.steps + 1))

    monkeypatch.setattr(benchmark_pruning, "learn_rotation", train)
    monkeypatch.setattr(benchmark_pruning, "objective_of", lambda *args: None)
    monkeypatch.setattr(benchmark_pruning, "starting_rotation", lambda *args: None)
    settings = settings_of("prune")
    step, set_up = time_step(SimpleNamespace(precision="highest"), settings, 10, CPU)  # type: ignore[arg-type]
    assert step.milliseconds == pytest.approx(10, rel=0.3)
    assert set_up == pytest.approx(50, rel=0.5)
    assert sorted(set(lengths)) == [10, 20]
    assert settings.optimizer.steps == 200


def test_a_call_is_warmed_up_and_its_median_taken(monkeypatch):
    monkeypatch.setattr("drotator.measurement.BUDGET_SECONDS", 0.2)
    pauses = itertools.chain([0.1, 0.01, 0.05, 0.01], itertools.repeat(0.01))
    timing = time_call(lambda: time.sleep(next(pauses)), CPU)
    assert timing.milliseconds == pytest.approx(10, rel=0.5)
    calls = []
    time_call(lambda: calls.append(time.sleep(0.3)), CPU, warm_up=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [(0.0543, "54.3 us"), (4.9, "4.9 ms"), (12345, "12.3 s"), (192000, "3.2 min"), (5.4e6, "1.5 h"), (7e9, "1944 h")],
)
def test_durations_are_short(milliseconds, said):
    assert duration(milliseconds) == said


def random_problem(source: Any) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)
    layer = source.layer(0)
    weights = {name: layer.get_submodule(name).weight for name in source.spec.linears}
    wanted = ("attention", "output", "mlp")
    H = {inputs: random_moments(source.sizes.input_size(inputs), generator) for inputs in wanted}
    return LayerProblem.of_layer(weights, source.spec, source.sizes, H)


@pytest.mark.parametrize("salience", ["magnitude", "wanda", "obs"])
def test_the_papers_formulation_is_the_entropy_in_bfloat16_and_falls(tmp_path, salience):
    source = tiny_source(tmp_path, "llama", hidden_size=48)
    problem = random_problem(source)
    start = Rotation.identity(source.sizes)
    objective = build_objective(ObjectiveConfig(name="entropy"), salience, SparsityConfig(), problem, 0.01)
    step = paper_step(problem, salience, 0.01)
    found = [float(step()) for _ in range(40)]
    assert found[0] == pytest.approx(float(objective(start.R1, start.R2)), rel=0.01)
    assert found[-1] < 0.99 * found[0]


@pytest.mark.parametrize("sparsity", [SparsityConfig(keep=2, group=4), SparsityConfig(ratio=0.5)])
def test_sparsegpt_column_by_column_leaves_what_the_pruner_leaves(sparsity):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    H = random_moments(32, generator).double()
    settings = PrunerConfig(name="sparsegpt", block_size=16)
    (expected,) = prune_sparsegpt([W], H, sparsity, settings)
    torch.testing.assert_close(sparsegpt_by_columns(W.clone(), H, sparsity, settings), expected.weight)


def test_inference_on_a_cpu_says_what_is_not_supported_and_goes_on(tmp_path, capsys):
    words = ("kind=inference", "bench.batch_size=2", "bench.seqlen=8", "bench.decode=[1,3]")
    rows = run(tmp_path, *words)
    names = [row["name"] for row in rows]
    for call in ("prefill 1 x 8", "prefill 2 x 8", "decode 1 after 8", "decode 3 after 8"):
        for name in (f"{call}: dense", f"{call}: dense + R1", f"{call}, R1 alone: dense + R1", f"model, {call}: dense"):
            assert name in names
    assert not any("2:4" in name for name in names)
    by_name = {row["name"]: row for row in rows}
    row, dense = by_name["prefill 2 x 8: dense + R1"], by_name["prefill 2 x 8: dense"]
    assert row["compared"] == "dense"
    assert row["times"] == pytest.approx(dense["milliseconds"] / row["milliseconds"])
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    for backend in ("cuSPARSELt", "CUTLASS"):
        assert f"2:4 by {backend} is not supported here" in shown
    assert "not run as a whole" in " ".join(shown.split())


def test_compressed_weights_are_2_of_4_and_a_kernel_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    seen: list[Tensor] = []

    def fake(weight: Tensor) -> Tensor:
        seen.append(weight)
        is_forced = torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
        return torch.zeros_like(weight) if is_forced else weight.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", fake)
    rows = run(tmp_path, "kind=inference", "bench.batch_size=1", "bench.seqlen=8", "bench.decode=[1]")
    names = [row["name"] for row in rows]
    assert {"prefill 1 x 8: 2:4 cuSPARSELt", "decode 1 after 8: 2:4 cuSPARSELt + R1"} < set(names)
    assert "model, decode 1 after 8: 2:4 cuSPARSELt + R1" in names
    assert not any("CUTLASS" in name or "dense + R1" in name for name in names)
    assert "2:4 by CUTLASS is not supported here: self_attn.q_proj differs" in " ".join(capsys.readouterr().out.split())
    assert len(seen) == 14
    for weight in seen:
        assert ((weight == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert not torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS


def test_the_parts_of_a_compressed_tensor_are_counted():
    class Packed:
        def __init__(self) -> None:
            self.packed, self.meta = torch.zeros(4), torch.zeros(1)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["packed", "meta"], None

    assert [part.numel() for part in parts_of(Packed())] == [4, 1]  # type: ignore[arg-type]
    plain = nn.Parameter(torch.zeros(3))
    assert parts_of(plain) == [plain]


class Recorder:
    """Keeps the keys and values that a layer makes."""

    def update(self, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key, value
        return key, value


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoding_from_the_cache_gives_what_the_whole_window_gives(tmp_path, family):
    source = tiny_source(tmp_path, family)
    stream = ActivationStream.start(source, torch.arange(2, 14).reshape(2, 6), 2, CPU)
    layer, hidden, recorder = source.layer(0), stream.hidden[0], Recorder()
    kwargs = stream.arguments(hidden, 0)
    with torch.no_grad():
        expected = layer(hidden, **{**kwargs, "past_key_values": recorder})[:, -1:]
        for cached in (recorder.keys, recorder.values):
            cached[:, :, -1:] = torch.nan
        cos, sin = kwargs["position_embeddings"]
        last = {"past_key_values": FixedCache(recorder.keys, recorder.values), "attention_mask": None}
        last |= {"position_embeddings": (cos[..., -1:, :], sin[..., -1:, :])}
        found = layer(hidden[:, -1:], **{**kwargs, **last})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pruning", "inference"])
def test_shapes_that_do_not_fit_are_refused_before_anything_is_made(tmp_path, kind):
    settings = bench_settings(tmp_path, f"kind={kind}", intermediate_size=50)
    with pytest.raises(ValueError, match="divisible by 4"):
        run_bench(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_inference_is_measured_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "current", lambda: World(0, 2))
    with pytest.raises(ValueError, match="the work of one process, but 2 were started"):
        run_bench(bench_settings(tmp_path, "kind=inference"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_that_exclude_each_other_are_refused_for_every_objective(tmp_path):
    words = ("bench.objectives=[pruning_error,entropy]", "rotation.value_map=invertible")
    settings = bench_settings(tmp_path, *words)
    with pytest.raises(ValueError, match="objective=entropy is not allowed"):
        run_bench(settings, tmp_path / "run")


def test_what_is_timed_is_what_prune_would_do(tmp_path):
    words = ("optimizer=riemannian_adam", "pruner=wanda", "sparsity.ratio=0.6", "rotation=shared")
    given = bench_settings(tmp_path, *words)
    bench = Bench(given, shapes_of(given.model), CPU, {}, tmp_path / "bench.json")
    found = benchmark_pruning.settings_of(bench, "entropy", "folder")
    expected = settings_of("prune", *words, "objective.name=entropy", "eval=none", "optimizer.steps=2")
    for group in ("pruner", "sparsity", "rotation", "objective", "optimizer", "eval", "reconstruct"):
        assert getattr(found, group) == getattr(expected, group)


GPU_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "head_dim": 64,
    "dtype": "bfloat16",
}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")  # torch's, of a thread of autograd
@pytest.mark.parametrize("kind", ["pruning", "inference"])
def test_both_kinds_run_on_a_gpu(tmp_path, kind):
    settings = bench_settings(
        tmp_path, f"kind={kind}", "bench.paper=true", "bench.batch_size=2", "bench.seqlen=64", **GPU_SIZES
    )
    run_bench(dataclasses.replace(settings, device="cuda"), tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert all(row["gpus"] == 1 and row["milliseconds"] > 0 for row in rows)
    if kind == "inference":
        assert any("graph: dense" in row["name"] for row in rows)
