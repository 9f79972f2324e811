"""One R1 for a run of neighbouring layers: their problems are gathered first, then visited in every step of training.

Problems stay on the device while they fit a share of its memory; the others lie in files and are read when their turn
comes, so that memory does not grow with the number of layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from drotator.architecture import LayerSizes
from drotator.artifacts import save_tensors
from drotator.config import PruneConfig
from drotator.distributed import ALONE, World
from drotator.objectives import LayerProblem, Objective
from drotator.pruning import objective_of
from drotator.resources import memory_of

DEVICE_SHARE = 0.25
"""Part of the device's memory that may be filled with the problems of layers."""


class ProblemStore(Sequence[Objective]):
    """The objectives of a run of layers, in order; those that do not fit in memory are made anew at every access.

    world: each of its processes has the whole problems, and its terms of the objectives.
    """

    def __init__(
        self, folder: Path, settings: PruneConfig, sizes: LayerSizes, device: torch.device, world: World = ALONE
    ) -> None:
        self.folder, self.settings, self.sizes, self.device, self.world = folder, settings, sizes, device, world
        self.budget = DEVICE_SHARE * memory_of(device)
        self.resident: dict[int, tuple[LayerProblem, Objective]] = {}
        self.length = 0
        self.products: torch.dtype | None = None

    def append(self, problem: LayerProblem) -> None:
        """Keep a layer's problem, in memory or as a file. All have the same dtype of products."""
        self.products = problem.products
        needed = 2 * sum(tensor.nbytes for tensor in tensors_of(problem).values())  # the objective keeps a copy of most
        if needed <= self.budget:
            self.budget -= needed
            self.resident[self.length] = (problem, objective_of(problem, self.settings, self.world))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.file(self.length), tensors_of(problem), {})
        self.length += 1

    @property
    def is_resident(self) -> bool:
        return len(self.resident) == self.length

    def problem(self, position: int) -> LayerProblem:
        if position in self.resident:
            return self.resident[position][0]
        return problem_of(load_file(self.file(position), str(self.device)), self.sizes, self.products)

    def __getitem__(self, position: int) -> Objective:  # type: ignore[override]
        if not 0 <= position < self.length:
            raise IndexError(position)
        if position in self.resident:
            return self.resident[position][1]
        return objective_of(self.problem(position), self.settings, self.world)

    def __len__(self) -> int:
        return self.length

    def file(self, position: int) -> Path:
        return self.folder / f"{position:03d}.safetensors"

    def clear(self) -> None:
        self.resident.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


PARTS = ("weights", "hessians", "sensitivities")


def tensors_of(problem: LayerProblem) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(problem, part).items()}


def problem_of(tensors: dict[str, Tensor], sizes: LayerSizes, products: torch.dtype | None) -> LayerProblem:
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    return LayerProblem(parts["weights"], parts["hessians"], sizes, parts["sensitivities"], products)
