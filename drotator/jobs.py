"""One job: settings in, a stage called in its run folder, and a failure told in one line wherever the job ran.

Hydra swallows what a job of a sweep raises until the end, shows only the first, and leaves the job's own log empty.
Here a job never raises: it logs, leaves `failed.txt` in its folder when it belongs to a sweep, and lets the others run.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from drotator.composition import BEHAVIOUR, MAY_CALL, Plan, from_hydra
from drotator.config import Resumable
from drotator.console import quiet_libraries
from drotator.processes import is_first_to_fail
from drotator.usage import config_folder
from drotator.verbs import VERBS

log = logging.getLogger(__name__)

FAILED = "failed.txt"
LINE_LENGTH = 500


@dataclass(frozen=True)
class Failure:
    """What the person at the command line is told, and with which exit code."""

    line: str
    exit_code: int


_failures: list[Failure] = []
"""Failures of this process's jobs that stand in no file."""


def failure_of(error: BaseException, run_dir: Path | None = None) -> Failure:
    """Put an exception in one line: 2 for what a user gave (ValueError, OSError), 1 for what a run met."""
    text = " ".join(str(error).split())
    if "No space left on device" in text:  # safetensors and torch have exceptions of their own for it
        where = f" while writing in {run_dir}. Make room, then go on with resume={run_dir}." if run_dir else "."
        return Failure(f"no space left on the disk{where}", 2)
    if "gloo/transport" in text and "by peer" in text:
        return Failure("another process of this run has ended without a word: was it killed, for memory perhaps?", 1)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    if not isinstance(error, ValueError | OSError) and type(error) is not RuntimeError:
        text = f"{type(error).__name__}: {text}"
    if len(text) > LINE_LENGTH:
        text = text[:LINE_LENGTH] + " ..."
    return Failure(text or type(error).__name__, 2 if isinstance(error, ValueError | OSError) else 1)


def run_job(cfg: DictConfig) -> float:
    """Carry out one job that Hydra has composed. Returns the number that a sweep would minimise, nan if it failed."""
    hydra_config = HydraConfig.get()
    verb = VERBS[str(hydra_config.job.name)]
    run_dir = Path(hydra_config.runtime.output_dir)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    quiet_libraries()
    try:
        if is_sweep:
            (run_dir / FAILED).unlink(missing_ok=True)
        settings = from_hydra(cfg, verb.settings)
        if is_sweep and isinstance(settings, Resumable):
            has_started = (run_dir / "config.yaml").is_file()
            settings.resume = str(run_dir) if has_started else ""
        result = verb.stage(settings, run_dir, is_sweep)
        return math.nan if result is None else result
    except Exception as error:
        failure = failure_of(error, run_dir)
        if is_first_to_fail():
            log.error("%s", failure.line, exc_info=True, extra={"file_only": True})
        if is_sweep:
            log.error("job %s failed: %s", hydra_config.job.num, failure.line)
            swept = str(hydra_config.job.override_dirname).replace("'", "")
            failure = Failure(f"job {hydra_config.job.num}{f' ({swept})' if swept else ''}: {failure.line}", 1)
        elif failure.exit_code == 1:
            failure = Failure(f"{failure.line} (traceback: {run_dir / 'log.txt'})", 1)
        _keep(failure, run_dir if is_sweep else None)
        if os.environ.get("DROTATOR_TRACEBACK") == "1":
            traceback.print_exc()
        return math.nan


def _keep(failure: Failure, folder: Path | None) -> None:
    """Leave the line where the process that started the sweep finds it; in memory if there is no file for it."""
    try:
        if folder is None:
            raise FileNotFoundError
        temporary = folder / f".{FAILED}.tmp"
        temporary.write_text(failure.line + "\n", encoding="utf-8")
        os.replace(temporary, folder / FAILED)
    except OSError:
        _failures.append(failure)


def launch(verb: str, plan: Plan) -> list[Failure]:
    """Hand a checked command line to Hydra and collect what failed, in the order of the jobs."""
    _failures.clear()
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["drotator", *plan.words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints what it meets and exits by itself
    start = hydra.main(config_path=str(config_folder()), config_name=verb, **BEHAVIOUR, **MAY_CALL)
    try:
        start(run_job)()
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[1]
    written = sorted(plan.folder.glob(f"*/{FAILED}"), key=_job_number) if plan.is_sweep and plan.folder else []
    return [Failure(path.read_text(encoding="utf-8").strip(), 1) for path in written] + _failures


def _job_number(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return (int(name), "") if name.isdigit() else (sys.maxsize, name)
