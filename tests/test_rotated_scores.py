"""Scores of rotated weights, whose gradients are in closed form, against autograd through the obvious composition."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from test_scores import (
    OTHER,
    SPARSITIES,
    D,
    Reference,
    assert_same,
    by_energy,
    draw,
    entropy_of,
    removed_of,
    with_gradients,
)
from torch import Tensor

from drotator import rotated_scores as node
from drotator.products import FLOAT8, Factor, Products, factor_of
from drotator.rotated_scores import ALL_COLUMNS, Columns, Moments, Rotated, RotatedWeight, rotated_scores
from drotator.scores import Score, entropy_along, removal

THREE_PARTS = 12_000  # bytes of T at once, where all D * OTHER in float64 are 30720


@dataclass(frozen=True)
class Case:
    """A score, its reference, and the dimension of T along which it looks at importances together."""

    score: Score
    reference: Reference
    dim: int

    def weight(self, factor: Factor, energy: int | None, writes: bool) -> RotatedWeight:
        return RotatedWeight(factor, self.score, energy, writes, by_column=self.dim == 0)


def case_of(name: str, writes: bool) -> Case:
    """Of a mask, whose groups are of inputs: the rows of what reads, the columns of what writes."""
    if name in ENTROPIES:
        dim = ENTROPIES[name]
        return Case(entropy_along(dim), partial(entropy_of, dim=dim), dim)
    sparsity, dim = MASKS[name], 1 if writes else 0
    return Case(removal(sparsity, dim), partial(removed_of, sparsity=sparsity, dim=dim), dim)


ENTROPIES = {"entropy-of-columns": 0, "entropy-of-rows": 1}
MASKS = {sparsity.label: sparsity for sparsity in SPARSITIES}

by_score = pytest.mark.parametrize("name", [*ENTROPIES, *MASKS])
by_side = pytest.mark.parametrize("writes", [False, True], ids=["reader", "writer"])
by_counts = pytest.mark.parametrize("has_counts", [False, True], ids=["no-counts", "counts"])
by_part = pytest.mark.parametrize("part", [2**29, THREE_PARTS], ids=["whole", "parts"])
by_inverse = pytest.mark.parametrize("is_inverse", [False, True], ids=["moments", "inverse"])


def rotation() -> Tensor:
    return torch.linalg.qr(draw(1, D, D)).Q


def weight_rows(seed: int = 0) -> Tensor:
    """X^T, (n, d), of values that bfloat16 holds exactly."""
    return draw(seed, OTHER, D).bfloat16().double()


def some_energy() -> Tensor:
    return draw(2, D).exp()


def some_counts() -> Tensor:
    return draw(3, OTHER).exp()


def some_moments(seed: int) -> Tensor:
    X = draw(seed, D, 3 * D) * torch.logspace(0.5, -0.5, D, dtype=torch.float64)[:, None]
    return X @ X.mT / X.shape[1]


def factor(rows: Tensor, counts: Tensor | None, products: Products = None) -> Factor:
    made = factor_of([rows], None if counts is None else [counts], products, is_scale_free=counts is None)
    return made.of_batch(None)


def importances(R: Tensor, rows: Tensor, energy: Tensor | None, counts: Tensor | None) -> Tensor:
    S = (R.mT @ rows.mT).square()
    S = S if energy is None else S * energy[:, None]
    return S if counts is None else S * counts


@by_score
@by_side
@by_energy
@by_counts
@by_part
def test_value_and_gradients_are_those_of_autograd_whatever_the_parts(
    name: str, writes: bool, has_energy: bool, has_counts: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, rows = case_of(name, writes), weight_rows()
    energy, counts = some_energy() if has_energy else None, some_counts() if has_counts else None
    expected = with_gradients(lambda R, e: case.reference(importances(R, rows, e, counts)), rotation(), energy)
    seen: list[tuple[int, ...]] = []

    def counting(S: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        seen.append(tuple(S.shape))
        return case.score.summary(S)

    counted = dataclasses.replace(case, score=Score(counting, case.score.slope)).weight(
        factor(rows, counts), 0 if has_energy else None, writes
    )
    monkeypatch.setattr(node, "PART", part)
    found = with_gradients(lambda R, e: rotated_scores(R, [e], [counted]).score, rotation(), energy)
    assert len(seen) == (3 if part == THREE_PARTS else 1)
    assert {shape[case.dim] for shape in seen} == {(D, OTHER)[case.dim]}  # what belongs together was seen together
    assert sum(shape[1 - case.dim] for shape in seen) == (D, OTHER)[1 - case.dim]
    assert_same(found, expected)


@by_side
def test_a_given_energy_that_the_rotation_makes_gives_its_part_of_the_gradient(writes: bool) -> None:
    case, rows, H = case_of("2of4", writes), weight_rows(), draw(5, D, D)

    def energy(R: Tensor) -> Tensor:
        return (H @ R).square().sum(1) + (H @ R)[:, 0].square()

    weight = case.weight(factor(rows, None), 0, writes)
    expected = with_gradients(lambda R: case.reference(importances(R, rows, energy(R), None)), rotation())
    assert_same(with_gradients(lambda R: rotated_scores(R, [energy(R)], [weight]).score, rotation()), expected)


def test_an_energy_that_needs_no_gradient_gets_none() -> None:
    weight = case_of("2of4", False).weight(factor(weight_rows(), some_counts()), 0, False)
    R, energy = rotation().requires_grad_(), some_energy()
    rotated_scores(R, [energy], [weight]).score.backward()
    assert R.grad is not None and R.grad.count_nonzero()
    assert energy.grad is None
    only_energy = rotated_scores(R.detach(), [energy.requires_grad_()], [weight]).score
    (gradient,) = torch.autograd.grad(only_energy, energy)
    assert float((gradient * energy).sum().detach()) == pytest.approx(float(only_energy.detach()))  # it is linear


def energy_of(M: Tensor, R: Tensor, is_inverse: bool) -> Tensor:
    diagonal = (R.mT @ M @ R).diagonal()
    return 1 / diagonal if is_inverse else diagonal


@by_score
@by_side
@by_inverse
@by_part
def test_energies_made_of_moments_carry_the_gradients_of_all_that_uses_them(
    name: str, writes: bool, is_inverse: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the score, of which they are factors, and by something else that the energy returned goes on into."""
    case, rows, counts, M, along = case_of(name, writes), weight_rows(), some_counts(), some_moments(7), draw(8, D)
    weight = case.weight(factor(rows, counts), 0, writes)

    def expected(R: Tensor) -> Tensor:
        energy = energy_of(M, R, is_inverse)
        return case.reference(importances(R, rows, energy, counts)) + (along * energy.square()).sum()

    def found(R: Tensor) -> Tensor:
        score, (energy,), _ = rotated_scores(R, [Moments(M, is_inverse)], [weight])
        assert energy is not None
        return score + (along * energy.square()).sum()

    monkeypatch.setattr(node, "PART", part)
    assert_same(with_gradients(found, rotation()), with_gradients(expected, rotation()))


@by_inverse
def test_an_energy_of_moments_that_nothing_scores_is_returned_with_its_gradient(is_inverse: bool) -> None:
    M, along = some_moments(7), draw(8, D)

    def found(R: Tensor) -> Tensor:
        score, (none, energy), weights = rotated_scores(R, [None, Moments(M, is_inverse)], [])
        assert none is None and energy is not None and float(score.detach()) == 0 and not weights
        return (along * energy).sum()

    expected = with_gradients(lambda R: (along * energy_of(M, R, is_inverse)).sum(), rotation())
    assert_same(with_gradients(found, rotation()), expected)


@by_side
def test_a_weight_without_a_score_is_returned_rotated_with_its_gradient(writes: bool) -> None:
    rows, along = weight_rows(), draw(9, D, OTHER)

    def found(R: Tensor) -> Tensor:
        (T,) = rotated_scores(R, [], [RotatedWeight(factor(rows, None), None, writes=writes)]).weights
        assert_same([T.detach()], [(R.mT @ rows.mT).detach()])
        return (along * T.square()).sum()

    expected = with_gradients(lambda R: (along * (R.mT @ rows.mT).square()).sum(), rotation())
    assert_same(with_gradients(found, rotation()), expected)


@by_part
def test_scores_of_several_weights_add_up_and_what_they_share_gets_all_gradients(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energies made, given and absent, used by two weights, one or none, and weights without a score between them."""
    cases = [case_of(*kind) for kind in (("2of4", False), ("entropy-of-columns", False), ("50", True))]
    rows, counts = [weight_rows(seed) for seed in range(20, 25)], some_counts()
    M, unused, along = some_moments(7), some_moments(9), draw(10, D, OTHER)

    def expected(R: Tensor, given: Tensor) -> Tensor:
        made = energy_of(M, R, False)
        total = cases[0].reference(importances(R, rows[0], made, counts))
        total = total + cases[1].reference(importances(R, rows[1], made, None))
        total = total + cases[2].reference(importances(R, rows[2], given, counts))
        total = 2 * total + (made * energy_of(unused, R, True)).sum() + given.square().sum()
        return total + (along * (R.mT @ rows[3].mT) * (R.mT @ rows[4].mT)).sum()

    def found(R: Tensor, given: Tensor) -> Tensor:
        weights = [
            RotatedWeight(factor(rows[3], None), None),
            cases[0].weight(factor(rows[0], counts), 1, False),
            cases[1].weight(factor(rows[1], None), 1, False),
            RotatedWeight(factor(rows[4], None), None, writes=True),
            cases[2].weight(factor(rows[2], counts), 0, True),
        ]
        energies: list[Tensor | Moments | None] = [given, Moments(M, False), None, Moments(unused, True)]
        score, (same, made, none, other), (T, U) = rotated_scores(R, energies, weights)
        assert same is given and none is None and made is not None and other is not None
        return 2 * score + (made * other).sum() + same.square().sum() + (along * T * U).sum()

    monkeypatch.setattr(node, "PART", part)
    assert_same(with_gradients(found, rotation(), some_energy()), with_gradients(expected, rotation(), some_energy()))


@by_score
@by_part
@pytest.mark.parametrize("share", [None, slice(16, 48)], ids=["all", "share"])
@pytest.mark.parametrize("batch", [None, 0, 1])
def test_of_what_writes_only_the_columns_asked_for_are_looked_at(
    name: str, part: int, share: slice | None, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads is rotated by all of R beside them."""
    case, rows, other, counts = case_of(name, True), weight_rows(), weight_rows(30), some_counts()
    along = draw(9, OTHER)
    columns = Columns(share, 2, None if batch is None else torch.tensor([batch]))
    reader = case_of("2of4", False)
    weights = [
        case.weight(factor(rows, counts), None, True),
        RotatedWeight(factor(other, None), None, writes=True),
        reader.weight(factor(other, None), None, False),
    ]

    def expected(R: Tensor) -> Tensor:
        own = R if share is None else R[:, share]
        own = own if batch is None else own[:, batch::2]
        total = case.reference(importances(own, rows, None, counts))
        return total + reader.reference(importances(R, other, None, None)) + (own.mT @ other.mT @ along).square().sum()

    def found(R: Tensor) -> Tensor:
        score, _, (T,) = rotated_scores(R, [], weights, columns=columns)
        return score + (T @ along).square().sum()

    monkeypatch.setattr(node, "PART", part)
    assert_same(with_gradients(found, rotation()), with_gradients(expected, rotation()))


@pytest.mark.parametrize("products", [None, torch.bfloat16, FLOAT8], ids=str)
def test_batches_of_outputs_that_are_scored_alone_add_up_to_all_of_them_in_every_precision(products: Products) -> None:
    """To the rounding of float32 sums: a column of R is rounded alone, and the products are the same ones."""
    weight = case_of("2of4", True).weight(factor(weight_rows().float(), some_counts().float(), products), None, True)

    def score(columns: Columns) -> list[Tensor]:
        found = lambda R: rotated_scores(R, [], [weight], products, columns).score  # noqa: E731
        return with_gradients(found, rotation().float())

    whole = score(ALL_COLUMNS)
    halves = [score(Columns(None, 2, torch.tensor([i]))) for i in (0, 1)]
    for first, second, both in zip(*halves, whole, strict=True):
        torch.testing.assert_close(first + second, both, rtol=1e-5, atol=1e-5 * float(both.abs().max()))


@by_score
@by_side
def test_bfloat16_products_leave_value_and_gradients_near(name: str, writes: bool) -> None:
    """To float64 at the R and X that bfloat16 holds: it rounds an entry by 2^-8 of it at most, and by u = 2^-9 or less
    in root mean square. T is rounded, which makes 4 u of T^2 at most, and with it of the score and of what a mask
    removes: the mask found removes as little as the exact one to 4 u of either. Of the gradients it makes u in root
    mean square, with 2 u more of the entropy's slope, log S; D and G are rounded once each: below 3 u, as these errors
    are independent. A gradient jumps where the rounding changes a rank, so it is compared with that of the mask found.
    """
    u = 2**-9
    case, rows, counts, energy = case_of(name, writes), weight_rows(), some_counts(), some_energy()
    R = rotation().bfloat16()
    slopes: list[Tensor] = []

    def recording(S: Tensor, *marks: Tensor) -> Tensor:
        assert S.dtype is torch.float32
        slopes.append(case.score.slope(S, *marks))
        return slopes[0]

    low = factor(rows.float(), counts.float(), torch.bfloat16)
    weight = dataclasses.replace(case, score=Score(case.score.summary, recording)).weight(low, 0, writes)
    found = with_gradients(
        lambda R, e: rotated_scores(R, [e], [weight], torch.bfloat16).score, R.float(), energy.float()
    )
    assert all(tensor.dtype is torch.float32 for tensor in found)
    assert slopes[0].numel() == D * OTHER

    of = case.reference
    least = float(of(importances(R.double(), rows, energy, counts)))
    assert float(found[0]) == pytest.approx(least, rel=4 * u)
    if name in MASKS:
        sparsity, mask = MASKS[name], slopes[0].movedim(case.dim, 0)
        groups = mask.unflatten(0, (-1, sparsity.group if sparsity.is_grouped else len(mask)))
        assert (groups.sum(1) == round(sparsity.fraction * groups.shape[1])).all()  # there are no ties
        of = lambda S: (S * slopes[0]).sum()  # noqa: E731
    removed, *expected = with_gradients(lambda R, e: of(importances(R, rows, e, counts)), R.double(), energy)
    assert least * (1 - 1e-12) <= float(removed) < least * (1 + 8 * u)
    for gradient, exact in zip(found[1:], expected, strict=True):
        is_nothing = exact.norm() < 1e-10 * least  # the energy of an output is no part of its entropy over the inputs
        assert (gradient.double() - exact).norm() < (1e-5 * least if is_nothing else 3 * u * exact.norm())


@by_inverse
def test_energies_made_of_bfloat16_moments_are_near(is_inverse: bool) -> None:
    """To float64 at the R and M that bfloat16 holds: M R is rounded by 2^-8 of an entry, and by far less in its
    float32 sums. That is the error of the gradient, 2 M R g, but that g of an inverse has the energy twice."""
    u, M, along, R = 1.01 * 2**-8, some_moments(7).bfloat16(), draw(8, D), rotation().bfloat16()

    def found(R: Tensor) -> Tensor:
        (energy,) = rotated_scores(R, [Moments(M, is_inverse)], [], torch.bfloat16).energies
        assert energy is not None and energy.dtype is torch.float32
        energies.append(energy.detach())
        return (along * energy).sum()

    energies: list[Tensor] = []
    M_R = M.double() @ R.double()
    of_energy = u * (R.double() * M_R).abs().sum(0) / (R.double() * M_R).sum(0)  # relative
    _, gradient = with_gradients(found, R.float())
    _, expected = with_gradients(lambda R: (along * energy_of(M.double(), R, is_inverse)).sum(), R.double())
    exact = energy_of(M.double(), R.double(), is_inverse)
    assert ((energies[0] / exact - 1).abs() <= 1 / (1 - of_energy) - 1).all()
    of_gradient = (1 + u) / (1 - of_energy).square() - 1 if is_inverse else u
    noise = 2**-16 * expected.norm(dim=0) / D**0.5  # where the sum in M R nearly cancels
    assert ((gradient - expected).abs() <= of_gradient * expected.abs() + noise).all()


@by_inverse
@pytest.mark.parametrize("products", [None, torch.bfloat16, FLOAT8], ids=str)
@pytest.mark.parametrize("goes_back", [False, True], ids=["forward", "backward"])
def test_what_was_kept_for_the_gradient_is_let_go_with_the_result(
    is_inverse: bool, products: Products, goes_back: bool
) -> None:
    """Gradients of large weights cannot wait for the collector of cycles."""
    R, rows, low = rotation().float().requires_grad_(), weight_rows().float(), torch.float32
    if products is not None:
        low = torch.bfloat16
    weights = [
        case_of("2of4", False).weight(factor(rows, None, products), 0, False),
        RotatedWeight(factor(rows, None, None if products is None else low), None, writes=True),
    ]
    energies = [Moments(some_moments(7).to(low), is_inverse)]

    def use() -> weakref.ref[object]:
        found: Rotated = rotated_scores(R, energies, weights, products)
        assert found.energies[0] is not None
        if goes_back:
            (found.score + found.energies[0].sum() + found.weights[0].float().sum()).backward()
        return weakref.ref(found.score.grad_fn)

    gc.collect()
    gc.disable()
    try:
        assert use()() is None
    finally:
        gc.enable()


def test_a_column_that_misses_the_strongest_row_leaves_8_bit_gradients_finite() -> None:
    """Its slope is n units, which E5M2 does not hold."""
    rows, energy = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64)
    rows[0, 0], energy[0] = 0, 1e8
    R = torch.eye(64, requires_grad=True)
    weight = RotatedWeight(factor(rows, None, FLOAT8), entropy_along(0), 0)
    rotated_scores(R, [energy], [weight], FLOAT8).score.backward()
    assert R.grad is not None and R.grad.isfinite().all() and R.grad.count_nonzero()


@by_score
@by_side
def test_parts_are_not_smaller_than_what_products_want(
    name: str, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = case_of(name, writes).weight(factor(weight_rows(), some_counts()), 0, writes)

    def value(R: Tensor) -> Tensor:
        return rotated_scores(R, [some_energy()], [weight]).score

    expected = with_gradients(value, rotation())
    monkeypatch.setattr(node, "PART", 1)
    assert_same(with_gradients(value, rotation()), expected)
