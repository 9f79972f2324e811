"""Keep the progress bars and log lines of datasets, transformers and lm-eval off the screen while they work for us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

LIBRARIES = ("datasets", "transformers", "lm_eval", "huggingface_hub", "httpx", "httpx2", "fsspec", "filelock")

_original = tqdm.__init__


def _hidden(bar: Any, *args: Any, **kwargs: Any) -> None:
    _original(bar, *args, **{**kwargs, "disable": True})


class _Silence:
    """What is silent as long as any thread wants it so."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.num_inside = 0
        self.levels: dict[str, int] = {}

    def enter(self) -> None:
        with self.lock:
            self.num_inside += 1
            if self.num_inside == 1:
                self.levels = {name: logging.getLogger(name).level for name in LIBRARIES}
                for name in LIBRARIES:
                    logging.getLogger(name).setLevel(logging.ERROR)
                tqdm.__init__ = _hidden

    def leave(self) -> None:
        with self.lock:
            self.num_inside -= 1
            if self.num_inside == 0:
                tqdm.__init__ = _original
                for name, level in self.levels.items():
                    logging.getLogger(name).setLevel(level)


_silence = _Silence()


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Hide bars, and log records below ERROR, of LIBRARIES; all is as before when the last thread has left.

    The three libraries switch their bars in three ways, and lm-eval not at all; tqdm is what they have in common.
    """
    _silence.enter()
    try:
        yield
    finally:
        _silence.leave()
