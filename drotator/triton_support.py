"""Triton, where there is one, and whether it works: torch for CPUs brings none, which is no error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

triton: Any = import_module("triton") if find_spec("triton") else None
tl: Any = import_module("triton.language") if triton else None

logger = logging.getLogger(__name__)

FAILURES = (
    ImportError,
    OSError,
    RuntimeError,
    SubprocessError,
    *([triton.runtime.errors.TritonError] if triton else []),
)


def descriptor(matrix: Tensor, tile: list[int]) -> Any:
    """What kernels load tiles of a matrix by, whose rows are contiguous. Triton before 3.3 has none: ImportError."""
    return import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor(matrix, tile)


def works(trial: Callable[[], object], device: torch.device, otherwise: str) -> bool:
    """Try a kernel: Triton compiles with a C compiler and Python's headers, which the node of a cluster may lack.

    Args:
        otherwise: what follows where it does not work, for the warning.
    """
    try:
        trial()
    except FAILURES as error:
        logger.warning("Triton does not work on %s, so %s: %s", device, otherwise, error)
        return False
    return True
