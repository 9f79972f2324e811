from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import make_inputs

from drotator import rotation
from drotator.check import run_check
from drotator.config import (
    CalibrationConfig,
    CheckConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SparsityConfig,
)


@pytest.fixture
def make_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))

    def make(dtype=torch.float32, stored="auto", num_samples=3):
        inputs = make_inputs(tmp_path, dtype=dtype)
        return CheckConfig(
            model=ModelConfig(path=str(inputs / "model"), dtype=stored),
            calibration=CalibrationConfig(
                dataset="local", path=str(inputs / "text.txt"), num_samples=num_samples, seqlen=32
            ),
            objective=ObjectiveConfig(),
            optimizer=OptimizerConfig(steps=3),
            sparsity=SparsityConfig(keep=2, group=4),
        )

    return make


def read(folder):
    return json.loads((folder / "check.json").read_text())


def test_a_float32_model_passes_with_random_and_learned_rotations(make_settings, tmp_path, capsys):
    run = tmp_path / "run"
    largest = run_check(make_settings(), run)
    records = read(run)
    assert [(record["rotation"], record["dtype"]) for record in records] == [
        ("random", "float32"),
        ("learned", "float32"),
    ]
    assert 0 < largest < 1e-4
    assert largest == max(record["relative"] for record in records)
    shown = capsys.readouterr().out
    assert shown.count("ok") == 2
    assert "random" in shown
    assert [path.name for path in run.iterdir()] == ["check.json"], "nothing is kept of what was merged"


def test_a_bfloat16_model_is_checked_in_both_dtypes(make_settings, tmp_path):
    run_check(make_settings(torch.bfloat16), tmp_path / "run")
    records = read(tmp_path / "run")
    assert [record["dtype"] for record in records] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert max(record["relative"] for record in records[:2]) < 1e-4
    assert min(record["relative"] for record in records[2:]) > 1e-4


def test_the_dtype_asked_for_is_the_one_checked(make_settings, tmp_path):
    run_check(make_settings(stored="float16", num_samples=1), tmp_path / "run")
    assert [record["dtype"] for record in read(tmp_path / "run")] == ["float32", "float32", "float16", "float16"]


def test_a_wrong_merge_is_told_and_written_down(make_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rotation, "rotate_output_columns", lambda W, R2, queries_per_group: W)
    with pytest.raises(RuntimeError, match=r"merging random rotations changes the logits by .* Do not prune"):
        run_check(make_settings(), tmp_path / "run")
    assert "TOO LARGE" in capsys.readouterr().out
    assert read(tmp_path / "run")[0]["relative"] > 0.01


def test_logits_that_are_not_finite_do_not_pass(make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(rotation, "rotate_output_columns", lambda W, R2, queries_per_group: W * torch.nan)
    with pytest.raises(RuntimeError):
        run_check(make_settings(), tmp_path / "run")
