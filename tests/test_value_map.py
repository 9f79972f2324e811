"""rotation.value_map=invertible from the command line to the checkpoint, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TOKENS, report_of, settings, weights, words_of
from transformers import AutoModelForCausalLM

from drotator import pipeline
from drotator.artifacts import RunFolder
from drotator.checkpoint import load_checkpoint
from drotator.composition import plan
from drotator.config import ObjectiveConfig, OptimizerConfig, PruneConfig, PrunerConfig, RotationConfig
from drotator.pipeline import run_prune

SCOPES: dict[str, dict[str, Any]] = {
    "per_layer": {"name": "per_layer"},
    "shared": {"name": "shared"},
    "groups": {"name": "shared", "groups": 2},
}

by_scope = pytest.mark.parametrize("scope", SCOPES)


def invertible(inputs: Path, scope: str, **more: Any) -> PruneConfig:
    chosen = settings(inputs, **more)
    return dataclasses.replace(
        chosen,
        rotation=RotationConfig(**SCOPES[scope], value_map="invertible"),
        objective=ObjectiveConfig(weights="sensitivity"),
        optimizer=OptimizerConfig(name="spectral", steps=8, learning_rate=0.1),
    )


@by_scope
@torch.no_grad()
def test_a_checkpoint_with_an_invertible_map_computes_what_the_dense_model_does(inputs, tmp_path, scope):
    run = tmp_path / "run"
    run_prune(invertible(inputs, scope, pruner="none"), run, baseline=False)
    dense = AutoModelForCausalLM.from_pretrained(inputs / "model")(TOKENS).logits
    torch.testing.assert_close(load_checkpoint(run / "checkpoint")(TOKENS).logits, dense, rtol=1e-3, atol=1e-3)
    rotations = [RunFolder(run).load_rotation(index).rotation for index in range(3)]
    assert [rotation.value_map for rotation in rotations] == ["invertible"] * 3
    assert min(rotation.condition() for rotation in rotations) > 1.05
    assert all(layer["objective_after"] < layer["objective_before"] for layer in report_of(run)["layers"])
    is_plain = json.loads((run / "checkpoint" / "config.json").read_text())["model_type"] == "llama"
    assert is_plain == (scope == "shared")
    assert {name.rpartition(".")[2] for name in load_file(run / "rotations" / "000.safetensors")} == {"R1", "R2"}


@by_scope
def test_a_run_with_an_invertible_map_that_was_stopped_ends_bitwise_as_if_it_never_had_been(
    inputs, tmp_path, monkeypatch, scope
):
    chosen = invertible(inputs, scope)
    run_prune(chosen, tmp_path / "whole", baseline=False)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "export_checkpoint", None)
        with pytest.raises(TypeError):
            run_prune(chosen, tmp_path / "run", baseline=False)
    (tmp_path / "run" / "layers" / "002.safetensors").unlink()
    run_prune(dataclasses.replace(chosen, resume=str(tmp_path / "run")), tmp_path / "unused", baseline=False)
    found, wanted = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    linears = [[layer["linears"] for layer in report_of(tmp_path / name)["layers"]] for name in ("run", "whole")]
    assert linears[0] == linears[1]
    changed = dataclasses.replace(
        chosen, resume=str(tmp_path / "run"), rotation=RotationConfig(**SCOPES[scope], value_map="orthogonal")
    )
    with pytest.raises(ValueError, match=r"rotation.value_map=orthogonal \(was invertible\)"):
        run_prune(changed, tmp_path / "unused", baseline=False)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adam_qr": (
        {"optimizer": OptimizerConfig(name="adam_qr")},
        "optimizer=adam_qr is not allowed: rotation.value_map=invertible needs riemannian_adam or spectral.",
    ),
    "entropy": (
        {"objective": ObjectiveConfig(name="entropy")},
        "objective=entropy is not allowed: rotation.value_map=invertible needs pruning_error.",
    ),
    "magnitude": (
        {"pruner": PrunerConfig(name="magnitude")},
        "objective.salience=magnitude is not allowed: rotation.value_map=invertible needs wanda, obs or "
        "sequential_obs.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_map_that_stretches_makes_meaningless_is_refused_in_one_line(name: str) -> None:
    changes, message = REFUSED[name]
    allowed = invertible(Path("inputs"), "per_layer")
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        dataclasses.replace(allowed, **changes)
    assert str(refused.value) == message
    orthogonal = dataclasses.replace(allowed, rotation=RotationConfig())
    assert dataclasses.replace(orthogonal, **changes).rotation.value_map == "orthogonal"


def test_magnitude_pruning_may_have_a_map_that_an_importance_with_inputs_chooses() -> None:
    allowed = invertible(Path("inputs"), "per_layer")
    objective = dataclasses.replace(allowed.objective, salience="wanda")
    dataclasses.replace(allowed, pruner=PrunerConfig(name="magnitude"), objective=objective)


def test_a_map_that_is_not_learned_or_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rotation\.value_map=invertible is not allowed: needs rotation\.R2=true"):
        RotationConfig(value_map="invertible", R2=False)
    with pytest.raises(ValueError, match=r"rotation\.value_map=any is not allowed: choose from orthogonal, invertible"):
        RotationConfig(value_map="any")


def test_the_command_line_takes_the_map_and_refuses_adam_qr_beside_it(inputs) -> None:
    words = words_of(inputs, "rotation.value_map=invertible")[1:]
    plan("prune", words)
    with pytest.raises(ValueError, match=r"optimizer=adam_qr is not allowed: rotation\.value_map=") as refused:
        plan("prune", [*words, "optimizer=adam_qr"])
    assert "\n" not in str(refused.value)
