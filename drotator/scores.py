"""Scores of importances, with their gradients in closed form.

Importances S, (d, n), lie as the rotation makes weights, R1^T X: the rows of S are inputs of a linear that reads the
residual stream, and outputs of one that writes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from drotator import entropy_kernel
from drotator.config import SparsityConfig
from drotator.graphs import fused
from drotator.products import GRADIENT8


@dataclass(frozen=True)
class Score:
    """A function of importances S, (d, n) >= 0, in two passes over them, of which neither keeps anything of their size.

    summary: S -> the score, (); the unit, (); and marks, which are small beside S.
    slope: (S, *marks) -> the derivative by every entry over the unit, of S's dtype. In that unit slopes are of order
        one, so that 8 bits hold what is made of them.
    """

    summary: Callable[[Tensor], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
    slope: Callable[..., Tensor]


@cache
def entropy_along(dim: int) -> Score:
    """Entropies E_i of S normalised along `dim`, summed; dE_i/dS_ij = -(log p_ij + E_i) / Z_i.

    As log p = log S - log Z, sums of S and of S log S give both. Autograd would meet log 0 where a weight is exactly
    zero; S log S -> 0 there, and so must its gradient.
    Source: DenoiseRotator, eq. 5.
    """
    return Score(partial(entropies, dim=dim), entropy_slope)


def entropies(S: Tensor, dim: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The summary of `entropy_along`. Marks: the mean of log S as p weighs it, and 1 / Z over the unit."""
    return _entropies_of_sums(S.sum(dim, keepdim=True), (S * _log(S)).sum(dim, keepdim=True))


def _entropies_of_sums(Z: Tensor, of_logs: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    is_empty = Z == 0  # nothing but zeros: no entropy and no gradient
    over_Z = torch.where(is_empty, 0, 1 / Z)
    unit = over_Z.mean().clamp_min(torch.finfo(Z.dtype).tiny)
    mean_log = of_logs * over_Z
    return (Z.masked_fill(is_empty, 1).log() - mean_log).sum(), unit, (mean_log, over_Z / unit)


def entropy_slope(S: Tensor, mean_log: Tensor, scale: Tensor) -> Tensor:
    return (mean_log - _log(S)) * scale


def entropies_along_both(S: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The summary of `ENTROPY_ALONG_BOTH`, in the unit of the first. Marks: those of both."""
    value, unit, marks = entropies(S, 0)
    other, other_unit, (mean_log, scale) = entropies(S, 1)
    return value + other, unit, (*marks, mean_log, scale * (other_unit / unit))


def entropy_slope_along_both(S: Tensor, *marks: Tensor) -> Tensor:
    return entropy_slope(S, *marks[:2]) + entropy_slope(S, *marks[2:])


ENTROPY_ALONG_BOTH = Score(entropies_along_both, entropy_slope_along_both)
"""The sum of `entropy_along` both dimensions, whose slopes then take one pass."""


def _log(S: Tensor) -> Tensor:
    return S.clamp_min(torch.finfo(S.dtype).tiny).log()


def removal(sparsity: SparsityConfig, dim: int) -> Score:
    """Sum of what a mask chosen by S removes of every group, or of every output; the slope is 1 where it removes.

    Args:
        dim: the dimension of S along which the inputs lie.
    """
    return _removal(sparsity.ratio, sparsity.keep, sparsity.group, dim)


@cache  # a compiled kernel is one for each function
def _removal(ratio: float, keep: int, group: int, dim: int) -> Score:
    sparsity = SparsityConfig(ratio=ratio, keep=keep, group=group)
    return Score(partial(removed, sparsity=sparsity, dim=dim), partial(removal_slope, sparsity=sparsity, dim=dim))


def removed(S: Tensor, sparsity: SparsityConfig, dim: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The summary of `removal`. Mark: the largest importance that each group, or output, loses."""
    one = S.new_ones(())
    if sparsity.is_grouped:
        groups, at = S.unflatten(dim, (-1, sparsity.group)), dim + 1
        if (sparsity.keep, sparsity.group) == (2, 4):
            total, threshold = _two_smallest_of_four(groups, at)
        else:
            smallest = groups.topk(sparsity.group - sparsity.keep, dim=at, largest=False).values
            total, threshold = smallest.sum(), smallest.select(at, -1)
        return total, one, (threshold.unsqueeze(at),)
    count = round(sparsity.ratio * S.shape[dim])
    if count == 0:
        return S.new_zeros(()), one, (torch.full_like(S.narrow(dim, 0, 1), -1),)
    threshold = S.kthvalue(count, dim=dim, keepdim=True).values
    is_below = threshold > S
    num_at_threshold = count - is_below.sum(dim, keepdim=True)  # of equal ones as many go as the mask removes
    return torch.where(is_below, S, 0).sum() + (threshold * num_at_threshold).sum(), one, (threshold,)


def removal_slope(S: Tensor, threshold: Tensor, sparsity: SparsityConfig, dim: int) -> Tensor:
    if not sparsity.is_grouped:
        return (threshold >= S).to(S.dtype)
    return (threshold >= S.unflatten(dim, (-1, sparsity.group))).to(S.dtype).flatten(dim, dim + 1)


def _two_smallest_of_four(groups: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sum of the two smallest of four along `dim`, and the larger of each two: a sorting network beats topk."""
    a, b, c, d = groups.unbind(dim)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
    second = torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))
    return (torch.minimum(low, low2) + second).sum(-1).sum(), second  # rows first: one pass with what follows


Vector = Tensor | None


def _importances(T: Tensor, scale: Vector, strength: Vector, counts: Vector) -> tuple[Tensor, Tensor]:
    """scale T in float32 or float64, and S = (scale T)^2 * strength * counts; counts are along columns, else rows."""
    T = T.to(torch.promote_types(T.dtype, torch.float32))
    if scale is not None:
        T = T * scale[:, None]
    S = T.square()
    if strength is not None:
        S = S * strength[:, None]
    return T, S if counts is None else S * counts


def summed(
    T: Tensor, scale: Vector, strength: Vector, counts: Vector, summary: Callable[..., Any]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The summary of a score of the importances."""
    found: tuple[Tensor, Tensor, tuple[Tensor, ...]] = summary(_importances(T, scale, strength, counts)[1])
    return found


def sloped(
    T: Tensor,
    scale: Vector,
    strength: Vector,
    counts: Vector,
    unit: Tensor,
    marks: Sequence[Tensor],
    slope: Callable[..., Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """D in `dtype` and a factor of each row, which together are a score's gradient by scale T; its own by strength."""
    T, S = _importances(T, scale, strength, counts)
    D = T * slope(S, *marks)
    if counts is not None:
        D = D * counts
    if dtype == GRADIENT8:  # a column that all but misses the strongest row can have a slope of n units
        D = _limited(D, torch.finfo(dtype).max)
    by_strength, by_row = _factors_of_rows((D * T).sum(1), unit, strength)
    return D.to(dtype), by_strength, by_row


def _factors_of_rows(of_rows: Tensor, unit: Tensor, strength: Vector) -> tuple[Tensor, Tensor]:
    by_strength = of_rows * unit
    return by_strength, 2 * unit * (torch.ones_like(by_strength) if strength is None else strength)


def _limited(A: Tensor, size: float) -> Tensor:
    """A.clamp(-size, size), which as a compiled kernel asks every number whether it is one."""
    A = torch.where(size < A, size, A)
    return torch.where(-size > A, -size, A)


def two_passes(
    T: Tensor, scale: Vector, strength: Vector, counts: Vector, score: Score, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The score of the importances, and what `sloped` returns, by kernels of its own where there are some."""
    is_for_kernel = counts is None and score is entropy_along(0)
    if scale is not None and is_for_kernel and entropy_kernel.is_available(T, strength):
        value, unit, (mean_log, weight) = fused(_entropies_of_parts, T)(entropy_kernel.sums(T, scale, strength))
        D, of_rows = entropy_kernel.slopes(T, scale, strength, mean_log, weight)
        return value, D, *fused(_factors_of_parts, T)(of_rows, unit, strength)
    value, unit, marks = fused(summed, T)(T, scale, strength, counts, score.summary)
    return value, *fused(sloped, T)(T, scale, strength, counts, unit, marks, score.slope, dtype)


def _entropies_of_parts(sums: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    return _entropies_of_sums(*sums.sum(1))


def _factors_of_parts(of_rows: Tensor, unit: Tensor, strength: Vector) -> tuple[Tensor, Tensor]:
    return _factors_of_rows(of_rows.sum(0), unit, strength)


class _Scored(torch.autograd.Function):
    """The gradient by T is made when its factor is known: another pass over it would take as long as the score."""

    @staticmethod
    def forward(ctx: Any, T: Tensor, energy: Tensor | None, dim: int, score: Score) -> Tensor:
        strength, counts = (energy, None) if dim == 0 else (None, energy)
        value, unit, marks = fused(summed, T)(T, None, strength, counts, score.summary)
        ctx.save_for_backward(T, energy, unit, *marks)
        ctx.dim, ctx.slope = dim, score.slope
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        T, energy, unit, *marks = ctx.saved_tensors
        of_T, of_energy = fused(_sloped_whole, T)(T, energy, ctx.dim, unit * grad, marks, ctx.slope)
        return of_T, of_energy if ctx.needs_input_grad[1] else None, None, None


def _sloped_whole(
    T: Tensor, energy: Tensor | None, dim: int, unit: Tensor, marks: Sequence[Tensor], slope: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of a score of T^2 * energy by T, in T's dtype, and by energy."""
    wide = T.to(torch.promote_types(T.dtype, torch.float32))
    S, along = wide.square(), None if energy is None else energy.unsqueeze(1 - dim)
    by_importance = slope(S if along is None else S * along, *marks) * unit
    D = 2 * wide * by_importance
    return (D if along is None else D * along).to(T.dtype), (S * by_importance).sum(1 - dim)


def importance_score(T: Tensor, energy: Tensor | None, score: Score, dim: int = 0) -> Tensor:
    """The score of the importances T^2 * energy. Differentiable by both.

    Args:
        T: (d, n), times the root of what each output counts. energy: of the inputs, which lie along `dim`, or None.
    """
    value: Tensor = _Scored.apply(T, energy, dim, score)
    return value
