"""Scores of importances, with their gradients in closed form: no graph is kept over a layer's large weights.

Importances are held as S^T, (d_in, d_out): the inputs, which masks group, lie in the slow dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from drotator.config import SparsityConfig
from drotator.graphs import fused
from drotator.resources import product

Score = Callable[[Tensor], tuple[Tensor, Tensor]]
"""S^T (d_in, d_out) >= 0 -> its score, (), and the slope of the score at every entry, of S's dtype."""

PART = 2**26
"""Weights that are rotated at once, which bounds the memory of their importances."""


def entropy_score(S: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Entropies E_i of S normalised along `dim`, summed; dE_i/dS_ij = -(log p_ij + E_i) / Z_i.

    Autograd would meet log 0 where a weight is exactly zero; S log S -> 0 there, and so must its gradient.
    Source: DenoiseRotator, eq. 5.
    """
    Z = S.sum(dim, keepdim=True)
    Z = Z.masked_fill(Z == 0, torch.inf)  # nothing but zeros: no entropy and no gradient
    log_p = (S / Z).clamp_min(torch.finfo(S.dtype).tiny).log()
    E = -(S * log_p).sum(dim, keepdim=True) / Z
    return E.sum(), -(log_p + E) / Z


def removed_score(S: Tensor, sparsity: SparsityConfig) -> tuple[Tensor, Tensor]:
    """Sum of what a mask chosen by S removes of every group, or of every output; the slope is 1 where it removes."""
    if sparsity.is_grouped:
        groups = S.unflatten(0, (-1, sparsity.group))
        if (sparsity.keep, sparsity.group) == (2, 4):
            total, threshold = _two_smallest_of_four(groups)
        else:
            smallest = groups.topk(sparsity.group - sparsity.keep, dim=1, largest=False).values
            total, threshold = smallest.sum(), smallest[:, -1]
        return total, (threshold[:, None] >= groups).to(S.dtype).flatten(0, 1)
    removed = round(sparsity.ratio * len(S))
    if removed == 0:
        return S.new_zeros(()), torch.zeros_like(S)
    threshold = S.kthvalue(removed, dim=0, keepdim=True).values
    is_below = threshold > S
    num_at_threshold = removed - is_below.sum(0)  # of equal importances an output loses as many as its mask removes
    return torch.where(is_below, S, 0).sum() + (threshold[0] * num_at_threshold).sum(), (threshold >= S).to(S.dtype)


def removal(sparsity: SparsityConfig) -> Score:
    """`removed_score` of a sparsity: one function for each, as a compiled kernel is one for each function."""
    return _removal(sparsity.ratio, sparsity.keep, sparsity.group)


@cache
def _removal(ratio: float, keep: int, group: int) -> Score:
    return partial(removed_score, sparsity=SparsityConfig(ratio=ratio, keep=keep, group=group))


@cache
def entropy_along(dim: int) -> Score:
    """`entropy_score` along `dim`, likewise."""
    return partial(entropy_score, dim=dim)


def _two_smallest_of_four(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the two smallest of (n, 4, m), and the larger of each two: a sorting network beats topk several times."""
    a, b, c, d = groups.unbind(1)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
    second = torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))
    return torch.minimum(low, low2).sum() + second.sum(), second


@dataclass(frozen=True)
class RotatedWeight:
    """A weight that one side of R1 acts on, and how its importances are scored.

    W: W^T (d_in, d_out) in the dtype of its products with R1, times the root of what each output counts.
    writes: whether W^T becomes W^T R1, of a linear that writes into the residual stream, or R1^T W^T, of a reader.
    by_input: whether the score looks at each input alone, so that parts are made of inputs; otherwise of outputs.
    """

    W: Tensor
    score: Score
    writes: bool = False
    by_input: bool = False


class _Rotated(torch.autograd.Function):
    """The gradients are made with the value, part by part, so that only those of R and of the energy are kept."""

    @staticmethod
    def forward(ctx: Any, R: Tensor, energy: Tensor | None, weight: RotatedWeight) -> Tensor:
        W, total = weight.W, R.new_zeros(())
        rotation, G = R.to(W.dtype), torch.zeros_like(R)
        of_energy = R.new_zeros(len(W))
        num_inputs, num_outputs = len(W), R.shape[1] if weight.writes else W.shape[1]
        num_parts = math.ceil(num_inputs * num_outputs / PART)
        whole = torch.arange(num_inputs if weight.by_input else num_outputs)
        for part in whole.tensor_split(num_parts) if num_parts else ():
            span = slice(int(part[0]), int(part[-1]) + 1)
            rows, columns = (span, slice(None)) if weight.by_input else (slice(None), span)
            T = W[rows] @ rotation[:, columns] if weight.writes else rotation[:, rows].mT @ W[:, columns]
            of_part = None if energy is None else energy[rows]
            value, D, found = fused(_score_part, T)(T, of_part, weight.score)
            total += value
            of_energy[rows] += found
            if weight.writes:
                G[:, columns] += product(W[rows], D)
            else:
                G[:, rows] += product(W[:, columns].mT, D.mT)
        ctx.save_for_backward(G, of_energy)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        G, of_energy = ctx.saved_tensors
        return G * grad, of_energy * grad if ctx.needs_input_grad[1] else None, None


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, T: Tensor, energy: Tensor | None, score: Score) -> Tensor:
        value, D, of_energy = fused(_score_part, T)(T, energy, score)
        ctx.save_for_backward(D, of_energy)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        D, of_energy = ctx.saved_tensors
        return D * grad.to(D.dtype), of_energy * grad if ctx.needs_input_grad[1] else None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, R: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return R.to(W.dtype).mT @ W

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        return product(W.mT, grad.mT), None


def _score_part(T: Tensor, energy: Tensor | None, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """Score T^2 * energy. Returns: the score, and its gradients by T, in T's dtype, and by energy."""
    T32 = T.to(torch.promote_types(T.dtype, torch.float32))
    S = T32.square()
    if energy is not None:
        S *= energy[:, None]
    value, slope = score(S)
    D = T32 * slope
    of_energy = (D * T32).sum(1)
    D *= 2 if energy is None else 2 * energy[:, None]
    return value, D.to(T.dtype), of_energy


def importance_score(T: Tensor, energy: Tensor | None, score: Score) -> Tensor:
    """The score of the importances T^2 * energy. Differentiable by both.

    Args:
        T: W^T (d_in, d_out), times the root of what each output counts. energy: (d_in,), of the inputs, or None.
    """
    value: Tensor = _Scored.apply(T, energy, score)
    return value


def rotated_weight(R: Tensor, W: Tensor) -> Tensor:
    """R^T W in W's dtype, for W (d, n) that does not change; differentiable by R, of which the gradient is float32."""
    T: Tensor = _Product.apply(R, W)
    return T


def rotated_score(R: Tensor, energy: Tensor | None, weight: RotatedWeight) -> Tensor:
    """The score of the importances T^2 * energy, with T the rotated weight. Differentiable by R and energy.

    Args:
        R: (d, d) float32 or float64; for a weight that writes, any columns of it: the outputs that are scored.
        energy: (d_in,), of the inputs, or None.
    """
    value: Tensor = _Rotated.apply(R, energy, weight)
    return value
