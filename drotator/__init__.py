"""Learn orthogonal rotations that concentrate a language model's importance, merge them, and prune it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "FAMILIES": "architecture",
    "PRUNERS": "pruners",
    "PruneConfig": "config",
    "RunReport": "results",
    "evaluate": "evaluation",
    "load_checkpoint": "checkpoint",
    "load_sparse24": "sparse24",
    "run_prune": "pipeline",
}

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604 - the names below are found by __getattr__


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `drotator --help` needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'drotator' has no attribute '{name}'")
    return getattr(import_module(f"drotator.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
