"""Whole runs on a tiny model with the settings that go beyond the paper, each for what it promises."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import FRESH, assert_same_run, composed_logits, dense_model
from tiny_runs import TOKENS, process_environment, report_of, settings, weights

from drotator.artifacts import RunFolder
from drotator.config import ReconstructConfig, RotationConfig
from drotator.pipeline import run_prune
from drotator.report import load_report
from drotator.summary import run_settings

CHANGES: dict[str, dict[str, Any]] = {
    "groups": {"rotation": RotationConfig(name="shared", groups=2)},
    "groups-dense": {"pruner": "none", "rotation": RotationConfig(name="shared", groups=2)},
    "only-R2": {"pruner": "none", "rotation": RotationConfig(R1=False)},
    "only-R1": {"rotation": RotationConfig(R2=False)},
    "permute": {"pruner": "none", "rotation": RotationConfig(permute="both")},
    "permute-shared": {"pruner": "none", "rotation": RotationConfig(name="shared", permute="both")},
    "invertible": {"pruner": "none", "rotation": RotationConfig(value_map="invertible")},
    "reconstruct": {"reconstruct": ReconstructConfig(name="block", epochs=2)},
    "reconstruct-layer": {"reconstruct": ReconstructConfig(name="block", epochs=2, target="layer")},
    "reconstruct-plain": {"rotation": RotationConfig(name="none"), "reconstruct": ReconstructConfig(name="block")},
    "plain": {"rotation": RotationConfig(name="none")},
    "cold": {"optimizer": {"warm_start": False}},
    "warm": {},
    "solve": {"rotation": RotationConfig(name="none"), "pruner": "wanda", "solve_steps": 10},
    "wanda": {"rotation": RotationConfig(name="none"), "pruner": "wanda"},
    "admm": {"rotation": RotationConfig(name="none"), "pruner": "admm"},
}
KILLED = """
import os, signal, sys
from pathlib import Path
from drotator import artifacts
from test_options import run_of

name, inputs, folder, pattern = sys.argv[1:]
original = artifacts.save_tensors
def killing(path, *rest):
    original(path, *rest)
    if path.match(pattern):
        os.kill(os.getpid(), signal.SIGKILL)
artifacts.save_tensors = killing
run_of(name, Path(inputs), Path(folder))
"""


def run_of(name: str, inputs: Path, folder: Path, **more: Any) -> None:
    """Do the run that CHANGES names."""
    changes = dict(CHANGES[name])
    given = settings(inputs, pruner=changes.pop("pruner", "sparsegpt"), **more)
    given.pruner.solve_steps = changes.pop("solve_steps", 0)
    given.optimizer = dataclasses.replace(given.optimizer, **changes.pop("optimizer", {}))
    run_prune(dataclasses.replace(given, **changes), folder, baseline=False)


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Folder with a run for each of CHANGES."""
    folder = tmp_path_factory.mktemp("options")
    for name in CHANGES:
        run_of(name, inputs, folder / name)
    return folder


@pytest.fixture(scope="module")
def fresh_logits(runs):
    """Logits of every run's checkpoint on TOKENS, from a process that only loads them."""
    save_file({"tokens": TOKENS}, runs / "tokens")
    subprocess.run([sys.executable, "-c", FRESH, str(runs), *CHANGES], check=True, env=process_environment())
    return load_file(runs / "logits")


def config_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "checkpoint" / "config.json").read_text()))


def error_of(run: Path) -> float:
    return sum(linear["relative_error"] for layer in report_of(run)["layers"] for linear in layer["linears"].values())


def test_groups_leave_a_boundary_between_two_runs_of_layers_alone(inputs, runs, fresh_logits):
    R1 = [RunFolder(runs / "groups").load_rotation(index).rotation.R1 for index in range(3)]
    assert not torch.equal(R1[0], R1[1])
    assert torch.equal(R1[1], R1[2])
    assert config_of(runs / "groups")["boundary_layers"] == [0]
    tensors = load_file(runs / "groups" / "checkpoint" / "model.safetensors")
    assert [name for name in tensors if "boundary" in name] == ["model.layers.0.boundary.weight"]
    assert torch.equal(fresh_logits["groups"], composed_logits(inputs, runs / "groups", "per_layer"))
    assert not (runs / "groups" / "problems").exists()


@pytest.mark.parametrize("name", ["groups-dense", "only-R2", "permute", "permute-shared", "invertible"])
@torch.no_grad()
def test_what_is_merged_without_a_pruner_leaves_the_dense_model(inputs, fresh_logits, name):
    dense = dense_model(inputs)(TOKENS).logits
    difference = (fresh_logits[name] - dense).abs().max()
    assert 0 < difference <= 1e-4 * dense.abs().max()


def test_without_r1_the_checkpoint_is_plain_and_r1_the_identity(runs):
    assert config_of(runs / "only-R2")["model_type"] == "llama"
    assert not (runs / "only-R2" / "checkpoint" / "modeling_rotated.py").exists()
    for index in range(3):
        rotation = RunFolder(runs / "only-R2").load_rotation(index).rotation
        assert torch.equal(rotation.R1, torch.eye(32))
        assert not torch.equal(rotation.R2, torch.eye(12).repeat(2, 1, 1))


def test_without_r2_it_stays_the_identity(runs):
    rotation = RunFolder(runs / "only-R1").load_rotation(1).rotation
    assert torch.equal(rotation.R2, torch.eye(12).repeat(2, 1, 1))
    assert not torch.equal(rotation.R1, torch.eye(32))


@pytest.mark.parametrize("name", ["permute", "permute-shared"])
def test_the_order_of_the_intermediate_channels_is_kept_with_the_rotation(runs, name):
    orders = [RunFolder(runs / name).load_rotation(index).rotation.order for index in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(64))
        assert order.tolist() != list(range(64))


def test_training_starts_from_the_layer_before_unless_it_is_told_not_to(runs):
    first, cold, warm = (
        [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("warm", "cold", "warm")
    )
    assert first[0]["objective_history"] == cold[0]["objective_history"]
    for layer in cold:
        assert layer["objective_history"][0] == pytest.approx(layer["objective_before"], rel=1e-6)
    for layer in warm[1:]:
        assert layer["objective_history"][0] != pytest.approx(layer["objective_before"], rel=1e-3)


@pytest.mark.parametrize("name", ["reconstruct", "reconstruct-layer", "reconstruct-plain"])
def test_reconstruction_keeps_the_masks_and_tells_what_it_did(runs, name):
    report = report_of(runs / name)
    assert report["sparsity_realised"] == 0.5
    for layer in report["layers"]:
        assert layer["reconstruction"]["after"] < layer["reconstruction"]["before"]
    assert load_report(runs / name).layers[1].reconstruction == report["layers"][1]["reconstruction"]
    stored = load_file(runs / name / "checkpoint" / "model.safetensors")
    for tensor_name, tensor in stored.items():
        if "_proj.weight" in tensor_name:
            assert ((tensor == 0).reshape(len(tensor), -1, 4).sum(-1) == 2).all()
            assert not tensor[tensor == 0].signbit().any()


def test_the_targets_of_reconstruction_differ_from_the_second_layer_on(runs):
    model, layer = (report_of(runs / name)["layers"] for name in ("reconstruct", "reconstruct-layer"))
    assert model[0]["reconstruction"]["before"] == layer[0]["reconstruction"]["before"]
    assert model[2]["reconstruction"]["before"] > layer[2]["reconstruction"]["before"]


def test_solving_and_admm_leave_less_error_than_what_they_start_from(runs):
    assert error_of(runs / "solve") < 0.95 * error_of(runs / "wanda")
    assert error_of(runs / "admm") < error_of(runs / "plain")
    for name in ("solve", "admm"):
        linears = [linear for layer in report_of(runs / name)["layers"] for linear in layer["linears"].values()]
        assert {linear["sparsity"] for linear in linears} == {0.5}


def test_an_unrotated_run_weighs_its_masks_only_where_it_is_told_to(inputs, tmp_path):
    for name in ("auto", "uniform", "sensitivity"):
        given = settings(
            inputs, pruner={"name": "sparsegpt", "weights": name}, rotation="none", sparsity={"ratio": 0.5}
        )
        run_prune(given, tmp_path / name, baseline=False)
        assert report_of(tmp_path / name)["sparsity_realised"] == 0.5
    auto, uniform, sensitivity = (weights(tmp_path / name) for name in ("auto", "uniform", "sensitivity"))
    assert auto.keys() == uniform.keys() == sensitivity.keys()
    assert all(torch.equal(tensor, uniform[name]) for name, tensor in auto.items())
    changed = {name.split(".")[-2] for name, tensor in auto.items() if not torch.equal(tensor, sensitivity[name])}
    assert {"q_proj", "v_proj", "gate_proj"} <= changed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("warm", "-"),
        ("cold", "warm_start=False"),
        ("groups", "groups=2"),
        ("solve", "solve_steps=10"),
        ("reconstruct", "reconstruct=block, epochs=2"),
        ("reconstruct-layer", "reconstruct=block, target=layer, epochs=2"),
    ],
)
def test_a_report_says_which_settings_are_unusual(runs, name, said):
    assert run_settings(load_report(runs / name))["also"] == said


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("groups", "rotations/001.*"),
        ("groups", "layers/001.*"),
        ("reconstruct", "layers/001.*"),
        ("permute-shared", "layers/000.*"),
        ("invertible", "layers/001.*"),
    ],
)
def test_a_run_that_was_killed_ends_bitwise_as_if_it_never_had_been(inputs, runs, tmp_path, name, pattern):
    command = [sys.executable, "-c", KILLED, name, str(inputs), str(tmp_path / "run"), pattern]
    killed = subprocess.run(command, env=process_environment(), check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "run" / "report.json").exists()
    run_of(name, inputs, tmp_path / "unused", resume=str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", runs / name)
