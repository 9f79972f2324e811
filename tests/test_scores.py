"""Scores of importances, whose gradients are in closed form, against autograd through the obvious composition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from drotator.config import SparsityConfig
from drotator.scores import ENTROPY_ALONG_BOTH, Score, entropy_along, importance_score, removal

D, OTHER = 48, 80  # hidden_size, and the other side of the weight: several parts, and multiples of the largest group
GROUPS = [SparsityConfig(keep=keep, group=group) for keep, group in ((2, 4), (4, 8), (1, 4))]
SPARSITIES = [*GROUPS, SparsityConfig(ratio=0.5)]

by_energy = pytest.mark.parametrize("has_energy", [False, True], ids=["no-energy", "energy"])


Reference = Callable[[Tensor], Tensor]


def entropy_of(S: Tensor, dim: int) -> Tensor:
    p = S / S.sum(dim, keepdim=True)
    return -(p * p.log()).sum()


def removed_of(S: Tensor, sparsity: SparsityConfig, dim: int) -> Tensor:
    """The least importances of every group of inputs, which lie along `dim`, or of all inputs, sorted out."""
    S = S.movedim(dim, 0)
    if sparsity.is_grouped:
        return S.unflatten(0, (-1, sparsity.group)).sort(1).values[:, : sparsity.group - sparsity.keep].sum()
    return S.sort(0).values[: round(sparsity.ratio * len(S))].sum()


def scored(score: Score, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The score, its slope at every entry over the unit, and the unit."""
    value, unit, marks = score.summary(S)
    return value, score.slope(S, *marks), unit


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(value: Callable[..., Tensor], *leaves: Tensor | None) -> list[Tensor]:
    """The value, and its gradients by the leaves that there are, scaled as by what follows in a sum."""
    given = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    found = value(*given)
    return [found.detach(), *torch.autograd.grad(-3 * found, [leaf for leaf in given if leaf is not None])]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Float64, and sums of some thousands of terms of order 1."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dim", [0, 1])
@by_energy
@pytest.mark.parametrize("kind", ["entropy", "entropy of both", "2of4"])
def test_the_score_of_a_weight_that_is_at_hand_is_that_of_autograd(dim: int, has_energy: bool, kind: str) -> None:
    """Of the inputs, which lie along `dim`, and so do their energies."""
    T, energy = draw(11, D, OTHER), draw(12, (D, OTHER)[dim]).exp() if has_energy else None
    score: Score = entropy_along(dim)
    reference: Reference = partial(entropy_of, dim=dim)
    if kind == "entropy of both":
        score, reference = ENTROPY_ALONG_BOTH, lambda S: entropy_of(S, 0) + entropy_of(S, 1)
    if kind == "2of4":
        score, reference = removal(GROUPS[0], dim), partial(removed_of, sparsity=GROUPS[0], dim=dim)

    def expected(T: Tensor, e: Tensor | None) -> Tensor:
        return reference(T.square() * (1 if e is None else e.unsqueeze(1 - dim)))

    found = with_gradients(lambda T, e: importance_score(T, e, score, dim), T, energy)
    assert_same(found, with_gradients(expected, T, energy))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_importances_of_zero_have_no_entropy_and_no_gradient(dim: int, dtype: torch.dtype) -> None:
    S = draw(13, 6, 10).square().to(dtype)
    S[2], S[:, 3], S[0, 0] = 0, 0, 0
    value, slope, unit = scored(entropy_along(dim), S)
    rest = S.movedim(dim, -1)
    left = [entropy_of(row[row > 0], 0) for row in rest if row.count_nonzero()]
    torch.testing.assert_close(value, torch.stack(left).sum())
    assert slope.isfinite().all() and float(unit) > 0
    assert not slope.movedim(dim, -1)[(rest == 0).all(-1)].any()  # of what has nothing but zeros
    assert (slope * S.sqrt())[S == 0].eq(0).all()


def test_a_matrix_of_zeros_has_no_entropy_along_either_dimension() -> None:
    value, slope, unit = scored(ENTROPY_ALONG_BOTH, torch.zeros(4, 8))
    assert value == 0 and not slope.any() and unit.isfinite()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_but_zeros_has_an_entropy_of_zero_and_a_unit_above(dim: int, dtype: torch.dtype) -> None:
    value, slope, unit = scored(entropy_along(dim), torch.zeros(4, 8, dtype=dtype))
    assert float(value) == 0 and not slope.any()
    assert float(unit) > 0 and unit.isfinite()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("exponent", [-60, 60])
def test_slopes_of_the_entropy_are_of_order_one_whatever_the_size_of_the_importances(dim: int, exponent: int) -> None:
    """A power of two changes no digit of S, and the logarithms by rounding alone."""
    S = draw(14, D, OTHER).square()
    value, slope, unit = scored(entropy_along(dim), S)
    scaled_value, scaled_slope, scaled_unit = scored(entropy_along(dim), S * 2.0**exponent)
    assert_same([scaled_value, scaled_slope], [value, slope])
    torch.testing.assert_close(scaled_unit * 2.0**exponent, unit, rtol=1e-12, atol=0)
    assert 0.5 < float(slope.square().mean().sqrt()) < 5  # |log p + E| of squares of normal numbers is about 2


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda sparsity: sparsity.label)
def test_of_equal_importances_as_many_are_counted_as_the_mask_removes(sparsity: SparsityConfig, dim: int) -> None:
    """All that are equal to the largest removed get its slope."""
    S = draw(15, D, OTHER).mul(1.5).round().abs()
    value, slope, unit = scored(removal(sparsity, dim), S)
    assert float(value) == float(removed_of(S, sparsity, dim))
    assert float(unit) == 1
    along, mask = S.movedim(dim, 0), slope.movedim(dim, 0)
    size = sparsity.group if sparsity.is_grouped else len(along)
    for group, removed in zip(along.split(size), mask.split(size), strict=True):
        threshold = group.sort(0).values[round(sparsity.fraction * size) - 1]
        assert torch.equal(removed, (group <= threshold).to(S.dtype))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_ratio_that_removes_nothing_has_no_slope(dim: int) -> None:
    value, slope, unit = scored(removal(SparsityConfig(ratio=0.05), dim), draw(15, 8, 8).square())
    assert float(value) == 0 and not slope.any() and float(unit) == 1
