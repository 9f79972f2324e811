"""The command `drotator`: which command is meant, what failed, and the exit code.

0: done. 1: a run met something, or a job of a sweep failed. 2: what was typed or given cannot work. 130: interrupted.
Whatever fails ends in one line on stderr; its traceback is in log.txt, and on stderr too with DROTATOR_TRACEBACK=1.
Of several processes that torchrun or srun started, the first to fail tells.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from drotator import __version__, processes, usage
from drotator.config import Resumable
from drotator.verbs import REPORT, REPORT_SUMMARY, VERBS

if TYPE_CHECKING:
    from drotator.composition import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line (default: sys.argv) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        os.environ["DROTATOR_TRACEBACK"] = "1"
    exit_code = _carry_out(words)
    processes.leave(exit_code)
    return exit_code


def _carry_out(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _end("interrupted.", 130)
    except Exception as error:  # noqa: BLE001 - told in one line; its traceback is one variable away
        if os.environ.get("DROTATOR_TRACEBACK") == "1":
            traceback.print_exc()
        from drotator.jobs import failure_of

        failure = failure_of(error)
        return _end(failure.line, failure.exit_code)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        return _say(usage.general_help())
    if words[0] == "--version":
        return _say(f"drotator {__version__}\n")
    verb, rest = words[0], words[1:]
    if verb == REPORT:
        return _report(rest)
    if verb not in VERBS:
        raise ValueError(_no_such_verb(verb))
    if "-h" in rest or "--help" in rest:
        return _say(usage.verb_help(verb))
    return _run(verb, rest)


def _run(verb: str, words: list[str]) -> int:
    from drotator import composition, jobs

    if processes.place().size > 1:
        plan = processes.join().share(lambda: _plan_together(verb, words))
    else:
        plan = composition.plan(verb, words)
    try:
        failures = jobs.launch(verb, plan)
    except KeyboardInterrupt:
        if not issubclass(VERBS[verb].settings, Resumable) or plan.folder is None or not plan.has_started:
            raise
        return _end(f"interrupted. Go on with: {composition.command_line(verb, words, plan.folder)}", 130)
    for failure in failures:
        _end(failure.line, failure.exit_code)
    return min((failure.exit_code for failure in failures), default=0)


def _plan_together(verb: str, words: list[str]) -> Plan:
    """Check, for all processes, a command that they carry out together."""
    from drotator import composition

    count = processes.place().size
    if not VERBS[verb].is_divisible:
        raise ValueError(f"{verb} is the work of one process, but {count} were started: leave torchrun or srun out.")
    plan = composition.plan(verb, words)
    if plan.is_sweep:
        raise ValueError(f"{count} processes share one run: start each job of a sweep by itself, or leave them out.")
    return plan


def _no_such_verb(word: str) -> str:
    if "=" in word or word.startswith("-"):
        return f"the command comes first: drotator prune {word}. Commands: {', '.join([*VERBS, REPORT])}."
    close = difflib.get_close_matches(word, [*VERBS, REPORT], 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"there is no command '{word}'.{meant} Choose from {', '.join([*VERBS, REPORT])}."


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. Usage: drotator report RUN... [--output FILE]")


def _report(words: list[str]) -> int:
    parser = _OneLineParser(prog="drotator report", description=f"Make {REPORT_SUMMARY}.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, sweep folders or their parents")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the table to this file too")
    if "-h" in words or "--help" in words:
        return _say(parser.format_help())
    arguments = parser.parse_args(words)
    from drotator.comparison import report_command
    from drotator.console import log_to_console

    log_to_console()
    report_command(arguments.runs, arguments.output)
    return 0


def _say(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _end(line: str, exit_code: int) -> int:
    if processes.is_first_to_fail():
        sys.stderr.write(f"drotator: {line}\n")
    return exit_code
