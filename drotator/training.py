"""Learning the rotations of a layer: one loop for every objective and optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from drotator.config import OptimizerConfig
from drotator.distributed import ALONE, World
from drotator.graphs import WARM_UP_CALLS, captured, side_by_side
from drotator.objectives import ObjectiveWithGradients
from drotator.optimizers import OPTIMIZERS
from drotator.resources import float32_products
from drotator.rotation import Rotation

ORTHOGONALITY_LIMIT = 1e-3


@dataclass(frozen=True)
class TrainedRotation:
    """rotation: float32, the best iterate. history: the objective before every step and after the last.

    With several batches the objective of an iterate is the mean of what was last seen of each of them.
    """

    rotation: Rotation
    objective_before: float
    objective_after: float
    orthogonality: float
    history: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@torch.no_grad()
def train_rotation(
    objective: ObjectiveWithGradients,
    start: Rotation,
    settings: OptimizerConfig,
    *,
    learns: Sequence[bool] = (True, True),
    can_capture: bool = True,
    precision: str = "highest",
    world: World = ALONE,
) -> TrainedRotation:
    """Minimise the objective over R1 and R2 together, and keep the best iterate.

    Each step sees one of the objective's settings.batches, in turn.

    The best is chosen on the device and the history is read once at the end: the loop never waits for the device.

    Args:
        start: float32, on the device where the objective lives; steps are taken from there.
        learns: whether R1, and whether R2, is changed at all.
        can_capture: whether the objective does nothing but work on the device, so that a CUDA graph can replay it.
        precision: of float32 products while training; see `float32_products`. Where it is not the highest, products of
            which few digits matter are in bfloat16. What is returned is made orthogonal to
            float32 in any case.
        world: the processes that train together, to all of which the objective gives the same.
    Raises: RuntimeError if the objective is not finite at the start.
    """
    build, learning_rate = OPTIMIZERS[settings.name], settings.learning_rate
    products = torch.bfloat16 if precision != "highest" else None
    optimizers = [
        build(start.R1.float(), learning_rate, products=products),
        build(start.R2.float(), learning_rate, start.value_map, products),
    ]
    best = [optimizer.rotation().clone() for optimizer in optimizers]
    device = start.R1.device
    best_loss = torch.full((), torch.inf, device=device)
    # The warm-up of a CUDA graph takes steps too, and writes what they find.
    history = torch.full((max(settings.steps, WARM_UP_CALLS) + 1,), torch.nan, device=device)
    step = torch.zeros((1,), dtype=torch.int64, device=device)
    seen = torch.zeros(settings.batches, device=device)

    def evaluate(batch: Tensor) -> Sequence[Tensor]:
        """The gradients of a batch, whose value is kept."""
        found = [optimizer.rotation() for optimizer in optimizers]
        value, *gradients = objective(*found) if len(seen) == 1 else objective(*found, batch)
        seen.index_copy_(0, batch, value.float()[None])
        return gradients

    def take_step() -> None:
        rotations, gradients = [optimizer.rotation() for optimizer in optimizers], evaluate(step % len(seen))
        loss = seen.mean()
        history.index_copy_(0, step, loss[None])
        is_better = loss < best_loss
        best_loss.copy_(torch.where(is_better, loss, best_loss))
        for new, old in zip(rotations, best, strict=True):
            torch.where(is_better, new, old, out=old)
        progress = (step / max(settings.steps, 1)).squeeze()

        def update(number: int) -> None:
            if learns[number]:
                optimizers[number].update(gradients[number], progress)

        side_by_side(partial(update, 0), partial(update, 1), device)
        step.add_(1)

    with float32_products(precision):
        for batch in torch.arange(len(seen), device=device).split(1)[1:]:  # the first step sees batch 0
            evaluate(batch)
        if can_capture and all(optimizer.can_capture for optimizer in optimizers):
            kept = [tensor for optimizer in optimizers for tensor in optimizer.state]
            take_step = captured(take_step, [history, best_loss, step, seen, *best, *kept], world)
        for _ in range(settings.steps + 1):  # the last evaluates the last rotation; its update comes to nothing
            take_step()
    losses = history[: settings.steps + 1].tolist()
    if not math.isfinite(losses[0]):
        raise RuntimeError(f"the objective is not finite before the first step ({losses[0]})")
    rotation = Rotation(best[0], best[1], value_map=start.value_map)
    if precision != "highest":  # products in TF32 leave an error of 1e-3
        rotation = rotation.polished().to(dtype=torch.float32)
    orthogonality = rotation.orthogonality()
    return TrainedRotation(
        rotation=rotation,
        objective_before=losses[0],
        objective_after=float(best_loss),
        orthogonality=orthogonality,
        history=losses,
        warnings=watch(losses[0], float(best_loss), orthogonality, losses),
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
