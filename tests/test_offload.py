"""Batches are the same wherever they are kept, and runs too; files are gone at the end."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import report_of, settings, weights
from torch import Tensor

from drotator import pipeline
from drotator.artifacts import RunFolder
from drotator.offload import LEVELS, Batches, Offload
from drotator.pipeline import run_prune
from drotator.pruning import LayerContext

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUNS: dict[str, dict[str, Any]] = {
    "per_layer": {},
    "shared": {"rotation": "shared"},
    "reconstruct": {"reconstruct": {"name": "block", "epochs": 2}, "rotation": "none"},
}


def some_batches(device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 5, 8, generator=generator).to(device, dtype) for n in (2, 2, 1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", LEVELS)
def test_batches_come_back_as_they_were_given(level: str, device: str, tmp_path: Path) -> None:
    given = some_batches(device)
    batches = Batches(torch.device(device), Offload(level, tmp_path / "files"), given)
    copied, changed = batches.copy(), [batch + 1 for batch in given]
    for position in range(len(given)):
        batches[position] = changed[position]
    assert [len(batch) for batch in batches] == [len(batch) for batch in copied] == [2, 2, 1]
    assert len(batches.empty()) == 0
    for found, expected in ((batches, changed), (copied, given)):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert all(batch.device.type == device and batch.dtype == torch.bfloat16 for batch in found)
    kept = {"device": device, "host": "cpu"}
    assert all(batch.device.type == kept[level] for batch in batches.kept if isinstance(batch, Tensor))


def test_a_file_is_there_as_long_as_a_list_holds_its_batch(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    offload = Offload("disk", folder)
    batches = Batches(CPU, offload, some_batches("cpu"))
    copied = batches.copy()
    assert len(list(folder.iterdir())) == 3
    batches[0] = batches[1]
    assert len(list(folder.iterdir())) == 4
    del copied
    gc.collect()
    assert len(list(folder.iterdir())) == 3
    Offload("host", folder).clear()
    assert not folder.exists()
    del batches
    gc.collect()  # files that are gone already are no error


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run on the device for each of RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        run_prune(settings(inputs, offload="device", **options), folder / name, baseline=False)
    return folder


def assert_same_run(run: Path, expected: Path) -> None:
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert report_of(run)["metrics"] == report_of(expected)["metrics"]
    assert not (run / "activations").exists()


@pytest.mark.parametrize("level", ["host", "disk"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_the_same_bits_wherever_its_activations_are(
    name: str, level: str, inputs: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    original = pipeline.prune_layers_with
    monkeypatch.setattr(pipeline, "prune_layers_with", lambda at, *rest: places.append(at) or original(at, *rest))
    run_prune(settings(inputs, offload=level, **RUNS[name]), tmp_path / "run", baseline=False)
    assert [place.level for place in places] == [level]
    assert_same_run(tmp_path / "run", runs / name)


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_that_stopped_goes_on_with_any_level(
    level: str, inputs: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at_layer(1, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            run_prune(settings(inputs, offload="disk"), run, baseline=False)
    assert [path.name for path in (run / "layers").iterdir()] == ["000.safetensors"]
    assert not (run / "activations").exists()
    (run / "activations").mkdir()  # a run that was killed could not remove its files
    (run / "activations" / "left.safetensors").write_bytes(b"")
    run_prune(settings(inputs, offload=level, resume=str(run)), tmp_path, baseline=False)
    assert_same_run(run, runs / "per_layer")


def fail_at_layer(index: int, error: BaseException, patch: pytest.MonkeyPatch, times: int = 1) -> list[int]:
    """Let the statistics of o fail at a layer the first `times`. Returns the layers that come that far."""
    seen: list[int] = []
    collect = LayerContext.collect

    def failing(self: LayerContext, wanted: Any, *args: Any, **kwargs: Any) -> Any:
        found = collect(self, wanted, *args, **kwargs)
        if wanted == ("output",):
            seen.append(self.index)
            if self.index == index and seen.count(index) <= times:
                raise error
        return found

    patch.setattr(LayerContext, "collect", failing)
    return seen


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 3.06 GiB. GPU 0 has a total capacity of 23.6 GiB"


@pytest.mark.parametrize("start", ["auto", "device"])
def test_a_layer_that_ran_out_of_memory_is_repeated_with_the_activations_elsewhere(
    start: str, inputs: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    seen = fail_at_layer(1, torch.OutOfMemoryError(OUT_OF_MEMORY), monkeypatch)
    run_prune(settings(inputs, offload=start), tmp_path / "run", baseline=False)
    assert seen == [0, 1, 1, 2]  # the layer that was finished is not pruned again
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["CUDA out of memory. Going on with offload=host."]
    assert_same_run(tmp_path / "run", runs / "per_layer")


def test_where_nothing_more_can_be_moved_the_run_says_what_to_set_and_keeps_its_layers(
    inputs: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at_layer(2, torch.OutOfMemoryError(OUT_OF_MEMORY), patch, times=2)
        with pytest.raises(RuntimeError, match=r"^CUDA out of memory.* GB of the device .*Lower calib"):
            run_prune(settings(inputs), run, baseline=False)
    assert sorted(path.name for path in (run / "layers").iterdir()) == ["000.safetensors", "001.safetensors"]
    run_prune(settings(inputs, resume=str(run)), tmp_path, baseline=False)
    assert_same_run(run, runs / "per_layer")


def test_the_memory_is_told_and_an_evaluation_that_cannot_be_is_refused_before_the_work(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("drotator.memory.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="Prune with eval=none"):
        run_prune(settings(inputs), tmp_path / "run", baseline=False)
    (line,) = (record.message for record in caplog.records if record.message.startswith("memory: "))
    assert "activations on disk (offload=auto)" in line
    assert not list(RunFolder(tmp_path / "run").path.glob("layers/*"))
    without = settings(inputs, evaluation={"perplexity": []})
    run_prune(without, tmp_path / "without", baseline=False)
    assert report_of(tmp_path / "without")["provenance"]["offload"] == "disk"
