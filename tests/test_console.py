"""Progress and log lines, with and without a terminal."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.logging import RichHandler

from drotator import console
from drotator.console import LINES_PER_STAGE, clock, console_handler, progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Make the process believe in a terminal of 80 columns and return what is drawn on it."""
    screen = io.StringIO()
    fake = Console(file=screen, force_terminal=True, width=80, color_system=None, _environ={"TERM": "xterm"})
    monkeypatch.setattr(console, "console", lambda: fake)
    return screen


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger with the console's handler, taken off afterwards."""
    logger = logging.getLogger("drotator.test")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield logger
    logger.handlers.clear()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "drotator.console"]


@pytest.mark.parametrize("total", [21, 30, 80, 1000])
def test_a_long_stage_logs_about_twenty_lines_and_the_last(caplog: pytest.LogCaptureFixture, total: int) -> None:
    with caplog.at_level(logging.INFO, "drotator"), progress("perplexity", total) as advance:
        for _ in range(total):
            advance("")
    lines = messages(caplog)
    assert 15 <= len(lines) <= LINES_PER_STAGE + 1
    assert lines[-1].startswith(f"perplexity: {total}/{total}, ")


def test_a_short_stage_logs_every_unit_with_time_left_and_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "drotator"), progress("prune", 2) as advance:
        advance("layer 0: 0.41 -> 0.22")
        advance("")
    assert messages(caplog) == ["prune: 1/2, 0s, 0s left; layer 0: 0.41 -> 0.22", "prune: 2/2, 0s"]
    assert not any(getattr(record, "file_only", False) for record in caplog.records)


def test_a_stage_without_units_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "drotator"), progress("prune", 0):
        pass
    assert messages(caplog) == []


def test_a_terminal_shows_one_live_line_and_the_file_gets_the_rest(
    terminal: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "drotator"), progress("rotate and prune", 3) as advance:
        for layer in range(3):
            advance(f"layer {layer}: 0.41 -> 0.22, and much more than fits in the line")
            console._lives[0].refresh()
    drawn = terminal.getvalue()
    assert "rotate and prune" in drawn and "2/3" in drawn and "layer 1: 0.41" in drawn
    assert max(len(line) for line in drawn.replace("\r", "\n").splitlines()) <= 90  # 80 and a cursor code
    assert [getattr(record, "file_only", False) for record in caplog.records] == [True, True, False]


def test_stages_may_be_nested_and_fail_on_a_terminal(terminal: io.StringIO) -> None:
    def fail() -> None:
        with progress("layers", 2) as outer:
            with progress("steps", 1) as inner:
                inner("")
                console._lives[0].refresh()
            outer("")
            raise RuntimeError("not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        fail()
    assert "steps" in terminal.getvalue()
    assert console._lives == []


def test_without_a_terminal_lines_are_plain_and_follow_stdout(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.addHandler(console_handler())
    logger.warning("no GPU")
    assert capsys.readouterr().out.endswith(" WARNING no GPU\n")
    replaced = io.StringIO()
    before, sys.stdout = sys.stdout, replaced
    try:
        logger.info("later")
    finally:
        sys.stdout = before
    assert replaced.getvalue().endswith(" INFO later\n")


def test_on_a_terminal_lines_come_from_rich(terminal: io.StringIO, logger: logging.Logger) -> None:
    handler = console_handler()
    assert isinstance(handler, RichHandler)
    logger.addHandler(handler)
    logger.info("[not markup] 3 of 4")
    assert "[not markup] 3 of 4" in terminal.getvalue()


def test_the_console_leaves_tracebacks_and_library_warnings_to_the_file(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in console.QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    handler = console_handler()
    logger.addHandler(handler)
    logger.error("with a traceback", extra={"file_only": True})
    captured = logging.getLogger("py.warnings")
    captured.addHandler(handler)
    try:
        console.quiet_libraries()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)
            logging.captureWarnings(True)
            warnings.warn("deprecated", stacklevel=1)
    finally:
        logging.captureWarnings(False)
        captured.removeHandler(handler)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (187, "3m07s"), (3599.7, "1h00m"), (7500, "2h05m")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert clock(seconds) == text
