"""Scores of rotated weights, whose gradients are in closed form, against autograd through the obvious composition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from drotator import scores
from drotator.config import SparsityConfig
from drotator.scores import RotatedWeight, Score, entropy_score, removed_score, rotated_scores

D, OTHER = 16, 40  # hidden_size, and the other side of the weight: both multiples of the largest group
GROUPS = [SparsityConfig(keep=keep, group=group) for keep, group in ((2, 4), (4, 8), (1, 4))]
SPARSITIES = [*GROUPS, SparsityConfig(ratio=0.5)]


def entropy_of(S: Tensor, dim: int) -> Tensor:
    p = S / S.sum(dim, keepdim=True)
    return -(p * p.log()).sum()


def removed_of(S: Tensor, sparsity: SparsityConfig) -> Tensor:
    """The least importances of every group of inputs of an output, or of all its inputs, sorted out. S: S^T."""
    if sparsity.is_grouped:
        return S.unflatten(0, (-1, sparsity.group)).sort(1).values[:, : sparsity.group - sparsity.keep].sum()
    return S.sort(0).values[: round(sparsity.ratio * len(S))].sum()


Reference = Callable[[Tensor], Tensor]
SCORES: dict[str, tuple[Score, Reference, bool]] = {  # the score, its reference, whether it looks at inputs alone
    "entropy-of-outputs": (partial(entropy_score, dim=0), partial(entropy_of, dim=0), False),
    "entropy-of-inputs": (partial(entropy_score, dim=1), partial(entropy_of, dim=1), True),
    **{s.label: (partial(removed_score, sparsity=s), partial(removed_of, sparsity=s), False) for s in SPARSITIES},
}

by_score = pytest.mark.parametrize("name", SCORES)
by_side = pytest.mark.parametrize("writes", [False, True], ids=["reader", "writer"])
by_energy = pytest.mark.parametrize("has_energy", [False, True], ids=["no-energy", "energy"])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(name: str, writes: bool, has_energy: bool) -> tuple[Tensor, Tensor | None, RotatedWeight]:
    """A rotation, the energy of the inputs and a weight whose values bfloat16 holds exactly; all float64."""
    W = draw(0, OTHER, D) if writes else draw(0, D, OTHER)
    R = torch.linalg.qr(draw(1, D, D)).Q
    d_in = len(W)
    energy = draw(2, d_in).exp() if has_energy else None
    score, _, by_input = SCORES[name]
    return R, energy, RotatedWeight(W.bfloat16().double(), score, writes, by_input)


def score_of(R: Tensor, energy: Tensor | None, weight: RotatedWeight) -> Tensor:
    return rotated_scores(R, [energy], [weight])[0]


def reference(R: Tensor, energy: Tensor | None, weight: RotatedWeight, of: Reference) -> Tensor:
    T = weight.W @ R if weight.writes else R.mT @ weight.W
    return of(T.square() * (1 if energy is None else energy[:, None]))


def with_gradients(value: Callable[..., Tensor], R: Tensor, energy: Tensor | None) -> list[Tensor]:
    """The value, and its gradients by R and by energy where there is one, scaled as by what follows in a sum."""
    leaves = [tensor.clone().requires_grad_() for tensor in (R, energy) if tensor is not None]
    found = value(*leaves) if energy is not None else value(leaves[0], None)
    return [found.detach(), *torch.autograd.grad(-3 * found, leaves)]


@by_score
@by_side
@by_energy
@pytest.mark.parametrize("part", [2**26, 150], ids=["whole", "parts"])
def test_value_and_gradients_are_those_of_autograd_whatever_the_parts(
    name: str, writes: bool, has_energy: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    R, energy, weight = problem(name, writes, has_energy)
    expected = with_gradients(lambda R, e: reference(R, e, weight, SCORES[name][1]), R, energy)
    seen: list[int] = []

    def counting(S: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(S.numel())
        return SCORES[name][0](S)

    monkeypatch.setattr(scores, "PART", part)
    counted = RotatedWeight(weight.W, counting, weight.writes, weight.by_input)
    found = with_gradients(lambda R, e: score_of(R, e, counted), R, energy)
    assert len(seen) == -(-D * OTHER // part)
    assert sum(seen) == D * OTHER
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@by_side
def test_an_energy_that_the_rotation_makes_gives_its_part_of_the_gradient(writes: bool) -> None:
    R, _, weight = problem("2of4", writes, True)
    H = draw(5, len(weight.W), D)

    def energy(R: Tensor) -> Tensor:
        return (H @ R).square().sum(1) + (H @ R)[:, 0].square()

    expected = with_gradients(lambda R, _: reference(R, energy(R), weight, SCORES["2of4"][1]), R, None)
    found = with_gradients(lambda R, _: score_of(R, energy(R), weight), R, None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_energy_that_needs_no_gradient_gets_none() -> None:
    R, energy, weight = problem("2of4", False, True)
    assert energy is not None
    score_of(R.requires_grad_(), energy, weight).backward()
    assert R.grad is not None and R.grad.count_nonzero()
    assert energy.grad is None
    only_energy = score_of(R.detach(), energy.requires_grad_(), weight)
    (gradient,) = torch.autograd.grad(only_energy, energy)
    assert float((gradient * energy).sum().detach()) == pytest.approx(float(only_energy.detach()))  # it is linear


@by_score
@by_side
def test_bfloat16_products_leave_value_and_gradients_near(name: str, writes: bool) -> None:
    """W is exact in bfloat16. R and T are rounded to u = 2^-9 of each entry, which makes 4 u of T^2, or less as signs
    differ, and D once more: 5 u of the gradients. A gradient jumps where the rounding changes a rank, so it is compared
    with that of the mask found, and that mask removes as little as the exact one to 4 u of either.
    """
    u = 2**-9
    R, energy, weight = problem(name, writes, True)
    assert energy is not None
    slopes: list[Tensor] = []

    def recording(S: Tensor) -> tuple[Tensor, Tensor]:
        assert S.dtype is torch.float32
        value, slope = SCORES[name][0](S)
        slopes.append(slope)
        return value, slope

    low = RotatedWeight(weight.W.bfloat16(), recording, writes, weight.by_input)
    found = with_gradients(lambda R, e: score_of(R, e, low), R.float(), energy.float())
    assert all(tensor.dtype is torch.float32 for tensor in found)
    assert slopes[0].numel() == D * OTHER

    of = SCORES[name][1]
    least = float(reference(R, energy, weight, of))
    assert float(found[0]) == pytest.approx(least, rel=4 * u)
    for sparsity in SPARSITIES:
        if name == sparsity.label:  # no two energies are the same, so there are no ties
            groups = slopes[0].unflatten(0, (-1, sparsity.group if sparsity.is_grouped else len(slopes[0])))
            assert (groups.sum(1) == round(sparsity.fraction * groups.shape[1])).all()
            of = lambda S: (S * slopes[0]).sum()  # noqa: E731
    removed, *expected = with_gradients(lambda R, e: reference(R, e, weight, of), R, energy)
    assert least * (1 - 1e-12) <= float(removed) < least * (1 + 8 * u)
    for gradient, exact in zip(found[1:], expected, strict=True):
        is_nothing = exact.norm() < 1e-10 * least  # the energy of an input is no part of its entropy
        assert (gradient.double() - exact).norm() < (1e-5 * least if is_nothing else 5 * u * exact.norm())
