"""The estimate of a run's memory against the tensors that live while it runs, and what is chosen by it."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_source
from tiny_runs import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drotator import importance, memory, pipeline
from drotator.architecture import LayerSizes
from drotator.artifacts import RunFolder
from drotator.config import CalibrationConfig, describe
from drotator.memory import MemoryNeeds, MemoryPlan, check_evaluation, choose_level, memory_needs, plan_memory
from drotator.offload import LEVELS
from drotator.pipeline import prune_layers
from drotator.preparation import Job

CPU = torch.device("cpu")
GB = 10**9


class LiveTensors(TorchDispatchMode):
    """Adds up the storages that are alive, by what operations return; peak: the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


WEIGHED = {"name": "sparsegpt", "weights": "sensitivity"}
NARROW = {"sparsity": {"ratio": 0.5}, "rotation": "none", "intermediate_size": 320}
"""Here gate and up together take more than down alone, whose H is small."""
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("pruning", {"pruner": "wanda", "rotation": "none"}),
    "sparsegpt": ("pruning", {"pruner": "sparsegpt", "rotation": "none"}),
    "admm": ("pruning", {"pruner": "admm", "rotation": "none"}),
    "solve": ("pruning", {"pruner": {"name": "wanda", "solve_steps": 2}, "rotation": "none"}),
    "wanda, gate and up": ("pruning", {"pruner": WEIGHED | {"name": "wanda"}} | NARROW),
    "sparsegpt, gate and up": ("pruning", {"pruner": WEIGHED} | NARROW),
    "admm, gate and up": ("pruning", {"pruner": WEIGHED | {"name": "admm"}} | NARROW),
    "solve, gate and up": ("pruning", {"pruner": WEIGHED | {"solve_steps": 2}} | NARROW),
    "rotation": ("learning", {"pruner": "sparsegpt"}),
    "reconstruction": ("reconstruction", {"pruner": "wanda", "rotation": "none", "reconstruct": "block"}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_layer_takes_what_is_estimated_and_little_less(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "WORKSPACE", 0)
    monkeypatch.setattr(importance, "BUCKET_BITS", 12)  # 40 MB for any model, a part of the workspace
    stage, options = RUNS[run][0], dict(RUNS[run][1])
    size = options.pop("intermediate_size", 768)
    changes = {"hidden_size": 256, "intermediate_size": size, "head_dim": 64, "num_hidden_layers": 2}
    source = tiny_source(tmp_path / "model", "llama", torch.bfloat16, **changes)
    given = settings(tmp_path, **options)
    plan = plan_memory(given, source, CPU)
    job = Job(source, None, torch.randint(2, 67, (3, 32)), CPU, {}, {}, plan)  # type: ignore[arg-type]
    with LiveTensors() as live:
        prune_layers(given, job, RunFolder.open(tmp_path / "run", describe(given)))
    assert plan.needs.largest_stage == stage
    assert 0.8 * plan.needs.layer < live.peak < plan.needs.layer + plan.needs.activations


def shape(hidden_size: int, intermediate_size: int, num_attention_heads: int) -> LayerSizes:
    return LayerSizes(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=8,
        head_dim=128,
    )


LLAMA3 = {
    "8b": (shape(4096, 14336, 32), 218_112_000),
    "70b": (shape(8192, 28672, 64), 855_654_400),
}


def needs_of(size: str, batch_size: int = 8, **options: Any) -> MemoryNeeds:
    sizes, layer_parameters = LLAMA3[size]
    given = settings(Path(), **options)
    given.calibration = CalibrationConfig(batch_size=batch_size)
    return memory_needs(given, sizes, layer_parameters=layer_parameters, vocab_size=128_256, itemsize=2)


def test_the_activations_are_those_of_128_windows_of_2048_tokens() -> None:
    tokens, hidden = 128 * 2048, 4096 * 2
    assert needs_of("8b").activations == tokens * 2 * hidden
    assert needs_of("8b", reconstruct="block").activations == tokens * 3 * hidden
    assert needs_of("8b", rotation="shared").activations == tokens * 3 * hidden
    assert needs_of("8b").pinned == needs_of("8b").activations  # a batch is a power of two already
    assert needs_of("8b", batch_size=6).pinned == 22 * 2 * 2**27


def test_a_layer_of_70b_is_pruned_on_a_card_of_24_gb() -> None:
    for rotation in ("none", "per_layer"):
        needs = needs_of("70b", rotation=rotation)
        assert needs.layer < 22 * GB
        assert needs.pinned + needs.reading < 24 * GB  # of the host's 64 GB
    assert needs_of("70b", pruner="wanda", rotation="none").layer < needs_of("70b", rotation="none").layer
    assert needs_of("8b").layer < needs_of("70b").layer / 2


@pytest.mark.parametrize(
    ("device", "host", "level"),
    [(90, 60, "device"), (60, 60, "device"), (59, 60, "host"), (24, 21, "host"), (24, 20, "disk")],
)
def test_the_first_level_that_fits_is_chosen(device: int, host: int, level: str) -> None:
    needs = MemoryNeeds(stages={"statistics": 10, "pruning": 42}, activations=18, pinned=18, reading=3)
    assert (needs.layer, needs.largest_stage) == (42, "pruning")
    assert choose_level(needs, device, host, is_shared=False) == level


def test_the_host_as_the_device_has_to_hold_everything() -> None:
    needs = MemoryNeeds(stages={"pruning": 42}, activations=18, pinned=18, reading=3)
    assert choose_level(needs, 63, 63, is_shared=True) == "device"
    assert choose_level(needs, 62, 62, is_shared=True) == "disk"


def test_a_plan_names_what_it_takes_and_where_to_go_when_the_device_is_full() -> None:
    needs = MemoryNeeds(stages={"pruning": 16 * GB}, activations=8 * GB, pinned=9 * GB, reading=3 * GB)
    plan = MemoryPlan(needs, free_device=24 * GB, free_host=64 * GB, level="device")
    assert plan.levels == ("device", "host")
    assert dataclasses.replace(plan, free_host=GB).levels == ("device", "disk")
    assert dataclasses.replace(plan, level="host").levels == ("host",)  # files leave the device as it is
    for part in ("16.0 GB of the device (pruning)", "activations 8.0 GB", "24.0 GB", "64.0 GB"):
        assert part in str(plan)


def test_a_level_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "model", "llama")
    assert plan_memory(settings(tmp_path), source, CPU).level == "device"
    for level in LEVELS:
        assert plan_memory(settings(tmp_path, offload=level), source, CPU).level == level


@pytest.mark.parametrize(("device", "host", "named"), [(100, 10, "cpu"), (10, 100, "cuda:1")])
def test_an_evaluation_that_does_not_fit_is_refused_with_what_to_set(
    device: int, host: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"cuda": device * GB, "cpu": host * GB}
    monkeypatch.setattr(memory, "free_memory", lambda place: free[place.type])
    check_evaluation(10 * GB, torch.device("cuda:1"))
    with pytest.raises(ValueError, match=f"model, 50.0 GB, but 10.0 GB of the memory of {named} .* eval=none"):
        check_evaluation(50 * GB, torch.device("cuda:1"))


def test_what_a_layer_learns_from_is_gone_before_the_pruner_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tmp_path / "model", "llama", num_hidden_layers=2)
    given = settings(tmp_path, pruner="sparsegpt")
    job = Job(source, None, torch.randint(2, 67, (3, 32)), CPU, {}, {}, plan_memory(given, source, CPU))  # type: ignore[arg-type]
    opened: list[weakref.ref[object]] = []
    left: list[int] = []

    def open_layer(*args: Any) -> Any:
        dense = pipeline_open_layer(*args)
        opened.append(weakref.ref(dense.problem))
        return dense

    def prune_linears(*args: Any) -> Any:
        left.append(sum(problem() is not None for problem in opened))
        return pipeline_prune_linears(*args)

    pipeline_open_layer, pipeline_prune_linears = pipeline.open_layer, pipeline.prune_linears
    monkeypatch.setattr(pipeline, "open_layer", open_layer)
    monkeypatch.setattr(pipeline, "prune_linears", prune_linears)
    gc.collect()
    gc.disable()
    try:
        prune_layers(given, job, RunFolder.open(tmp_path / "run", describe(given)))
    finally:
        gc.enable()
    assert left == [0, 0]
