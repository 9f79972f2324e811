"""Commands on a finished checkpoint: `drotator eval` measures any, `drotator export` compresses a 2:4 one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from drotator import evaluation
from drotator.artifacts import versions
from drotator.checkpoint import check_checkpoint, read_metadata
from drotator.config import EvalCommandConfig, ExportConfig
from drotator.console import console
from drotator.fetch import load_tokenizer, resolve_model
from drotator.folders import write_text
from drotator.memory import check_evaluation
from drotator.resources import choose_device
from drotator.results import first_value
from drotator.sparse24 import export_sparse24
from drotator.summary import summary_table

logger = logging.getLogger(__name__)


def run_eval(settings: EvalCommandConfig, run_dir: Path) -> float:
    """Evaluate a checkpoint, print its table and write metrics.json to the run folder.

    Returns: the first perplexity, or minus the zero-shot mean, nan if nothing is measured.
    Raises: ValueError for a checkpoint that cannot be loaded or data that are missing, before the model is loaded.
    """
    device = choose_device(settings.device)
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = resolve_model(settings.model.path, settings.model.revision)
    size = sum(file.stat().st_size for file in check_checkpoint(folder))
    tokenizer = load_tokenizer(folder)
    evaluation.prepare(settings.eval, tokenizer)
    if settings.eval.perplexity or settings.eval.tasks:
        check_evaluation(size, device)
    metrics = evaluation.evaluate_checkpoint(
        folder, tokenizer, settings.eval, seed=settings.seed, device=device, dtype=settings.model.dtype
    )
    record = {
        "path": str(folder),
        "checkpoint": read_metadata(folder),
        "metrics": metrics,
        "versions": versions(),
        "provenance": evaluation.provenance(settings.eval, tokenizer),
    }
    write_text(run_dir / "metrics.json", json.dumps(record, indent=2, default=str) + "\n")
    console().print(summary_table({folder.name: metrics}))
    logger.info("written to %s", run_dir / "metrics.json")
    return first_value(settings.eval.perplexity, metrics)


def run_export(settings: ExportConfig) -> None:
    """Carry out `drotator export`. Raises: ValueError as `export_sparse24` does, and for a model that is no folder."""
    checkpoint = resolve_model(settings.model.path, settings.model.revision).resolve()
    if not settings.output and not Path(settings.model.path).expanduser().is_dir():
        raise ValueError(f"model.path={settings.model.path} is no folder to put an export beside: give output=FOLDER.")
    beside = checkpoint.with_name(f"{checkpoint.name}-{settings.format}")
    output = Path(settings.output).expanduser() if settings.output else beside
    sizes = export_sparse24(checkpoint, output, overwrite=settings.overwrite)
    logger.info("%s", sizes)
    logger.info("written to %s", output)
