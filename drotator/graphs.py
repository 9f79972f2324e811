"""Fewer kernels: what is elementwise in large matrices is compiled, and those of an optimization step are launched at
once, as a CUDA graph, instead of one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._dynamo import config as dynamo

from drotator.distributed import ALONE, World

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 2
COMPILED = 2**22
"""Elements from which on the work on a matrix on a GPU is worth the seconds that compiling takes."""
KERNELS = 64
"""Compiled forms of one function that are kept: one for each shape, objective and optimizer's setting of a sweep."""

Function = TypeVar("Function", bound=Callable[..., object])


def fused(function: Function, matrix: Tensor, size: int = 0) -> Function:
    """Return `function`, compiled where it works on such a matrix, or on matrices of that size, on a GPU and that is
    large."""
    return _compiled(function) if matrix.is_cuda and max(matrix.numel(), size) >= COMPILED else function


@cache
def _compiled(function: Function) -> Function:
    dynamo.recompile_limit = max(dynamo.recompile_limit, KERNELS)
    compiled: Any = torch.compile(function, dynamic=False)
    return compiled


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A stream of its own for each purpose, always the same: each holds memory that others cannot use."""
    return torch.cuda.Stream(device)


def side_by_side(first: Callable[[], None], second: Callable[[], None], device: torch.device) -> None:
    """Make two calls that do not need each other's results. On a GPU the second, of many small kernels, runs beside the
    large ones of the first; what follows waits for both."""
    if device.type != "cuda":
        first()
        second()
        return
    current, beside = torch.cuda.current_stream(device), _stream(device, "beside")
    beside.wait_stream(current)
    first()
    with torch.cuda.stream(beside):
        second()
    current.wait_stream(beside)


def captured(step: Callable[[], None], state: Sequence[Tensor], world: World = ALONE) -> Callable[[], None]:
    """Return `step` as a replayed CUDA graph, or as it is on the CPU or where it cannot be captured.

    Args:
        step: reads and writes tensors that stay where they are, and never waits for the device.
        state: the tensors that `step` changes; they are as before when this returns.
        world: the processes that take this step together: all replay it, or none does. A step that is being captured
            sends nothing, so that one of them may fail there; one that fails before leaves the others waiting.
    Raises: RuntimeError if the step itself fails where several processes take it.
    """
    if state[0].device.type != "cuda":
        return step
    saved = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    mode = "global" if world.size == 1 else "thread_local"  # a thread of NCCL's asks how far its streams are
    failure, is_warm = "", False
    try:
        stream = _stream(state[0].device, "capture")
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                step()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        is_warm = True
        with torch.cuda.graph(graph, capture_error_mode=mode):
            step()
    except RuntimeError as error:
        if world.size > 1 and not is_warm:
            raise
        failure = str(error).splitlines()[0]
    failures = [found for found in world.gather(failure) if found]
    if failures:
        logger.info("it runs without a CUDA graph (%s)", failures[0])
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    return step if failures else graph.replay
