"""CUDA graphs: an objective's few hundred small kernels are launched at once instead of one by one."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from drotator.objectives import ObjectiveWithGradients

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 3


def captured(objective: ObjectiveWithGradients, R1: Tensor, R2: Tensor) -> ObjectiveWithGradients:
    """Return the objective as a replayed CUDA graph, or as it is on the CPU or where it cannot be captured.

    Args:
        R1, R2: rotations of the shapes, dtype and device it will be called with.
    """
    if R1.device.type != "cuda":
        return objective
    inputs = (R1.clone(), R2.clone())
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream(R1.device)
        stream.wait_stream(torch.cuda.current_stream(R1.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                objective(*inputs)
        torch.cuda.current_stream(R1.device).wait_stream(stream)
        with torch.cuda.graph(graph):
            outputs = objective(*inputs)
    except RuntimeError as error:
        logger.info("the objective runs without a CUDA graph (%s)", str(error).splitlines()[0])
        return objective

    def replay(R1: Tensor, R2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs[0].copy_(R1)
        inputs[1].copy_(R2)
        graph.replay()
        loss, G1, G2 = outputs
        return loss.clone(), G1.clone(), G2.clone()

    return replay
