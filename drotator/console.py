"""What a person sees while a command works: log lines and one live progress line, or plain lines without a terminal.

Everything goes to stdout through one console, so that lines and bars do not break each other; stderr is kept for the
last word of a command that failed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

LINES_PER_STAGE = 20
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}

log = logging.getLogger(__name__)


@cache
def console() -> Console:
    """Return the one console of this process; it writes to whatever sys.stdout is at that moment."""
    return Console(soft_wrap=False, highlight=False)


def is_live() -> bool:
    """Say whether stdout is a terminal that can redraw a line."""
    return console().is_terminal and not console().is_dumb_terminal


def file_only(record: logging.LogRecord) -> bool:
    """Keep from the console what only log.txt should hold: tracebacks, and warnings that libraries give themselves."""
    return not getattr(record, "file_only", False) and record.name != "py.warnings"


class _PlainHandler(logging.StreamHandler):
    """Write to the sys.stdout of the moment; the default handler keeps the one it was made with."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def console_handler() -> logging.Handler:
    """Make the handler that configs/hydra/*_logging name: rich on a terminal, plain text elsewhere."""
    handler: logging.Handler
    if is_live():
        handler = RichHandler(console=console(), show_path=False, log_time_format="%H:%M:%S", omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = _PlainHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    handler.addFilter(file_only)
    return handler


def quiet_libraries() -> None:
    """Send warnings of libraries to the log and keep their progress bars from ours. Call before they are imported."""
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk is reported once by the run, not at every line of its log
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def log_to_console() -> None:
    """Set up logging for a command that Hydra does not start."""
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, handlers=[console_handler()], force=True)
    logging.getLogger("drotator").setLevel(logging.INFO)


def clock(seconds: float) -> str:
    """Write a duration as 42s, 3m07s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


_lives: list[Progress] = []
"""The live display, while an outer stage shows one."""


def _new_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=console(),
        expand=True,
        transient=True,
    )


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show how far a stage is: one live line on a terminal, about twenty log lines at most elsewhere.

    The log lines are in log.txt in both cases; a terminal keeps the last. Stages may be nested: the inner one is shown
    below the outer one.

    Args:
        description: what is done, "rotate and prune".
        total: units of work, >= 0.
    Yields: advance(note): one unit is done; the note is shown beside it ("" for none).
    """
    start = time.monotonic()
    done = 0
    is_outer = not _lives
    if is_outer and is_live():
        _lives.append(_new_progress())
        _lives[0].start()
    live = _lives[0] if _lives else None
    task = live.add_task(description, total=total, note="") if live else None

    def advance(note: str = "") -> None:
        nonlocal done
        done += 1
        if live and task is not None:
            live.update(task, advance=1, note=note)
        if done * LINES_PER_STAGE // max(total, 1) > (done - 1) * LINES_PER_STAGE // max(total, 1) or done == total:
            elapsed = time.monotonic() - start
            left = f", {clock(elapsed / done * (total - done))} left" if done < total else ""
            line = f"{description}: {done}/{total}, {clock(elapsed)}{left}{'; ' if note else ''}{note}"
            log.info(line, extra={"file_only": live is not None and not (is_outer and done == total)})

    try:
        yield advance
    finally:
        if live and task is not None:
            live.remove_task(task)
        if is_outer and live:
            live.stop()
            _lives.clear()
