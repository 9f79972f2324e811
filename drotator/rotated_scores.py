"""Scores of rotated weights as one node of the autograd graph, which keeps nothing of a layer's large weights.

d = hidden_size, n = the other side of a weight. T = R1^T X is the rotated weight, (d, n), with X = W^T of a linear that
reads the residual stream and W of one that writes into it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drotator.distributed import ALIGNED, ALONE, World
from drotator.graphs import fused
from drotator.products import (
    FLOAT8,
    GRADIENT8,
    Factor,
    Products,
    RoundedRotation,
    gradient_of_rotation,
    one_of,
    rotated,
    rounded_rotation,
    sixteen_bits,
)
from drotator.scores import Score, two_passes

PART = 2**29
"""Bytes of a rotated weight that are made at once, which bounds the memory of its importances."""


@dataclass(frozen=True)
class RotatedWeight:
    """A weight that one side of R1 acts on, and how its importances are scored.

    score: of the importances S = T^2 * counts * energies, rows multiplied by energies; None: T itself is wanted.
    energy: number of the energies among those given; None: all are 1.
    writes: whether the linear writes into the residual stream: the rows of T are then its outputs, else its inputs.
    by_column: whether the score looks at each column of T alone, so that parts are made of columns; otherwise of rows.
    """

    factor: Factor
    score: Score | None
    energy: int | None = None
    writes: bool = False
    by_column: bool = True


@dataclass(frozen=True)
class Moments:
    """Energies that R1 makes: diag(R1^T M R1) of a symmetric M, (d, d), or 1 over it. M in the dtype of products."""

    M: Tensor
    is_inverse: bool


class Rotated(NamedTuple):
    """score: (), the sum over the weights that have one. energies: as given, or (d,) made of Moments.

    weights: T (d', n) of each weight without a score.
    """

    score: Tensor
    energies: list[Tensor | None]
    weights: list[Tensor]


@dataclass(frozen=True)
class Columns:
    """The columns of R1, outputs of what writes, that are looked at: in `part`, every `batches`-th from `batch` on.

    part: None: all. batch: (1,) int64 on the device; None: all columns in the part.
    """

    part: slice | None = None
    batches: int = 1
    batch: Tensor | None = None

    def of(self, rotation: RoundedRotation) -> RoundedRotation:
        return RoundedRotation(*(None if rows is None else self._of_rows(rows) for rows in rotation))  # type: ignore[arg-type]

    def _of_rows(self, rows: Tensor) -> Tensor:
        own = rows if self.part is None else rows[self.part]
        return own if self.batch is None else one_of(own.unflatten(0, (-1, self.batches)), self.batch, 1)

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


@dataclass(frozen=True)
class _Setting:
    """What `rotated_scores` is given beside the tensors that it can be differentiated by; moments: None if there are
    energies, or none are wanted."""

    moments: Sequence[Moments | None]
    weights: Sequence[RotatedWeight]
    columns: Columns
    products: Products
    world: World
    unit: int


class _Rotated(torch.autograd.Function):
    """The gradients by R of all its uses are made with the values, or kept as factors; those by R, of which each is as
    large as R, are added up in one pass at the end."""

    @staticmethod
    def forward(ctx: Any, R: Tensor, setting: _Setting, *given: Tensor | None) -> tuple[Tensor, ...]:
        rounded = rounded_rotation(R, sixteen_bits(setting.products))
        coarse = rounded_rotation(R, setting.products) if setting.products == FLOAT8 else rounded
        made = [None if moments is None else _made(moments, rounded, setting) for moments in setting.moments]
        energies = [energy if of is None else of.energy for energy, of in zip(given, made, strict=True)]
        total, turned, gradients = R.new_zeros(()), [], []
        by_energy: list[Tensor | None] = [None] * len(energies)
        for weight in setting.weights:
            rotation = coarse if weight.factor.mirrored is not None else rounded
            rotation = setting.columns.of(rotation) if weight.writes else rotation
            if weight.score is None:
                turned.append(rotated(rotation, weight.factor))
                continue
            energy = None if weight.energy is None else energies[weight.energy]
            value, of_rotation, of_energy = _score_of_parts(rotation, energy, weight, weight.score)
            total += value
            gradients += [(weight.writes, *part) for part in of_rotation]
            if weight.energy is not None:
                by_energy[weight.energy] = _plus(by_energy[weight.energy], of_energy)
        ctx.setting, ctx.size, ctx.gradients, ctx.by_energy = setting, len(R), gradients, by_energy
        ctx.made = [None if of is None else _Made(of.energy.detach(), of.read) for of in made]  # no cycle through ctx
        return total, *(of.energy for of in made if of is not None), *turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        setting, world, rest = ctx.setting, ctx.setting.world, iter(grads)
        of_given: list[Tensor | None] = []
        of_moments = []
        wanted = ctx.needs_input_grad[2:]
        for moments, made, found, is_wanted in zip(setting.moments, ctx.made, ctx.by_energy, wanted, strict=True):
            of_energy = None if found is None else found * grad
            of_given.append(of_energy if is_wanted else None)
            if moments is not None:
                total = _plus(of_energy, next(rest)).clone()  # autograd's own may be shared
                g = world.own(world.all_reduce_(total), 0, setting.unit)
                own = world.own(made.energy, 0, setting.unit)
                of_moments.append((made.read, -2 * own.square() * g if moments.is_inverse else 2 * g))
        of_turned = [
            (weight.writes, gradient_of_rotation(weight.factor, next(rest)))
            for weight in setting.weights
            if weight.score is None
        ]
        own_columns = None if world.size == 1 else world.part(ctx.size, setting.unit)
        add = fused(_added_up, grad, ctx.size**2)
        G = add(grad, ctx.gradients, of_turned, of_moments, setting.columns, own_columns, ctx.size)
        return G, None, *of_given


class _Made(NamedTuple):
    """energy: (d,). read: M R1 of this process's columns, (d, own)."""

    energy: Tensor
    read: Tensor


def _made(moments: Moments, rotation: RoundedRotation, setting: _Setting) -> _Made:
    own = setting.world.own(rotation.rows, 0, setting.unit)
    read = moments.M @ own.mT
    diagonal = fused(_diagonal, read)(own, read)
    energy = 1 / diagonal if moments.is_inverse else diagonal
    return _Made(setting.world.gather_rows(energy, len(rotation.rows), setting.unit), read)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _diagonal(rows: Tensor, read: Tensor) -> Tensor:
    """diag(R^T M R) from R^T and M R, in float32 or float64."""
    wide = torch.promote_types(read.dtype, torch.float32)
    return (rows.mT.to(wide) * read.to(wide)).sum(0)


Gradient = tuple[Tensor, Tensor]
"""G (d, d'), the gradient by columns of R but for a factor of each column, and these factors, (d',)."""


def _score_of_parts(
    rotation: RoundedRotation, energy: Tensor | None, weight: RotatedWeight, score: Score
) -> tuple[Tensor, list[Gradient], Tensor]:
    """Score a rotated weight, part by part. Returns: the score, its gradients by R in terms, and by the energies."""
    factor, num_rows, n = weight.factor, len(rotation.rows), weight.factor.X.shape[1]
    eight_bits = factor.mirrored is not None
    of_T = torch.bfloat16 if eight_bits else rotation.rows.dtype
    length = n if weight.by_column else num_rows
    num_parts = min(math.ceil(num_rows * n * of_T.itemsize / PART), math.ceil(length / ALIGNED))
    total = torch.zeros((), dtype=torch.promote_types(of_T, torch.float32), device=factor.X.device)
    gradients: list[Gradient] = []
    of_energies = []
    for part in range(num_parts):
        start, stop = (min(length, ALIGNED * (-(-length // ALIGNED) * i // num_parts)) for i in (part, part + 1))
        span = slice(start, stop)
        own, rows = (factor.columns(span), slice(None)) if weight.by_column else (factor, span)
        one = RoundedRotation(rotation.rows[rows], None if rotation.scale is None else rotation.scale[rows])
        T = rotated(one, own)
        strength = None if energy is None else energy[rows]
        if own.scale is not None:
            strength = own.scale.expand(len(T)) if strength is None else strength * own.scale
        dtype = GRADIENT8 if eight_bits else T.dtype
        value, D, by_strength, by_row = two_passes(T, one.scale, strength, own.counts, score, dtype)
        total += value
        gradients.append((gradient_of_rotation(own, D), by_row))
        of_energies.append(by_strength if own.scale is None else by_strength * own.scale)
    if not num_parts:  # the share of a process may be empty
        return total, [], total.new_zeros(num_rows)
    if weight.by_column:
        return total, gradients, reduce(torch.add, of_energies)
    whole = (torch.cat([G for G, _ in gradients], 1), torch.cat([by_row for _, by_row in gradients]))
    return total, [whole if num_parts > 1 else gradients[0]], torch.cat(of_energies)


def _added_up(
    grad: Tensor,
    of_scores: Sequence[tuple[bool, Tensor, Tensor]],
    of_products: Sequence[tuple[bool, Tensor]],
    of_moments: Sequence[tuple[Tensor, Tensor]],
    columns: Columns,
    own: slice | None,
    size: int,
) -> Tensor:
    """The gradient by R, (d, size), as one sum of terms, of all its columns or of `columns` (True)."""
    terms = [(is_part, G * (by_column * grad)) for is_part, G, by_column in of_scores]
    terms += [(is_part, G.to(grad.dtype)) for is_part, G in of_products]
    whole = [columns.spread(G, size) if is_part else G for is_part, G in terms]
    return reduce(torch.add, [*whole, *(Columns(own).spread(read * g, size) for read, g in of_moments)])


def rotated_scores(
    R: Tensor,
    energies: Sequence[Tensor | Moments | None],
    weights: Sequence[RotatedWeight],
    products: Products = None,
    columns: Columns = ALL_COLUMNS,
    world: World = ALONE,
    unit: int = 1,
) -> Rotated:
    """Score the rotated weights' importances. Differentiable by R and the energies given, as is all that is returned.

    Args:
        R: (d, d) float32 or float64, orthogonal. energies: (d,) each, or what R makes them of.
        columns: those of R with which the weights that write are multiplied.
        world: the processes that share the columns of which Moments make energies, by multiples of `unit`. What each
            of them makes of these energies is taken as a term of one sum.
    """
    moments = [source if isinstance(source, Moments) else None for source in energies]
    given = [None if isinstance(source, Moments) else source for source in energies]
    score, *rest = _Rotated.apply(R, _Setting(moments, weights, columns, products, world, unit), *given)
    found = [rest.pop(0) if isinstance(source, Moments) else source for source in energies]
    return Rotated(score, found, rest)
