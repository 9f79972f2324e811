from __future__ import annotations

import json
import math

import pytest
from tiny_runs import report_of, settings

from drotator import evaluation
from drotator.commands import run_eval
from drotator.config import EvalCommandConfig, ModelConfig
from drotator.pipeline import run_prune


def evaluate(folder, run_dir, like):
    return run_eval(EvalCommandConfig(model=ModelConfig(path=str(folder)), eval=like.eval), run_dir)


@pytest.mark.parametrize("rotation", ["per_layer", "none"])
def test_a_checkpoint_has_exactly_the_metrics_of_its_report(inputs, tmp_path, rotation, capsys):
    given = settings(inputs, rotation=rotation, evaluation={"tasks": ["piqa", "winogrande"]})
    run_prune(given, tmp_path / "run", baseline=False)
    capsys.readouterr()
    value = evaluate(tmp_path / "run" / "checkpoint", tmp_path / "eval", given)
    record = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert record["metrics"] == report_of(tmp_path / "run")["metrics"]["pruned"]
    assert record["metrics"].keys() >= {"passages", "piqa", "winogrande", "zero_shot_mean"}
    assert value == record["metrics"]["passages"]
    assert (record["checkpoint"]["pruner"], record["checkpoint"]["rotation"]) == ("sparsegpt", rotation)
    assert record["provenance"]["windows"] == {"passages": 4}
    assert "torch" in record["versions"]
    assert "piqa" in capsys.readouterr().out.lower()


def test_a_dense_model_has_exactly_the_dense_metrics_of_a_report(inputs, tmp_path):
    given = settings(inputs, pruner="magnitude", rotation="none")
    run_prune(given, tmp_path / "run", baseline=False)
    evaluate(inputs / "model", tmp_path, given)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["metrics"] == report_of(tmp_path / "run")["metrics"]["dense"]
    assert record["checkpoint"] == {}


def test_a_sweep_minimises_minus_the_mean_accuracy_where_no_perplexity_is_measured(inputs, tmp_path):
    only_tasks = settings(inputs, evaluation={"perplexity": [], "tasks": ["piqa"]})
    value = evaluate(inputs / "model", tmp_path, only_tasks)
    assert value == -json.loads((tmp_path / "metrics.json").read_text())["metrics"]["zero_shot_mean"]
    nothing = settings(inputs, evaluation={"perplexity": [], "tasks": []})
    assert math.isnan(evaluate(inputs / "model", tmp_path, nothing))


def test_missing_data_is_known_before_the_model_is_loaded(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_checkpoint", None)
    with pytest.raises(ValueError, match=r"Lower eval\.seqlen"):
        evaluate(inputs / "model", tmp_path, settings(inputs, evaluation={"seqlen": 10**6}))
