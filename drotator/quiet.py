"""Keep the progress bars and log lines of datasets, transformers and lm-eval off the screen while they work for us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

LIBRARIES = ("datasets", "transformers", "lm_eval", "huggingface_hub", "httpx", "httpx2", "fsspec", "filelock")


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Hide bars, and log records below ERROR, of LIBRARIES; everything is as before on leaving.

    The three libraries switch their bars in three ways, and lm-eval not at all; tqdm is what they have in common.
    """
    loggers = {name: logging.getLogger(name) for name in LIBRARIES}
    levels = {name: logger.level for name, logger in loggers.items()}
    original = tqdm.__init__

    def hidden(bar: Any, *args: Any, **kwargs: Any) -> None:
        original(bar, *args, **{**kwargs, "disable": True})

    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = original
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
