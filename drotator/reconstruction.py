"""Block reconstruction: the weights that survived pruning are tuned so that the layer puts out what it did before.

Layer-wise pruning corrects every linear by itself. Here the whole layer, with its softmax and its gate, is the model of
the error, and with the dense model's outputs as the target a layer also makes up for what those before it got wrong.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from drotator.architecture import LayerSpec, hidden_states, linear
from drotator.config import ReconstructConfig
from drotator.resources import float32_products
from drotator.statistics import ActivationStream, rotated

WARM_UP = 0.05  # part of the steps over which the learning rate rises
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Reconstruction:
    """Mean over tokens of |y - target|^2 / |target|^2, on the calibration text: before and after."""

    before: float
    after: float


def reconstruct_layer(
    layer: nn.Module,
    spec: LayerSpec,
    stream: ActivationStream,
    index: int,
    R1: Tensor | None,
    settings: ReconstructConfig,
    seed: int,
) -> Reconstruction:
    """Tune the weights of the layer's pruned linears that are not zero, in place, against `stream.dense`.

    Adam on float32 copies with a cosine schedule. Every token counts by its relative error, as the norms downstream
    see it: some tokens of language models are a thousand times larger than the others. Zeros stay +0.0. If the error
    did not fall, or is not finite, the layer is left as it was. Every step is made of one batch of the whole set, of
    which each process has a part: their gradients are added up.

    Args:
        layer: pruned, in the basis of R1; its inputs are those of `stream`.
    Raises: RuntimeError if the error is not finite.
    """
    modules = {f"{name}.weight": linear(layer, name) for name in spec.linears}
    masks = {name: module.weight != 0 for name, module in modules.items()}
    weights = {name: module.weight.to(torch.float32, copy=True).requires_grad_() for name, module in modules.items()}
    optimizer = torch.optim.Adam(list(weights.values()), lr=settings.learning_rate, betas=BETAS)
    num_batches = len(stream.counts)
    num_steps = settings.epochs * num_batches
    draw = random.Random(seed)
    before = mean_error(layer, stream, index, R1)
    for step in range(num_steps):
        if step % num_batches == 0:
            order = draw.sample(range(num_batches), num_batches)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, num_steps)
        gradients = own_gradients(layer, stream, index, R1, order[step % num_batches], weights)
        for weight, gradient, mask in zip(weights.values(), gradients, masks.values(), strict=True):
            weight.grad = torch.where(mask, stream.world.all_reduce_(gradient.contiguous()), 0)
        optimizer.step()
    pruned = {name: module.weight.clone() for name, module in modules.items()}
    with torch.no_grad():
        for name, module in modules.items():
            module.weight.copy_(torch.where(masks[name], weights[name], 0))
    after = mean_error(layer, stream, index, R1)
    if not after < before:  # nan too
        with torch.no_grad():
            for name, module in modules.items():
                module.weight.copy_(pruned[name])
    if not math.isfinite(after):
        raise RuntimeError(
            f"Layer {index}: the error of its reconstruction is {after}. Lower reconstruct.learning_rate."
        )
    return Reconstruction(before, min(before, after))


def own_gradients(
    layer: nn.Module, stream: ActivationStream, index: int, R1: Tensor | None, batch: int, weights: dict[str, Tensor]
) -> Sequence[Tensor]:
    """Gradients of a whole batch's error by the weights, as far as they come from this process's part of it."""
    position = stream.position(batch)
    if position is None:
        return [torch.zeros_like(weight) for weight in weights.values()]
    # On a GPU a float32 layer computes in bfloat16 too: what it is tuned by is far above rounding.
    with (
        torch.enable_grad(),
        torch.autocast(stream.device.type, torch.bfloat16, enabled=stream.device.type == "cuda"),
    ):
        cast = {name: weight.to(layer.get_parameter(name).dtype) for name, weight in weights.items()}
        loss = stream.share(position) * batch_error(layer, stream, index, R1, position, cast)
        return torch.autograd.grad(loss, list(weights.values()))


def batch_error(
    layer: nn.Module, stream: ActivationStream, index: int, R1: Tensor | None, batch: int, weights: dict[str, Tensor]
) -> Tensor:
    """Relative error of the layer's output on one batch, (), float32; `weights` stand in for the layer's own."""
    assert stream.dense is not None
    hidden, target = (rotated(part[batch], R1) for part in (stream.hidden, stream.dense))
    output = hidden_states(functional_call(layer, weights, (hidden,), stream.arguments(hidden, index)))
    error = (output.float() - target.float()).square().sum(-1)
    return (error / target.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


@torch.no_grad()
def mean_error(layer: nn.Module, stream: ActivationStream, index: int, R1: Tensor | None) -> float:
    """`batch_error` over all batches, each by its number of windows."""
    total = torch.zeros((), device=stream.device)
    with float32_products("high"):
        for batch, part in enumerate(stream.parts):
            total += part.num_windows * batch_error(layer, stream, index, R1, batch, {})
    return float(stream.world.all_reduce_(total) / sum(stream.counts))


def schedule(step: int, num_steps: int) -> float:
    """Part of the learning rate: a linear rise, then a cosine to 0."""
    rise = max(1, round(WARM_UP * num_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, num_steps - rise)))
