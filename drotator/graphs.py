"""CUDA graphs: the few hundred small kernels of an optimization step are launched at once instead of one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 3


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
