"""A kernel is used where it compiles, and where it does not the run goes on with a warning."""

from __future__ import annotations

import logging
from types import ModuleType

import pytest
import torch
from torch import Tensor

from drotator import entropy_kernel, symmetric_kernel
from drotator.pruners import sweep_kernel


@pytest.mark.parametrize(
    ("kernel", "launches", "otherwise"),
    [
        (sweep_kernel, "sweep_block", "SparseGPT takes many times as long"),
        (symmetric_kernel, "multiply", "products take twice as long"),
        (entropy_kernel, "sums", "steps of the entropy take longer"),
    ],
    ids=["sweep", "symmetric", "entropy"],
)
def test_a_machine_where_triton_cannot_compile_goes_on_with_a_warning(
    kernel: ModuleType,
    launches: str,
    otherwise: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernel, launches, fail)
    with caplog.at_level(logging.WARNING, logger="drotator"):
        assert not kernel._runs_on.__wrapped__(torch.device("cpu"))
    message = f"Triton does not work on cpu, so {otherwise}: Failed to find C compiler."
    assert caplog.messages == [message]
