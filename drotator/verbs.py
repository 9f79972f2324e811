"""The commands: what each is called, which settings it takes and which function carries it out.

A command is one entry of VERBS and a YAML of its name under configs/. The functions import what they need when they are
called: help, composition and every refusal stay free of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drotator.config import (
    BenchConfig,
    CheckConfig,
    EvalCommandConfig,
    ExportConfig,
    FetchConfig,
    PruneConfig,
    RecoverCommandConfig,
)


def has_baseline(settings: PruneConfig, is_sweep: bool) -> bool:
    """Say whether the unrotated model is pruned too: a sweep has its own, and without rotation there is no other."""
    if settings.rotation.name == "none" or settings.pruner.name == "none":
        return False
    return settings.baseline == "always" or (settings.baseline == "auto" and not is_sweep)


def _prune(settings: PruneConfig, run_dir: Path, is_sweep: bool) -> float:
    from drotator.pipeline import run_prune

    return run_prune(settings, run_dir, baseline=has_baseline(settings, is_sweep))


def _eval(settings: EvalCommandConfig, run_dir: Path, is_sweep: bool) -> float:
    from drotator.commands import run_eval

    return run_eval(settings, run_dir)


def _check(settings: CheckConfig, run_dir: Path, is_sweep: bool) -> float:
    from drotator.check import run_check

    return run_check(settings, run_dir)


def _bench(settings: BenchConfig, run_dir: Path, is_sweep: bool) -> float:
    from drotator.benchmark import run_bench

    return run_bench(settings, run_dir)


def _fetch(settings: FetchConfig, run_dir: Path, is_sweep: bool) -> None:
    from drotator.fetch import fetch_all

    fetch_all(settings)


def _export(settings: ExportConfig, run_dir: Path, is_sweep: bool) -> None:
    from drotator.commands import run_export

    run_export(settings)


def _recover(settings: RecoverCommandConfig, run_dir: Path, is_sweep: bool) -> float:
    from drotator.recover import run_recover

    return run_recover(settings, run_dir)


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command.

    settings: the schema that configs/VERB.yaml composes.
    stage: (settings, run folder, is this a job of a sweep?) -> the number that a sweep would minimise.
    is_divisible: whether several processes can share the work.
    """

    summary: str
    settings: type
    stage: Callable[[Any, Path, bool], float | None]
    examples: tuple[str, ...]
    is_divisible: bool = False


VERBS: dict[str, Verb] = {
    "prune": Verb(
        summary="the main job: calibrate, learn rotations, merge, prune, evaluate, report",
        settings=PruneConfig,
        stage=_prune,
        examples=(
            "drotator prune model=llama3-8b pruner=sparsegpt sparsity=2of4",
            "drotator prune model=local model.path=FOLDER sparsity.ratio=0.55",
            "drotator prune -m pruner=wanda,sparsegpt rotation=none,per_layer",
            "drotator prune +experiment=paper model=llama3-8b",
            "drotator prune model=llama3-8b resume=RUN",
        ),
        is_divisible=True,
    ),
    "eval": Verb(
        summary="perplexity and zero-shot accuracy of any checkpoint, dense or pruned",
        settings=EvalCommandConfig,
        stage=_eval,
        examples=("drotator eval model.path=RUN/checkpoint", "drotator eval model=llama3-8b eval=quick"),
    ),
    "recover": Verb(
        summary="LoRA fine-tuning of a pruned checkpoint that keeps its mask",
        settings=RecoverCommandConfig,
        stage=_recover,
        examples=(
            "drotator recover model.path=RUN/checkpoint",
            "drotator recover model.path=RUN/checkpoint recover.masked=false",
            "drotator recover model.path=RUN/checkpoint resume=RUN",
        ),
    ),
    "export": Verb(
        summary="a 2:4 checkpoint in compressed files: only the kept weights and their places",
        settings=ExportConfig,
        stage=_export,
        examples=(
            "drotator export model.path=RUN/checkpoint format=sparse24",
            "drotator export model.path=RUN/checkpoint output=FOLDER overwrite=true",
        ),
    ),
    "check": Verb(
        summary="logits before and after merging rotations in your model",
        settings=CheckConfig,
        stage=_check,
        examples=("drotator check", "drotator check model=local model.path=FOLDER"),
    ),
    "bench": Verb(
        summary="time and memory of every part at a model's real shapes, with random weights: needs no hub",
        settings=BenchConfig,
        stage=_bench,
        examples=(
            "drotator bench model=llama3-8b",
            "drotator bench model=llama3-70b bench.paper=true",
            "drotator bench kind=inference model=llama3-8b bench.decode=[1,64]",
        ),
        is_divisible=True,
    ),
    "fetch": Verb(
        summary="bring a model and data sets into the local cache, to go offline",
        settings=FetchConfig,
        stage=_fetch,
        examples=("drotator fetch", "drotator fetch model=llama3-8b calibration=wikitext2 eval=perplexity"),
    ),
}

REPORT = "report"
REPORT_SUMMARY = "one table and the plots over one or many runs and sweeps"
