"""The dense model's metrics, measured once for a model and an evaluation and then read from the cache."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from drotator import evaluation
from drotator.architecture import ModelSource
from drotator.artifacts import versions
from drotator.config import EvalConfig, describe
from drotator.fetch import cache_dir
from drotator.folders import write_text
from drotator.resources import device_name
from drotator.results import Metrics

logger = logging.getLogger(__name__)

DECISIVE_PACKAGES = ("torch", "transformers", "datasets", "lm-eval")


def dense_metrics(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, settings: EvalConfig, *, seed: int, device: torch.device
) -> Metrics:
    """Evaluate the dense model, or read what an earlier run measured with the same files, settings and versions."""
    if not settings.perplexity and not settings.tasks:
        return {}
    evaluation.prepare(settings, tokenizer)
    cached = cache_dir() / "dense" / f"{_key(source, tokenizer, settings, seed, device)}.json"
    cached.parent.mkdir(parents=True, exist_ok=True)
    with cached.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the jobs of a sweep that start together, one measures and the others wait
        if (known := _read(cached)) is not None:
            logger.info("dense metrics: measured before (%s)", cached)
            return known
        metrics = evaluation.evaluate_checkpoint(
            source.folder, tokenizer, settings, seed=seed, device=device, dtype=source.dtype_name
        )
        write_text(cached, json.dumps(metrics))
    return metrics


def _read(cached: Path) -> Metrics | None:
    """Metrics of an earlier run; None if there are none, or what is there is damaged and has to be measured again."""
    try:
        return dict(json.loads(cached.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _key(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, settings: EvalConfig, seed: int, device: torch.device
) -> str:
    stats = {path: path.stat() for path in sorted(set(source.files.values()))}
    found = versions()
    parts = {
        "files": [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()],
        "eval": describe(settings),
        "provenance": evaluation.provenance(settings, tokenizer),
        "seed": seed,
        "dtype": str(source.dtype),
        "device": device_name(device),
        "versions": {package: found.get(package) for package in DECISIVE_PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
