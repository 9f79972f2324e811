from __future__ import annotations

import json
import os
import stat

import pytest
import torch
import yaml
from safetensors.torch import save_file

from drotator import artifacts
from drotator.artifacts import RunFolder, flatten, load_tensors, save_tensors, versions
from drotator.results import LayerResult, LinearResult
from drotator.rotation import Rotation
from drotator.training import TrainedRotation

SETTINGS = {"pruner": {"name": "wanda", "damping": 0.01}, "eval": {"tasks": ["piqa"]}, "resume": "", "device": "cpu"}
RESULT = LayerResult(
    index=3,
    objective_before=1.0,
    objective_after=0.1 + 0.2,
    orthogonality=1e-7,
    linears={"mlp.up_proj": LinearResult(sparsity=0.5, relative_error=1 / 3)},
    seconds={"prune": 0.25},
    objective_history=[1.0, 0.5],
    damping={"mlp.up_proj": 0.1},
    reconstruction={"before": 0.3, "after": 0.1},
    peak_memory_bytes={"host": 1, "device": 0},
    warnings=["the objective did not fall"],
)


@pytest.fixture
def run(tmp_path):
    return RunFolder.open(tmp_path / "a" / "run", SETTINGS)


def test_a_new_run_folder_has_its_settings_and_its_environment(run):
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == SETTINGS
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["torch"] == versions()["torch"]
    assert environment["cpu_threads"] == torch.get_num_threads()


def test_a_run_folder_opens_again_with_the_same_settings(run):
    assert RunFolder.open(run.path, SETTINGS).path == run.path
    RunFolder.open(run.path, SETTINGS | {"resume": str(run.path), "device": "cuda"})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"pruner": {"name": "sparsegpt", "damping": 0.01}}, r"pruner.name=sparsegpt \(was wanda\)"),
        ({"eval": {"tasks": []}}, r"eval.tasks=\[\] \(was \['piqa'\]\)"),
        ({"seed": 1}, r"seed=1 \(was None\)"),
    ],
)
def test_a_run_folder_with_other_settings_is_refused(run, changed, named):
    with pytest.raises(ValueError, match=named) as refused:
        RunFolder.open(run.path, SETTINGS | changed)
    assert "\n" not in str(refused.value)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == SETTINGS


@pytest.mark.parametrize("content", ["", "a: [", "- 1\n", "\x00"])
def test_a_damaged_config_yaml_is_named(run, content):
    (run.path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged") as refused:
        RunFolder.open(run.path, SETTINGS)
    assert "\n" not in str(refused.value)


def test_a_run_folder_keeps_its_inputs_and_refuses_others(run, tmp_path):
    windows = torch.arange(6).reshape(2, 3)
    for name in "bca":
        save_file({"weight": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    run.keep_inputs(tmp_path, windows)
    written = (run.path / "inputs.json").read_text()
    assert list(json.loads(written)) == ["a.safetensors", "b.safetensors", "c.safetensors", "calibration tokens"]
    run.keep_inputs(tmp_path, windows.clone())
    (tmp_path / "a.safetensors").unlink()
    save_file({"weight": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"other inputs: a.safetensors=None \(was .*\), b.safetensors=\d+ b.* as they w"
    ):
        run.keep_inputs(tmp_path, windows)
    with pytest.raises(ValueError, match="calibration tokens=2x3, "):
        run.keep_inputs(tmp_path, windows + 1)
    assert (run.path / "inputs.json").read_text() == written


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_inputs_json_is_named(run, tmp_path, content):
    (run.path / "inputs.json").write_text(content)
    with pytest.raises(ValueError, match=r"inputs\.json is damaged: start a new run"):
        run.keep_inputs(tmp_path, torch.zeros(2, 3))


def test_many_changes_are_counted(run):
    changed = SETTINGS | {f"new{index}": index for index in range(9)}
    with pytest.raises(ValueError, match=r"new3=3 \(was None\), and 5 more\. Give them as they were"):
        RunFolder.open(run.path, changed)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run cannot be written: Not a directory"):
        RunFolder.open(tmp_path / "file" / "run", SETTINGS)


def test_a_layer_comes_back_bitwise_with_its_result(run):
    state = {"weight": torch.randn(3, 4, dtype=torch.float64), "bias": torch.randn(3).bfloat16()}
    run.save_layer(3, state, RESULT)
    found, result = run.load_layer(3)
    assert result == RESULT
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)


def test_a_rotation_comes_back_bitwise_with_its_training(run):
    rotation = Rotation(torch.randn(4, 4), torch.randn(2, 3, 3))
    trained = TrainedRotation(rotation, 1.0, 0.5, 1e-7, [1.0, 0.5], ["a warning"])
    run.save_rotation(0, trained)
    found = run.load_rotation(0)
    assert torch.equal(found.rotation.R1, rotation.R1)
    assert torch.equal(found.rotation.R2, rotation.R2)
    assert (found.objective_before, found.objective_after, found.orthogonality) == (1.0, 0.5, 1e-7)
    assert (found.history, found.warnings) == ([1.0, 0.5], ["a warning"])
    assert found.rotation.order is None
    assert run.has_rotations(range(1))
    assert not run.has_rotations(range(2))


@pytest.mark.parametrize("value_map", ["orthogonal", "invertible"])
def test_a_rotation_comes_back_as_what_its_r2_may_be(run, value_map):
    rotation = Rotation(torch.eye(4), torch.randn(2, 3, 3), torch.arange(5), value_map)
    run.save_rotation(0, TrainedRotation(rotation, 1.0, 0.5, 1e-7))
    found = run.load_rotation(0).rotation
    assert found.value_map == value_map
    assert torch.equal(found.order, rotation.order)
    assert torch.equal(found.R2, rotation.R2)


def test_a_rotation_of_a_file_that_does_not_say_is_orthogonal(run):
    record = {"objective_before": 1.0, "objective_after": 0.5, "orthogonality": 0.0}
    tensors = {"R1": torch.eye(4), "R2": torch.eye(3)[None]}
    save_tensors(run.rotation_file(0), tensors, {"training": json.dumps(record)})
    assert run.load_rotation(0).rotation.value_map == "orthogonal"


def test_a_view_of_a_larger_tensor_is_stored_alone(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.randn(100, 100).mT[:2]}, {})
    assert (tmp_path / "a.safetensors").stat().st_size < 2000


def test_a_file_is_readable_as_its_folder_is_and_leaves_nothing_else(tmp_path):
    tmp_path.chmod(0o755)
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {"about": "{}"})

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    assert torch.equal(load_tensors(tmp_path / "a.safetensors", "about")[0]["x"], torch.zeros(2))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64])
def test_a_damaged_layer_is_named_with_what_to_do(run, content):
    run.layer_file(1).write_bytes(content)
    with pytest.raises(ValueError, match=r"layers/001\.safetensors is damaged .*delete 001\.safetensors in layers"):
        run.load_layer(1)


def test_a_layer_without_its_result_is_damaged(run):
    save_file({"x": torch.zeros(2)}, run.layer_file(1))
    with pytest.raises(ValueError, match=r"layers/001\.safetensors is damaged"):
        run.load_layer(1)


def test_metrics_jsonl_is_written_anew(run):
    run.write_metrics([{"index": 0}])
    run.write_metrics([{"index": 0}, {"index": 1}])
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"index": 0}, {"index": 1}]


def test_flatten_joins_names_by_points():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_versions_name_python_torch_and_the_commit_only_where_git_is(monkeypatch):
    assert {"python", "torch", "transformers", "safetensors"} <= versions().keys()
    monkeypatch.setenv("PATH", "")
    assert "commit" not in versions()
