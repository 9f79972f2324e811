"""Token windows for calibration, drawn as the pruning papers draw them and kept in a cache.

A window is a random cut of a random document that has more than seqlen tokens, drawn with replacement. C4 has many
documents; WikiText-2, a user's file and the embedded passages are one document each.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drotator.config import CalibrationConfig
from drotator.fetch import cache_dir
from drotator.texts import (
    C4,
    C4_FILES,
    PASSAGES,
    WIKITEXT,
    c4_documents,
    encode,
    local_text,
    passages,
    tokenizer_fingerprint,
    wikitext2,
)

TEXTS = {
    "c4": f"{C4} {C4_FILES['train']}",
    "wikitext2": f"{WIKITEXT} wikitext-2-raw-v1 train",
    "embedded": f"{PASSAGES}, calibration part",
}
DRAWING = 1  # raise it when the same text, tokenizer and settings would give other windows than before


def calibration_windows(settings: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Draw the calibration windows, or take them from the cache.

    Returns: (num_samples, seqlen) int64.
    Raises: ValueError if the text is out of reach or too short.
    """
    if settings.dataset == "c4":
        documents, origin = c4_documents("train")
    else:
        documents = [_text(settings)]
        origin = hashlib.sha256(documents[0].encode()).hexdigest()
    key = {
        "drawing": DRAWING,
        "origin": origin,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **{name: getattr(settings, name) for name in ("dataset", "num_samples", "seqlen", "seed")},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = (
        cache_dir()
        / "tokens"
        / f"{settings.dataset}-{settings.num_samples}x{settings.seqlen}-{digest[:16]}.safetensors"
    )
    if file.is_file():
        return load_file(file)["windows"]
    windows = draw_windows(documents, settings, tokenizer)
    _write(file, windows)
    return windows


def draw_windows(documents: Sequence[str], settings: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Draw settings.num_samples windows of settings.seqlen tokens from documents, tokenising only what is drawn.

    With the seed of the released SparseGPT and Wanda code, the numbers drawn, and so the windows, are theirs.

    Returns: (num_samples, seqlen) int64.
    Raises: ValueError if no document has more than seqlen tokens.
    """
    draw = random.Random(settings.seed)
    long: dict[int, list[int]] = {}
    short: set[int] = set()
    windows: list[list[int]] = []
    while len(windows) < settings.num_samples:
        index = draw.randint(0, len(documents) - 1)
        if index in short:
            continue
        if index not in long:
            text = documents[index]
            # No document has more tokens than bytes: most that are too short need no tokenizer.
            tokens = encode(text, tokenizer) if len(text.encode()) >= settings.seqlen else []
            if len(tokens) <= settings.seqlen:
                short.add(index)
                if len(short) == len(documents):
                    raise _too_short(documents, settings, tokenizer)
                continue
            long[index] = tokens
        start = draw.randint(0, len(long[index]) - settings.seqlen - 1)
        windows.append(long[index][start : start + settings.seqlen])
    return torch.tensor(windows, dtype=torch.int64)


def provenance(settings: CalibrationConfig) -> dict[str, object]:
    """What report.json says of the calibration text."""
    return {
        "dataset": settings.dataset,
        "calibration_text": TEXTS.get(settings.dataset, settings.path),
        "calibration_samples": settings.num_samples,
        "calibration_seqlen": settings.seqlen,
        "calibration_seed": settings.seed,
    }


def _text(settings: CalibrationConfig) -> str:
    if settings.dataset == "wikitext2":
        return wikitext2("train")
    if settings.dataset == "local":
        return local_text(settings.path)
    return "\n\n".join(passages("calibration"))


def _too_short(documents: Sequence[str], settings: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> ValueError:
    longest = len(encode(max(documents, key=len), tokenizer))
    where = settings.path if settings.dataset == "local" else settings.dataset
    return ValueError(
        f"calibration text {where} is too short: its longest document has {longest} tokens, and more than "
        f"{settings.seqlen} are needed. Lower calibration.seqlen or give more text."
    )


def _write(file: Path, windows: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=file.parent) as folder:
            save_file({"windows": windows}, Path(folder) / file.name)
            os.replace(Path(folder) / file.name, file)
    except OSError as error:
        raise ValueError(
            f"cannot write to the cache {file.parent} ({error.strerror}). Set DROTATOR_CACHE to another folder."
        ) from error
