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

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 3
COMPILED = 2**24
"""Elements from which on the work on a matrix on a GPU is worth the seconds that compiling takes."""
KERNELS = 64
"""Compiled forms of one function that are kept: one for each shape, objective and optimizer's setting of a sweep."""

Function = TypeVar("Function", bound=Callable[..., object])


def fused(function: Function, matrix: Tensor) -> Function:
    """Return `function`, compiled where it works on such a matrix on a GPU and the matrix is large."""
    return _compiled(function) if matrix.is_cuda and matrix.numel() >= COMPILED else function


@cache
def _compiled(function: Function) -> Function:
    dynamo.recompile_limit = max(dynamo.recompile_limit, KERNELS)
    compiled: Any = torch.compile(function, dynamic=False)
    return compiled


def captured(step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """Return `step` as a replayed CUDA graph, or as it is on the CPU or where it cannot be captured.

    Args:
        step: reads and writes tensors that stay where they are, and never waits for the device.
        state: the tensors that `step` changes; they are as before when this returns.
    """
    if state[0].device.type != "cuda":
        return step
    saved = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    run: Callable[[], None] = graph.replay
    try:
        stream = torch.cuda.Stream(state[0].device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                step()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        logger.info("it runs without a CUDA graph (%s)", str(error).splitlines()[0])
        run = step
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    return run
