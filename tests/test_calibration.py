from __future__ import annotations

import random

import pytest
import torch
from tiny_text import byte_tokenizer, embedded_data_in_cache, words

from drotator import calibration
from drotator.config import CalibrationConfig


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))


def settings(**changes):
    return CalibrationConfig(**{"dataset": "local", "path": "none.txt", "num_samples": 6, "seqlen": 16, **changes})


def drawn_as_released(documents, num_samples, seqlen, seed, tokenizer):
    """The loop of the released SparseGPT and Wanda loaders, on Python's global generator."""
    random.seed(seed)
    windows = []
    for _ in range(num_samples):
        while True:
            tokens = tokenizer(documents[random.randint(0, len(documents) - 1)]).input_ids
            if len(tokens) > seqlen:
                break
        start = random.randint(0, len(tokens) - seqlen - 1)
        windows.append(tokens[start : start + seqlen])
    return torch.tensor(windows)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_those_that_the_released_pruning_code_draws(seed, bos):
    documents = [words(i, count=1 + i % 5) for i in range(30)]
    tokenizer = byte_tokenizer(bos=bos)
    windows = calibration.draw_windows(documents, settings(seed=seed, num_samples=20), tokenizer)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, drawn_as_released(documents, 20, 16, seed, tokenizer))


def test_documents_that_are_too_short_are_drawn_from_but_never_used():
    documents = ["short"] * 50 + ["a text that is long enough"]
    windows = calibration.draw_windows(documents, settings(), byte_tokenizer())
    assert all(byte_tokenizer().decode(window) in documents[-1] for window in windows)


def test_text_that_is_too_short_everywhere_is_refused_with_both_counts():
    with pytest.raises(
        ValueError, match=r"none.txt is too short.* has 16 tokens, and more than 16 .*Lower calib"
    ) as refused:
        calibration.draw_windows(["x" * 16, "y" * 3], settings(), byte_tokenizer())
    assert "\n" not in str(refused.value)


def test_a_local_file_gives_windows_of_its_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(0))
    windows = calibration.calibration_windows(settings(path=str(file)), byte_tokenizer())
    assert windows.shape == (6, 16)
    assert all(byte_tokenizer().decode(window) in words(0) for window in windows)


def test_embedded_windows_come_from_the_calibration_part_alone(tmp_path):
    embedded_data_in_cache([], [words(100 * i) for i in range(20)], tmp_path)
    windows = calibration.calibration_windows(settings(dataset="embedded"), byte_tokenizer())
    text = "\n\n".join(calibration.passages("calibration"))
    assert all(byte_tokenizer().decode(window) in text for window in windows)


def test_windows_are_read_from_the_cache_the_second_time(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text(words(0))
    first = calibration.calibration_windows(settings(path=str(file)), byte_tokenizer())
    monkeypatch.setattr(calibration, "draw_windows", lambda *_: pytest.fail("drawn again"))
    assert torch.equal(calibration.calibration_windows(settings(path=str(file)), byte_tokenizer()), first)
    assert [entry.suffix for entry in (tmp_path / "cache" / "tokens").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("change", ["seed", "num_samples", "seqlen", "text", "tokenizer"])
def test_windows_are_drawn_anew_when_anything_that_decides_them_changes(tmp_path, change):
    file = tmp_path / "text.txt"
    file.write_text(words(0))
    calibration.calibration_windows(settings(path=str(file)), byte_tokenizer())
    if change == "text":
        file.write_text(words(1))
    changed = {change: 7} if change in ("seed", "num_samples", "seqlen") else {}
    tokenizer = byte_tokenizer(bos=change == "tokenizer")
    calibration.calibration_windows(settings(path=str(file), **changed), tokenizer)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_reported_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "file"))
    text = tmp_path / "text.txt"
    text.write_text(words(0))
    with pytest.raises(ValueError, match=r"cannot write to the cache .*Set DROTATOR_CACHE"):
        calibration.calibration_windows(settings(path=str(text)), byte_tokenizer())


def test_provenance_names_the_text_and_how_it_was_drawn():
    described = calibration.provenance(settings(dataset="c4", num_samples=128, seqlen=2048))
    assert described["calibration_text"] == "allenai/c4 en/c4-train.00000-of-01024.json.gz"
    assert (described["dataset"], described["calibration_samples"], described["calibration_seqlen"]) == (
        "c4",
        128,
        2048,
    )
    assert calibration.provenance(settings(path="my.txt"))["calibration_text"] == "my.txt"
