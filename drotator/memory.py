"""How much memory a run takes, told and weighed against what there is before it starts.

d = hidden_size, m = intermediate_size, o = num_attention_heads h. All numbers are bytes. What each stage of a layer
holds was counted from the tensors that live in it; tests/test_memory.py counts them again.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from dataclasses import dataclass

import torch

from drotator.architecture import LAYERS, LayerSizes, ModelSource
from drotator.config import PruneConfig
from drotator.distributed import ALONE, World
from drotator.offload import LEVELS
from drotator.resources import free_memory
from drotator.rotated_scores import PART
from drotator.statistics import MOMENT_ROWS

MARGIN = 1.05
WORKSPACE = 500_000_000
"""What the libraries of a GPU take beside tensors, and the process beside them on the host."""
LEARNING = 14
"""Float32 matrices of the size of R1 that live in a step: of the optimizer, the gradients, the best iterate, value and
output."""
SCORING = {True: 4, False: 6}
"""Likewise of the size of the part of the weights that is scored at once, in compiled passes over 16 bits or not."""
PRUNING = {"magnitude": (1, 5, 8), "wanda": (1, 5, 8), "sparsegpt": (3, 5, 10), "admm": (7, 9, 16), "none": (1, 5, 6)}
"""Float32 matrices of the size of H and of the weight that live while a pruner works, H and weight too; of the weight
when two that read the same inputs are pruned together."""
SOLVING = (2, 12, 17)
"""The same of `solve_on_mask`, which works on one of the two."""


@dataclass(frozen=True)
class MemoryNeeds:
    """What a run takes.

    stages: of the device, a layer in each of its stages, beside the activations. activations: the whole calibration
    set's. pinned: the same in pinned host memory, where each batch takes a power of two. reading: of host memory, a
    layer on its way from and to the disk.
    """

    stages: dict[str, int]
    activations: int
    pinned: int
    reading: int

    @property
    def layer(self) -> int:
        return max(self.stages.values())

    @property
    def largest_stage(self) -> str:
        return max(self.stages, key=lambda stage: self.stages[stage])


def memory_needs(
    settings: PruneConfig,
    sizes: LayerSizes,
    *,
    layer_parameters: int,
    vocab_size: int,
    itemsize: int,
    is_gpu: bool = True,
) -> MemoryNeeds:
    """Estimate what the run takes, by the model's shape and the settings alone.

    Args:
        itemsize: bytes of a weight as it is stored.
        is_gpu: weights stored in 16 bits are multiplied by R1 in 16 bits or 8, which a CPU does not do.
    """
    d, m, o = sizes.hidden_size, sizes.intermediate_size, sizes.input_size("output")
    calibration, is_rotated = settings.calibration, settings.rotation.name != "none"
    weights, copies = layer_parameters * itemsize, 4 * layer_parameters
    squares = 4 * (2 * d * d + o * o + m * m)
    largest = max(d, o, m)
    tokens = min(calibration.batch_size, calibration.num_samples) * calibration.seqlen
    forward = tokens * itemsize * (3 * m + 4 * d + 2 * o) + 4 * min(MOMENT_ROWS, largest) * largest
    graph = itemsize * (12 * m + 16 * d + 4 * o)  # of one token
    stages = {
        "embeddings": itemsize * (vocab_size * d + tokens * 2 * d),
        "statistics": weights + 4 * largest**2 + forward,
    }
    workers = (PRUNING[settings.pruner.name], SOLVING)[: 1 + bool(settings.pruner.solve_steps)]
    stages["pruning"] = weights + 4 * max(
        3 * d * d + max(squares_of_worker * largest**2 + one * m * d, squares_of_worker * d * d + two * m * d)
        for squares_of_worker, one, two in workers  # down alone, or gate and up
    )
    if is_rotated:
        dense = weights + copies + squares
        stages["statistics"] = dense + max(forward, calibration.seqlen * graph)
        is_rounded = itemsize == 2 and is_gpu
        product = 2 if is_rounded else 4  # of 8 bits there are two
        scored = product * layer_parameters + 4 * SCORING[is_rounded] * min(PART // product, 2 * m * d)
        stages["learning"] = dense + scored + 4 * LEARNING * d * d
        stages["merging"] = dense + 8 * (3 * m * d + 4 * d * d)
    if settings.reconstruct.name != "none":
        stages["reconstruction"] = 2 * weights + 6 * copies + tokens * graph
    streams = [d, o]  # hidden states and what attention made of them
    streams += [d] * (settings.reconstruct.name != "none")
    streams += [d] * (settings.rotation.name == "shared")  # which looks ahead
    return MemoryNeeds(
        stages={stage: round(MARGIN * value) + WORKSPACE for stage, value in stages.items()},
        activations=calibration.num_samples * calibration.seqlen * itemsize * sum(streams),
        pinned=math.ceil(calibration.num_samples / calibration.batch_size)
        * sum(1 << (tokens * itemsize * width - 1).bit_length() for width in streams),
        reading=2 * weights + WORKSPACE,
    )


def choose_level(needs: MemoryNeeds, free_device: int, free_host: int, *, is_shared: bool) -> str:
    """The first of LEVELS that fits; the last where none does.

    Args:
        is_shared: the device is the CPU, whose memory is the host's.
    """
    if is_shared:
        return "device" if needs.layer + needs.activations + needs.reading <= free_host else "disk"
    if needs.layer + needs.activations <= free_device:
        return "device"
    return level_off_device(needs, free_host)


def level_off_device(needs: MemoryNeeds, free_host: int) -> str:
    return "host" if needs.pinned + needs.reading <= free_host else "disk"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, what was free before it, and where its activations are kept at first, one of LEVELS."""

    needs: MemoryNeeds
    free_device: int
    free_host: int
    level: str

    @property
    def levels(self) -> tuple[str, ...]:
        """The level, then where the activations go if the device is full; it holds none with host or disk."""
        return ("device", level_off_device(self.needs, self.free_host)) if self.level == "device" else (self.level,)

    def __str__(self) -> str:
        needs = self.needs
        return (
            f"a layer takes {gigabytes(needs.layer)} of the device ({needs.largest_stage}) and the calibration set's "
            f"activations {gigabytes(needs.activations)}; free are {gigabytes(self.free_device)} of the device and "
            f"{gigabytes(self.free_host)} of host memory"
        )


def plan_memory(settings: PruneConfig, source: ModelSource, device: torch.device, world: World = ALONE) -> MemoryPlan:
    """Weigh what the run needs against what is free now.

    Of several processes each keeps its part of the activations, and has its part of the machine's memory; where one of
    them has no room, all keep theirs farther from the device.
    """
    layer = source.skeleton.get_submodule(f"{LAYERS}.0")
    needs = memory_needs(
        settings,
        source.sizes,
        layer_parameters=sum(tensor.numel() for tensor in layer.state_dict().values()),
        vocab_size=source.config.vocab_size,
        itemsize=source.dtype.itemsize,
        is_gpu=device.type == "cuda",
    )
    needs = dataclasses.replace(needs, activations=-(-needs.activations // world.size))
    neighbours = world.gather(platform.node()).count(platform.node())
    free_device, free_host = free_memory(device), free_memory(torch.device("cpu")) // neighbours
    level = settings.offload
    if level == "auto":
        level = choose_level(needs, free_device, free_host, is_shared=device.type == "cpu")
    return MemoryPlan(needs, free_device, free_host, max(world.gather(level), key=LEVELS.index))


def check_evaluation(model_bytes: int, device: torch.device) -> None:
    """Refuse an evaluation that cannot be: the whole model is read to host memory, and goes to the device from there.

    Raises: ValueError that says what to set.
    """
    for place in (device, torch.device("cpu")):
        if model_bytes > (free := free_memory(place)):
            raise ValueError(
                f"an evaluation holds the whole model, {gigabytes(model_bytes)}, but {gigabytes(free)} of the memory "
                f"of {place} are free. Prune with eval=none and measure with drotator eval on a larger machine."
            )


def gigabytes(value: int) -> str:
    return f"{value / 1e9:.1f} GB"
