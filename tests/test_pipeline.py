"""Whole runs on a tiny model: what they leave on disk, and that a run that was killed ends as if it never had been."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    TOKENS,
    drotator,
    process_environment,
    report_of,
    settings,
    weights,
    words_of,
)
from tiny_text import words
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from drotator import pipeline
from drotator.architecture import ModelSource
from drotator.artifacts import RunFolder
from drotator.calibration import calibration_windows
from drotator.config import PRUNERS, ROTATIONS, PruneConfig
from drotator.fetch import load_tokenizer
from drotator.pipeline import run_prune
from drotator.rotation import boundary_weight
from drotator.statistics import ActivationStream

FRESH = """
import os, sys, torch
from pathlib import Path
folder, *names = sys.argv[1:]
os.environ["HF_MODULES_CACHE"] = f"{folder}/modules"
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file(f"{folder}/tokens")["tokens"]

@torch.no_grad()
def logits(load):
    return {name: load(Path(folder, name, "checkpoint"))(tokens).logits for name in names}

sys.modules["drotator"] = None  # importing it fails
by_anyone = logits(lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True))
del sys.modules["drotator"]
from drotator.checkpoint import load_checkpoint
by_drotator = logits(load_checkpoint)
assert all(torch.equal(by_anyone[name], by_drotator[name]) for name in names)
save_file(by_drotator, f"{folder}/logits")
"""
NAMES = [f"{pruner}-{rotation}" for pruner, rotation in itertools.product(PRUNERS, ROTATIONS)]
ROTATED = [name for name in NAMES if not name.endswith("-none")]
KEYS = {
    *("model", "pruner", "sparsity", "rotation", "objective", "optimizer", "seed", "metrics", "sparsity_realised"),
    *("layers", "seconds", "peak_memory_bytes", "versions", "provenance"),
}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Folder with a run for every pruner and rotation: PRUNER-ROTATION."""
    folder = tmp_path_factory.mktemp("runs")
    for pruner, rotation in itertools.product(PRUNERS, ROTATIONS):
        run_prune(settings(inputs, pruner=pruner, rotation=rotation), folder / f"{pruner}-{rotation}", baseline=False)
    return folder


@pytest.fixture(scope="module")
def fresh_logits(runs):
    """Logits of every run's checkpoint on TOKENS, from a process that only loads them, with drotator and without."""
    save_file({"tokens": TOKENS}, runs / "tokens")
    command = [sys.executable, "-c", FRESH, str(runs), *NAMES]
    subprocess.run(command, check=True, env=process_environment())
    return load_file(runs / "logits")


def dense_model(inputs: Path) -> PreTrainedModel:
    """The model that was pruned, with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    return model


@torch.no_grad()
def composed_logits(inputs: Path, run: Path, rotation: str) -> Tensor:
    """Logits on TOKENS of the dense model with the run's layers in it, the rotations between them put in by hand."""
    model, folder = dense_model(inputs), RunFolder(run)
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layer.load_state_dict(folder.load_layer(index)[0])
    if rotation != "none":
        R1 = [folder.load_rotation(index).rotation.polished().R1 for index in range(len(layers))]
        head = model.lm_head.weight.double() * model.model.norm.weight.double()
        model.lm_head.weight.copy_(head @ R1[-1])
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.double() @ R1[0])
        if rotation == "per_layer":
            for layer, before, after in zip(layers, R1, R1[1:], strict=False):
                if torch.equal(before, after):
                    continue
                between = boundary_weight(before, after).float()
                layer.register_forward_hook(
                    lambda module, args, output, between=between: torch.nn.functional.linear(output, between)
                )
    return model(TOKENS).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_the_files_of_the_design(runs, name):
    files = {str(path.relative_to(runs / name)) for path in (runs / name).rglob("*") if path.is_file()}
    plots = {"perplexity", "layers"}
    rotations: set[str] = set()
    if name in ROTATED:
        plots |= {"objective", "importance_image", "importance_curves"}
        rotations = {f"rotations/00{index}.safetensors" for index in range(3)}
    code = {"checkpoint/modeling_rotated.py"} if name.endswith("per_layer") else set()
    expected = {"config.yaml", "inputs.json", "environment.json", "metrics.jsonl", "report.json", "report.md"}
    expected |= {f"layers/00{index}.safetensors" for index in range(3)} | {f"plots/{stem}.png" for stem in plots}
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    expected |= {f"checkpoint/{file}" for file in (*names, "README.md")}
    assert files == expected | rotations | code


@pytest.mark.parametrize("name", NAMES)
def test_report_json_is_the_contract(runs, name):
    report = report_of(runs / name)
    pruner, rotation = name.split("-")
    assert set(report) == KEYS
    assert (report["model"], report["pruner"], report["sparsity"]) == ("local", pruner, "2of4")
    assert (report["rotation"], report["objective"], report["optimizer"]) == (
        rotation,
        "pruning_error",
        "riemannian_adam",
    )
    assert report["seed"] == 0
    assert report["metrics"].keys() == {"dense", "pruned"}
    assert report["metrics"]["dense"].keys() == report["metrics"]["pruned"].keys() == {"passages"}
    assert report["seconds"].keys() == {"load", "calibrate", "rotate", "prune", "evaluate", "total"}
    parts = sum(value for stage, value in report["seconds"].items() if stage != "total")
    assert report["seconds"]["total"] == pytest.approx(parts)
    assert (report["seconds"]["rotate"] > 0) == (name in ROTATED)
    assert report["peak_memory_bytes"].keys() == {"host", "device"}
    assert report["peak_memory_bytes"]["host"] > 2**20
    assert {"python", "torch", "transformers"} <= report["versions"].keys()
    provenance = {"seqlen", "windows", "calibration_samples", "dataset", "batch_size"}
    assert provenance <= report["provenance"].keys()
    assert (report["provenance"]["dataset"], report["provenance"]["calibration_samples"]) == ("local", 3)
    assert report["provenance"]["windows"] == {"passages": 4}
    assert [layer["index"] for layer in report["layers"]] == [0, 1, 2]
    for layer in report["layers"]:
        keys = {"index", "objective_before", "objective_after", "orthogonality", "linears", "seconds"}
        assert keys <= layer.keys() <= keys | {"warnings", "damping"}
        assert len(layer["linears"]) == 7
        assert all(linear.keys() == {"sparsity", "relative_error"} for linear in layer["linears"].values())


@pytest.mark.parametrize("name", NAMES)
def test_sparsity_is_exact_and_errors_are_those_of_pruning(runs, name):
    report = report_of(runs / name)
    expected = 0.0 if name.startswith("none-") else 0.5
    linears = [linear for layer in report["layers"] for linear in layer["linears"].values()]
    assert report["sparsity_realised"] == expected
    assert {linear["sparsity"] for linear in linears} == {expected}
    assert all((linear["relative_error"] > 0) == (expected > 0) for linear in linears)
    assert all(linear["relative_error"] < 0.5 for linear in linears)
    stored = load_file(runs / name / "checkpoint" / "model.safetensors")
    for tensor_name, tensor in stored.items():
        if "_proj.weight" in tensor_name and expected:
            groups = (tensor == 0).reshape(len(tensor), -1, 4).sum(-1)
            assert (groups == 2).all()
            assert not torch.signbit(tensor[tensor == 0]).any()


@pytest.mark.parametrize("name", NAMES)
def test_metrics_jsonl_has_a_line_for_every_layer(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["index"]) for line in lines] == [("layer", 0), ("layer", 1), ("layer", 2)]
    for line in lines:
        assert line["peak_memory_bytes"]["host"] > 2**20
        if name in ROTATED:
            assert len(line["objective_history"]) == 6
            assert 0 < line["orthogonality"] < 1e-5
            assert line["objective_after"] < line["objective_before"]
        else:
            assert line["objective_history"] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_in_a_fresh_process_is_the_model_in_memory(inputs, runs, fresh_logits, name):
    assert torch.equal(fresh_logits[name], composed_logits(inputs, runs / name, name.split("-")[1]))


@pytest.mark.parametrize("rotation", ROTATIONS)
@torch.no_grad()
def test_without_a_pruner_the_rotated_checkpoint_is_the_dense_model(inputs, fresh_logits, rotation):
    dense = dense_model(inputs)(TOKENS).logits
    difference = (fresh_logits[f"none-{rotation}"] - dense).abs().max()
    assert difference <= 1e-4 * dense.abs().max()
    assert (difference > 0) == (rotation != "none")


def test_the_rotated_weights_are_pruned_and_not_the_dense_ones(inputs, runs, fresh_logits):
    dense = dense_model(inputs)(TOKENS).logits
    for name in NAMES:
        if not name.startswith("none-"):
            assert (fresh_logits[name] - dense).abs().max() > 1e-2 * dense.abs().max()
    for first, second in itertools.combinations(ROTATIONS, 2):
        assert not torch.equal(fresh_logits[f"wanda-{first}"], fresh_logits[f"wanda-{second}"])


def test_a_finished_run_is_not_run_again(inputs, runs, monkeypatch):
    run = runs / "wanda-per_layer"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    monkeypatch.setattr(pipeline, "prune_layers", None)
    given = settings(inputs, pruner="wanda", resume=str(run))
    assert run_prune(given, Path("elsewhere"), baseline=False) == report_of(run)["metrics"]["pruned"]["passages"]
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_the_baseline_stands_beside_the_run_and_in_its_report(inputs, tmp_path, capsys):
    run_prune(settings(inputs), tmp_path / "run", baseline=True)
    plain, rotated = report_of(tmp_path / "run-plain"), report_of(tmp_path / "run")
    assert (plain["rotation"], rotated["rotation"]) == ("none", "per_layer")
    shown = capsys.readouterr().out
    for text in (shown, (tmp_path / "run" / "report.md").read_text()):
        assert all(column in text for column in ("dense", "plain", "rotated"))
    assert plain["metrics"]["dense"] == rotated["metrics"]["dense"]
    assert plain["metrics"]["pruned"] != rotated["metrics"]["pruned"]


def test_a_run_in_groups_has_a_baseline_too(inputs, tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr(pipeline, "prepare", lambda planned: prepared.extend(planned) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_prune(settings(inputs, rotation={"name": "shared", "groups": 2}), tmp_path / "run", baseline=True)
    assert [given.rotation.name for given, _ in prepared] == ["none", "shared"]
    assert [folder.path.name for _, folder in prepared] == ["run-plain", "run"]


@pytest.mark.parametrize("target", ["model", "layer"])
def test_a_layer_is_reconstructed_towards_what_its_target_puts_out(inputs, tmp_path, target):
    given = settings(
        inputs,
        rotation="none" if target == "layer" else "per_layer",
        reconstruct={"name": "block", "target": target, "epochs": 3},
        evaluation={"perplexity": []},
    )
    run_prune(given, tmp_path / "run", baseline=False)
    found = [layer["reconstruction"]["after"] for layer in report_of(tmp_path / "run")["layers"]]
    errors = output_errors(given, RunFolder(tmp_path / "run"))
    other = {"model": "layer", "layer": "model"}[target]
    assert found == pytest.approx(errors[target], rel=1e-3)
    assert errors[other][0] == pytest.approx(errors[target][0], rel=1e-6)  # the dense model's inputs enter it too
    for index in (1, 2):
        assert abs(errors[other][index] - errors[target][index]) > 0.05 * errors[target][index]


def output_errors(given: PruneConfig, run: RunFolder) -> dict[str, list[float]]:
    """Relative error of each layer's output on the calibration text, by target, in the basis of the dense model."""
    source, device = ModelSource.open(Path(given.model.path)), torch.device("cpu")
    windows = calibration_windows(given.calibration, load_tokenizer(source.folder))
    pruned, dense = (ActivationStream.start(source, windows, 2, device) for _ in range(2))
    errors: dict[str, list[float]] = {"model": [], "layer": []}
    for index in range(source.num_layers):
        alone, layer = pruned.fork(), source.layer(index)
        for stream in (dense, alone):
            stream.advance(layer, index, None)
        layer.load_state_dict(run.load_layer(index)[0])
        R1 = run.load_rotation(index).rotation.polished().R1 if given.rotation.name != "none" else None
        pruned.advance(layer, index, R1)
        for target, stream in (("model", dense), ("layer", alone)):
            y, wanted = (torch.cat(list(each.hidden)).double() for each in (pruned, stream))
            errors[target].append(float(((y - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()))
    return errors


MOMENTS = {
    "per_layer, two layers are done": ("per_layer", "artifacts", "save_tensors", "layers/001.safetensors"),
    "per_layer, a rotation is done, its layer is not": ("per_layer", "artifacts", "save_tensors", "rotations/001.*"),
    "per_layer, a layer is half written": ("per_layer", "artifacts", "save_file", "layers/.001.safetensors.partial"),
    "shared, a part of the rotations is written": ("shared", "artifacts", "save_tensors", "rotations/001.*"),
    "shared, two layers are done": ("shared", "artifacts", "save_tensors", "layers/001.safetensors"),
    "shared, the checkpoint is half written": ("shared", "checkpoint", "save_file", "*.safetensors"),
}
KILLED = """
import json, os, signal, sys
from pathlib import Path
from drotator import artifacts, checkpoint
from drotator.pipeline import run_prune
from tiny_runs import settings

def run_until_killed(folder, rotation, module, function, pattern):
    module = {"artifacts": artifacts, "checkpoint": checkpoint}[module]
    original = getattr(module, function)
    def killing(*args, **kwargs):
        original(*args, **kwargs)
        if any(isinstance(arg, Path) and arg.match(pattern) for arg in args):
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, function, killing)
    run_prune(settings(inputs, rotation=rotation), folder, baseline=False)

inputs, folder, moments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for name, moment in moments.items():
    child = os.fork()  # nothing was computed yet: each starts as a process of its own would
    if child == 0:
        run_until_killed(folder / name, *moment)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, name
"""


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    """Folder with a run for each of MOMENTS that was killed then."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(inputs), str(folder), json.dumps(MOMENTS)]
    subprocess.run(command, check=True, env=process_environment())
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_ends_bitwise_as_if_it_never_had_been(inputs, runs, killed, moment):
    rotation, run = MOMENTS[moment][0], killed / moment
    assert not (run / "report.json").exists()
    assert not (run / "checkpoint").exists()
    run_prune(settings(inputs, rotation=rotation, resume=str(run)), killed / "unused", baseline=False)
    assert_same_run(run, runs / f"sparsegpt-{rotation}")
    assert not list(run.rglob(".*")), "nothing hidden is left"


@pytest.mark.slow
def test_a_run_killed_from_outside_goes_on_with_the_same_command(inputs, tmp_path):
    words = words_of(inputs, "optimizer.steps=100", "baseline=never")
    process = subprocess.Popen(
        [sys.executable, "-m", "drotator", *words, f"hydra.run.dir={tmp_path / 'killed'}"],
        env=process_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "layers" / "000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "layers" / "002.safetensors").exists()
    finished = drotator(*words, f"resume={tmp_path / 'killed'}", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    run_prune(settings(inputs, steps=100), tmp_path / "whole", baseline=False)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert "perplexity" in finished.stdout
    assert (tmp_path / "killed" / "log.txt").is_file()


def assert_same_run(run: Path, expected: Path) -> None:
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    reports = report_of(run), report_of(expected)
    assert reports[0]["metrics"] == reports[1]["metrics"]
    measured = [[(layer["objective_after"], layer["linears"]) for layer in report["layers"]] for report in reports]
    assert measured[0] == measured[1]


def stopped_run(inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended after its layers, before its checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "export_checkpoint", None)
        with pytest.raises(TypeError):
            run_prune(settings(inputs), run, baseline=False)


def test_a_resumed_run_refuses_other_settings_and_names_them(inputs, tmp_path, monkeypatch):
    stopped_run(inputs, tmp_path / "run", monkeypatch)
    changed = settings(inputs, pruner="wanda", steps=7, resume=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"optimizer.steps=7 \(was 5\), pruner.name=wanda \(was sparsegpt\)"):
        run_prune(changed, tmp_path, baseline=False)


@pytest.mark.parametrize("changed", ["weights", "text"])
def test_a_resumed_run_refuses_other_weights_and_another_text_and_names_them(inputs, tmp_path, monkeypatch, changed):
    shutil.copytree(inputs / "model", tmp_path / "model")
    shutil.copy(inputs / "text.txt", tmp_path)
    stopped_run(tmp_path, tmp_path / "run", monkeypatch)
    if changed == "weights":
        file = tmp_path / "model" / "model.safetensors"
        save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        named = r"model.safetensors=(\d+) bytes, \w{12} \(was \1 bytes, \w{12}\)"
    else:
        (tmp_path / "text.txt").write_text(words(5, 200))
        named = r"calibration tokens=3x32, \w{12} \(was 3x32, \w{12}\)"
    with pytest.raises(ValueError, match=rf"run holds a run with other inputs: {named}\. Give them as they were, or "):
        run_prune(settings(tmp_path, resume=str(tmp_path / "run")), tmp_path, baseline=False)


def test_resume_of_a_folder_without_a_run_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="no run"):
        run_prune(settings(inputs, resume=str(tmp_path)), tmp_path, baseline=False)


@pytest.mark.parametrize("part", ["layers", "rotations"])
@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_file_of_a_stopped_run_is_named(inputs, tmp_path, monkeypatch, part, damage):
    run = tmp_path / "run"
    stopped_run(inputs, run, monkeypatch)
    file = run / part / "001.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if damage == "cut" else b"")
    with pytest.raises(ValueError, match=r"001\.safetensors is damaged") as refused:
        run_prune(settings(inputs, resume=str(run)), tmp_path, baseline=False)
    assert "\n" not in str(refused.value)
    assert not (run / "report.json").exists()
    assert not (run / "checkpoint").exists()


def test_following_the_advice_on_a_damaged_layer_finishes_the_run(inputs, runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_run(inputs, run, monkeypatch)
    (run / "layers" / "001.safetensors").unlink()
    (run / "layers" / ".001.safetensors.partial").write_bytes(b"left by a run that was killed")
    run_prune(settings(inputs, resume=str(run)), tmp_path, baseline=False)
    assert_same_run(run, runs / "sparsegpt-per_layer")


def test_a_lost_rotation_of_a_finished_layer_is_named(inputs, tmp_path, monkeypatch):
    stopped_run(inputs, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "rotations" / "001.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"rotations/001\.safetensors is missing: delete 001\.safetensors in layers and in rotations"
    ):
        run_prune(settings(inputs, resume=str(tmp_path / "run")), tmp_path, baseline=False)
