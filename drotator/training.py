"""Learning the rotations of a layer: one loop for every objective and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drotator.config import OptimizerConfig
from drotator.graphs import captured
from drotator.objectives import ObjectiveWithGradients
from drotator.optimizers import OPTIMIZERS
from drotator.rotation import Rotation

ORTHOGONALITY_LIMIT = 1e-3


@dataclass(frozen=True)
class TrainedRotation:
    """rotation: float32, the best iterate. history: the objective before every step and after the last."""

    rotation: Rotation
    objective_before: float
    objective_after: float
    orthogonality: float
    history: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@torch.no_grad()
def train_rotation(objective: ObjectiveWithGradients, start: Rotation, settings: OptimizerConfig) -> TrainedRotation:
    """Minimise the objective over R1 and R2 together, and keep the best iterate.

    The best is chosen on the device and the history is read once at the end: the loop never waits for the device.

    Args:
        start: float32, on the device where the objective lives; steps are taken from there.
    Raises: RuntimeError if the objective is not finite at the start.
    """
    groups = [OPTIMIZERS[settings.name](R.float(), settings.learning_rate) for R in (start.R1, start.R2)]
    best = [group.rotation() for group in groups]
    best_loss = torch.full((), torch.inf, device=start.R1.device)
    losses: list[Tensor] = []
    objective = captured(objective, *best)
    for step in range(settings.steps + 1):
        rotations = [group.rotation() for group in groups]
        loss, *gradients = objective(*rotations)
        losses.append(loss)
        is_better = loss < best_loss
        best_loss = torch.where(is_better, loss, best_loss)
        best = [torch.where(is_better, new, old) for new, old in zip(rotations, best, strict=True)]
        if step < settings.steps:
            for group, gradient in zip(groups, gradients, strict=True):
                group.update(gradient, step / settings.steps)
    history = torch.stack(losses).tolist()
    if not math.isfinite(history[0]):
        raise RuntimeError(f"the objective is not finite before the first step ({history[0]})")
    rotation = Rotation(*best)
    orthogonality = rotation.orthogonality()
    return TrainedRotation(
        rotation=rotation,
        objective_before=history[0],
        objective_after=float(best_loss),
        orthogonality=orthogonality,
        history=history,
        warnings=watch(history[0], float(best_loss), orthogonality, history),
    )


def watch(before: float, after: float, orthogonality: float, history: list[float]) -> list[str]:
    """Say what looks wrong in a training: drift from orthogonality, no fall of the objective, values not finite."""
    found = []
    if not orthogonality <= ORTHOGONALITY_LIMIT:
        found.append(f"|R^T R - I| reached {orthogonality:.2g}, above {ORTHOGONALITY_LIMIT:g}")
    if len(history) > 1 and not after < before:
        found.append(f"the objective did not fall ({before:.6g} -> {after:.6g})")
    if not all(map(math.isfinite, history)):
        found.append("the objective was not finite at some step")
    return found
