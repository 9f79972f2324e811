from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny_runs import make_inputs
from tiny_text import byte_tokenizer, tiny_llama

from drotator import dense, evaluation
from drotator.architecture import ModelSource
from drotator.config import EvalConfig
from drotator.dense import dense_metrics

SETTINGS = EvalConfig(source="embedded", perplexity=["passages"], tasks=[], seqlen=32, windows=2)
CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))
    return ModelSource.open(make_inputs(tmp_path) / "model")


@pytest.fixture
def measured(monkeypatch):
    """One entry for every evaluation that was really done."""
    done = []
    evaluate = evaluation.evaluate

    def counting(model, tokenizer, settings, *, seed):
        done.append(settings)
        time.sleep(0.2)
        return evaluate(model, tokenizer, settings, seed=seed)

    monkeypatch.setattr(evaluation, "evaluate", counting)
    return done


def test_the_dense_model_is_measured_once(source, measured):
    first = dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU)
    second = dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU)
    assert first == second
    assert first["passages"] > 1
    assert len(measured) == 1


def test_other_settings_models_and_dtypes_are_measured_for_themselves(source, measured):
    def measure(source=source, seed=0, **changes):
        return dense_metrics(source, byte_tokenizer(), replace(SETTINGS, **changes), seed=seed, device=CPU)["passages"]

    first = measure()
    assert measure(windows=3) != first
    measure(seqlen=16)
    measure(batch_size=1)
    measure(seed=1)
    assert measure(ModelSource.open(source.folder, "bfloat16")) != first
    tiny_llama(seed=5, tie_word_embeddings=True).save_pretrained(source.folder)
    assert measure(ModelSource.open(source.folder)) != first
    assert len(measured) == 7


def test_another_version_of_torch_measures_again(source, measured, monkeypatch):
    dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU)
    monkeypatch.setattr(dense, "versions", lambda: {"torch": "0.1"})
    dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU)
    assert len(measured) == 2


def test_of_two_jobs_at_once_one_measures_and_the_other_waits(source, measured):
    found = []

    def job():
        found.append(dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU))

    jobs = [threading.Thread(target=job) for _ in range(2)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert len(measured) == 1
    assert found[0] == found[1]


def test_nothing_is_kept_of_an_evaluation_that_failed(source, measured, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU)
    assert dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU)["passages"] > 1


def test_a_damaged_entry_is_measured_again(source, measured, tmp_path):
    first = dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU)
    (entry,) = (tmp_path / "cache" / "dense").glob("*.json")
    entry.write_text("")
    assert dense_metrics(source, byte_tokenizer(), SETTINGS, seed=0, device=CPU) == first
    assert json.loads(entry.read_text()) == first


def test_what_cannot_be_measured_is_known_before_the_model_is_loaded(source, monkeypatch):
    monkeypatch.setattr(evaluation, "load_checkpoint", None)
    with pytest.raises(ValueError, match=r"Lower eval\.seqlen"):
        dense_metrics(source, byte_tokenizer(), replace(SETTINGS, seqlen=10**6), seed=0, device=CPU)


def test_no_model_is_loaded_where_nothing_is_measured(source, monkeypatch):
    monkeypatch.setattr(evaluation, "load_checkpoint", None)
    assert dense_metrics(source, byte_tokenizer(), replace(SETTINGS, perplexity=[]), seed=0, device=CPU) == {}
