"""Scores of importances, with their gradients in closed form: no graph is kept over a layer's large weights.

Importances are held as S^T, (d_in, d_out): the inputs, which masks group, lie in the slow dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
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
    score: of the importances; None: the rotated weight itself is wanted.
    writes: whether W^T becomes W^T R1, of a linear that writes into the residual stream, or R1^T W^T, of a reader.
    by_input: whether the score looks at each input alone, so that parts are made of inputs; otherwise of outputs.
    """

    W: Tensor
    score: Score | None
    writes: bool = False
    by_input: bool = False


@dataclass(frozen=True)
class Columns:
    """The columns of R1, outputs of what writes, that are looked at: in `part`, every `batches`-th from `batch` on.

    part: None: all. batch: (1,) int64 on the device; None: all columns in the part.
    """

    part: slice | None = None
    batches: int = 1
    batch: Tensor | None = None

    def of(self, R: Tensor) -> Tensor:
        own = R if self.part is None else R[:, self.part]
        if self.batch is None:
            return own
        return own.unflatten(1, (-1, self.batches)).index_select(2, self.batch).squeeze(2)

    def spread(self, G: Tensor, size: int) -> Tensor:
        """Put columns where `of` found them among `size`, with zeros elsewhere."""
        if self.batch is not None:
            numbers = torch.arange(self.batches, device=G.device)
            G = torch.where(numbers == self.batch, G.unsqueeze(2), 0).flatten(1)
        if self.part is None:
            return G
        whole = G.new_zeros(len(G), size)
        whole[:, self.part] = G
        return whole


ALL_COLUMNS = Columns()


class _Rotated(torch.autograd.Function):
    """The gradients are made with the value, part by part; those by R, of which each is as large as R, are added up in
    one pass at the end."""

    @staticmethod
    def forward(
        ctx: Any, R: Tensor, columns: Columns, weights: Sequence[RotatedWeight], *energies: Tensor | None
    ) -> tuple[Tensor, ...]:
        low = R.to(weights[0].W.dtype)
        of_writers, total, rotated = columns.of(low), R.new_zeros(()), []
        ctx.columns, ctx.gradients, ctx.of_energies, ctx.multiplied = columns, [], [], []
        for weight, energy in zip(weights, energies, strict=True):
            rotation = of_writers if weight.writes else low
            if weight.score is None:
                rotated.append(weight.W @ rotation if weight.writes else rotation.mT @ weight.W)
                ctx.multiplied.append(weight)
                ctx.of_energies.append(None)
            else:
                value, G, of_energy = _score_of_parts(rotation, energy, weight, weight.score)
                total += value
                ctx.gradients.append((weight.writes, G))
                ctx.of_energies.append(None if energy is None else of_energy)
        return total, *rotated

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_rotated: Tensor) -> tuple[Tensor | None, ...]:
        products = []
        for weight, D in zip(ctx.multiplied, of_rotated, strict=True):
            G = product(weight.W, D) if weight.writes else product(weight.W.mT, D.mT)
            products.append((weight.writes, G))
        G = fused(_added_up, products[0][1] if products else ctx.gradients[0][1])(
            grad, ctx.gradients, products, ctx.columns
        )
        wanted = ctx.needs_input_grad[3:]
        of_energies = (
            found * grad if is_wanted and found is not None else None
            for found, is_wanted in zip(ctx.of_energies, wanted, strict=True)
        )
        return G, None, None, *of_energies


def _score_of_parts(
    rotation: Tensor, energy: Tensor | None, weight: RotatedWeight, score: Score
) -> tuple[Tensor, Tensor, Tensor]:
    """Score a rotated weight, part by part. Returns: the score, its gradients by the rotation and by the energy."""
    W, wide = weight.W, torch.promote_types(rotation.dtype, torch.float32)
    num_inputs, num_outputs = len(W), rotation.shape[1] if weight.writes else W.shape[1]
    total = torch.zeros((), dtype=wide, device=W.device)
    of_energy = torch.zeros(num_inputs, dtype=wide, device=W.device)
    num_parts = math.ceil(num_inputs * num_outputs / PART)
    G = None if num_parts == 1 else torch.zeros(rotation.shape, dtype=wide, device=W.device)
    whole = torch.arange(num_inputs if weight.by_input else num_outputs)
    for part in whole.tensor_split(num_parts) if num_parts else ():
        span = slice(int(part[0]), int(part[-1]) + 1)
        rows, columns = (span, slice(None)) if weight.by_input else (slice(None), span)
        T = W[rows] @ rotation[:, columns] if weight.writes else rotation.mT[rows] @ W[:, columns]
        value, D, found = fused(_score_part, T)(T, None if energy is None else energy[rows], score)
        total += value
        of_energy[rows] += found
        of_part = product(W[rows], D) if weight.writes else product(W[:, columns].mT, D.mT)
        if G is None:
            return total, of_part, of_energy
        G[:, columns if weight.writes else rows] += of_part
    assert G is not None
    return total, G, of_energy


def _added_up(
    grad: Tensor,
    of_scores: Sequence[tuple[bool, Tensor]],
    of_products: Sequence[tuple[bool, Tensor]],
    columns: Columns,
) -> Tensor:
    """Gradients by R and by its columns (True), those of the scores times what follows from the score, in one sum."""
    size = len((*of_scores, *of_products)[0][1])
    terms = [(is_part, G * grad) for is_part, G in of_scores] + list(of_products)
    return reduce(torch.add, [columns.spread(G, size) if is_part else G for is_part, G in terms])


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


def rotated_scores(
    R: Tensor,
    energies: Sequence[Tensor | None],
    weights: Sequence[RotatedWeight],
    columns: Columns = ALL_COLUMNS,
) -> tuple[Tensor, ...]:
    """The sum of the scores of some weights' importances T^2 * energy, with T the rotated weight. Differentiable.

    Args:
        R: (d, d) float32 or float64; energies: (d_in,) of each weight's inputs, or None.
        weights: of one dtype. columns: those of R with which the weights that write are multiplied.
    Returns: the sum, (), and T, (d_in, d_out), of each weight that has no score, in the weights' dtype.
    """
    found: tuple[Tensor, ...] = _Rotated.apply(R, columns, weights, *energies)
    return found
