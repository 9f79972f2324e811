"""Optimizers stay on the orthogonal group, whatever they are given, and go down."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drotator.optimizers import (
    DRIFT,
    FLOOR,
    GROUPS,
    MAX_STEP,
    OPTIMIZERS,
    QUINTICS,
    SIGN_LIMIT,
    SMALLEST,
    AdamQR,
    RiemannianAdam,
    Spectral,
    cosine,
    cut,
    matrix_sign,
    retract,
    skew,
    stretch,
)
from drotator.rotation import eye_like
from drotator.scores import entropy_along, importance_score

SHAPES = [(12, 12), (3, 5, 5)]
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda noise: noise,
    "huge": lambda noise: 1e12 * noise,
    "tiny": lambda noise: 1e-12 * noise,
    "zero": torch.zeros_like,
    "rank one": lambda noise: noise[..., :1] @ noise[..., 1:2].mT,
    "one entry": lambda noise: torch.zeros_like(noise).index_put((torch.tensor(0),) * noise.ndim, torch.tensor(1.0)),
    "symmetric": lambda noise: noise + noise.mT,
}

by_name = pytest.mark.parametrize("name", OPTIMIZERS)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["R1", "R2"])


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def identity(shape: tuple[int, ...]) -> Tensor:
    return torch.eye(shape[-1]).expand(shape).clone()


def rotation_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.linalg.qr(noise(shape, seed).double()).Q.float()


def drift(R: Tensor) -> float:
    return float((R.double().mT @ R.double() - eye_like(R)).abs().max())


@by_name
@by_shape
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("learning_rate", [1e-3, 0.1, 10.0])
def test_rotations_stay_orthogonal(name: str, shape: tuple[int, ...], kind: str, learning_rate: float) -> None:
    optimizer = OPTIMIZERS[name](identity(shape), learning_rate)
    for step in range(40):
        R = optimizer.rotation()
        assert not R.requires_grad
        assert R.isfinite().all(), step
        assert drift(R) < 1e-3, step
        optimizer.update(GRADIENTS[kind](noise(shape, step)), torch.tensor(step / 40))


@by_name
@by_shape
def test_an_absurd_learning_rate_leaves_rotations_orthogonal(name: str, shape: tuple[int, ...]) -> None:
    optimizer = OPTIMIZERS[name](identity(shape), 1e4)
    for step in range(40):
        optimizer.update(noise(shape, step), torch.zeros(()))
        assert drift(optimizer.rotation()) < 1e-3, step


@by_name
@by_shape
def test_the_first_rotation_is_the_one_given(name: str, shape: tuple[int, ...]) -> None:
    torch.testing.assert_close(OPTIMIZERS[name](identity(shape), 0.01).rotation(), identity(shape), rtol=0, atol=0)
    start = rotation_of(shape, 0)
    optimizer = OPTIMIZERS[name](start, 0.01)
    torch.testing.assert_close(optimizer.rotation(), start, rtol=0, atol=1e-5)
    before = start.clone()
    optimizer.update(noise(shape, 1), torch.zeros(()))
    assert torch.equal(start, before)
    assert (optimizer.rotation() - start).abs().max() > 1e-4


@by_name
@by_shape
def test_without_a_gradient_nothing_moves(name: str, shape: tuple[int, ...]) -> None:
    optimizer = OPTIMIZERS[name](identity(shape), 0.1)
    for _ in range(3):
        optimizer.update(torch.zeros(shape), torch.zeros(()))
    torch.testing.assert_close(optimizer.rotation(), identity(shape), rtol=0, atol=1e-6)


@by_name
@by_shape
def test_they_approach_the_nearest_rotation(name: str, shape: tuple[int, ...]) -> None:
    target = torch.linalg.matrix_exp(0.15 * skew(noise(shape, 3)))
    learning_rate = {"adam_qr": 0.01, "riemannian_adam": 0.001, "spectral": 0.05}[name]
    optimizer = OPTIMIZERS[name](identity(shape), learning_rate)
    start = (optimizer.rotation() - target).norm()
    for step in range(300):
        optimizer.update(optimizer.rotation() - target, torch.tensor(step / 300))
    assert (optimizer.rotation() - target).norm() < 0.05 * start


@pytest.mark.parametrize("optimizer_class", [RiemannianAdam, Spectral])
def test_the_step_follows_a_cosine_to_nothing(optimizer_class: type[RiemannianAdam | Spectral]) -> None:
    G = skew(noise((12, 12), 0))
    moved = []
    for progress in (0.0, 0.5, 1.0):
        optimizer = optimizer_class(identity((12, 12)), 0.01)
        optimizer.update(G, torch.tensor(progress))
        moved.append(float((optimizer.rotation() - identity((12, 12))).norm()))
    assert moved[0] > 0
    assert moved[1] == pytest.approx(moved[0] / 2, rel=0.05)
    assert moved[2] < 1e-5
    assert cosine(3.0, torch.tensor([0, 0.5, 1])).tolist() == pytest.approx([3, 1.5, 0], abs=1e-6)


@by_shape
def test_adam_qr_is_adam_on_a_matrix_whose_qr_factor_is_the_rotation(shape: tuple[int, ...]) -> None:
    optimizer = AdamQR(identity(shape), 0.01)
    A = identity(shape).requires_grad_()
    adam = torch.optim.Adam([A], lr=0.01)
    for step in range(25):
        target = (0.02, 100.0)[step % 2] * noise(shape, step)  # below the clip, above the clip
        Q, R = torch.linalg.qr(A)
        Q = Q @ torch.diag_embed(R.diagonal(dim1=-2, dim2=-1).detach().sign())
        torch.testing.assert_close(optimizer.rotation(), Q.detach(), rtol=0, atol=1e-5)
        adam.zero_grad()
        (Q * target).sum().backward()
        torch.nn.utils.clip_grad_norm_(A, 1.0)
        adam.step()
        optimizer.update(target, torch.tensor(step / 25))
    assert (optimizer.rotation() - identity(shape)).abs().max() > 0.02


def test_a_small_first_step_of_riemannian_adam_turns_every_plane_by_the_learning_rate() -> None:
    n, learning_rate = 24, 1e-4
    optimizer = RiemannianAdam(identity((n, n)), learning_rate)
    G = noise((n, n), 0)
    optimizer.update(G, torch.zeros(()))
    angle = learning_rate * math.sqrt(576 / n)
    expected = identity((n, n)) - angle * skew(G).sign()
    torch.testing.assert_close(optimizer.rotation(), expected, rtol=0, atol=30 * angle**2)


def test_a_step_of_spectral_turns_every_plane_by_the_learning_rate() -> None:
    optimizer = Spectral(identity((12, 12)), 0.1)
    optimizer.update(noise((12, 12), 0), torch.zeros(()))
    angles = torch.linalg.eigvals(optimizer.rotation().double()).angle().abs()
    torch.testing.assert_close(angles, torch.full_like(angles, 0.1), rtol=0.2, atol=0)


def structured_weight(d_out: int, d: int) -> Tensor:
    """A sparse weight hidden by a rotation: one that concentrates it again is known to exist."""
    sparse = noise((d_out, d), 0) * (torch.rand(d_out, d, generator=torch.Generator().manual_seed(1)) < 0.05)
    return (sparse + 0.02 * noise((d_out, d), 2)) @ rotation_of((d, d), 3)


def test_riemannian_adam_reaches_a_lower_entropy_in_half_the_steps_of_adam_qr() -> None:
    W = structured_weight(256, 64)
    reached = {}
    for name, steps in (("riemannian_adam", 200), ("adam_qr", 400)):
        optimizer = OPTIMIZERS[name](identity((64, 64)), 0.01)
        losses = []
        for step in range(steps):
            R = optimizer.rotation().clone().requires_grad_()
            loss = importance_score(W @ R, None, entropy_along(1))
            losses.append(float(loss.detach()))
            optimizer.update(torch.autograd.grad(loss, R)[0], torch.tensor(step / steps))
        reached[name] = min(losses)
        assert reached[name] < 0.4 * losses[0]
    assert reached["riemannian_adam"] < reached["adam_qr"]


@by_shape
def test_matrix_sign_brings_singular_values_near_one_and_keeps_skew_matrices_skew(shape: tuple[int, ...]) -> None:
    A = noise(shape, 0)
    left, _, right = torch.linalg.svd(A)
    found = matrix_sign(A)
    values = torch.linalg.svdvals(found)
    large = torch.linalg.svdvals(A) > 0.05 * torch.linalg.matrix_norm(A, keepdim=True)[..., 0]
    assert (values[large] - 1).abs().max() < 0.3
    assert (left.mT @ found @ right.mT).diagonal(dim1=-2, dim2=-1).min() >= 0
    assert torch.equal(matrix_sign(2.0**10 * A), found) and torch.equal(matrix_sign(2.0**-15 * A), found)
    faint = matrix_sign(1e-9 * A)
    torch.testing.assert_close(faint / faint.norm(), A / A.norm(), rtol=1e-3, atol=0)
    turned = matrix_sign(skew(A))
    torch.testing.assert_close(turned, -turned.mT, rtol=0, atol=1e-4)
    assert torch.equal(matrix_sign(torch.zeros(shape)), torch.zeros(shape))


def test_matrix_sign_turns_all_planes_with_a_part_of_the_largest_momentum_by_nearly_the_same() -> None:
    Q = rotation_of((26, 26), 0).double()
    planes = torch.cat([torch.logspace(0, -1.3, 10), torch.tensor([1e-2, 1e-3, 0.0])]).double()
    bound = (2 * planes.pow(8).sum()) ** 0.125  # a plane has its singular value twice
    blocks = torch.block_diag(*(value * torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double() for value in planes))
    found = (Q.mT @ matrix_sign((Q @ blocks @ Q.mT).float()).double() @ Q).diagonal(1)[::2]
    is_large = planes > 2 * SMALLEST * bound  # the bound is rounded up to a power of two
    assert is_large.sum() == 10
    assert found[is_large].min() > 2 - SIGN_LIMIT - 1e-3
    assert found.max() < SIGN_LIMIT + 1e-3
    assert (found[10:12] > 25 * planes[10:12]).all()  # what is smaller still is lifted
    assert found[12].abs() < 1e-3  # and rounding is not taken for momentum


@pytest.mark.parametrize("step", range(3))
def test_each_quintic_is_the_best_on_what_the_one_before_makes(step: int) -> None:
    values = torch.linspace(SMALLEST, 1, 20001, dtype=torch.float64)
    for a, b, c in QUINTICS[: step + 1]:
        before = values.sort().values
        values = a * values + b * values**3 + c * values**5
    errors = a * before + b * before**3 + c * before**5 - 1
    largest = errors.abs().max()
    signs = errors[errors.abs() > 0.98 * largest].sign()
    assert (signs.diff() != 0).sum() >= 3  # four extrema in turn: no other such polynomial is nearer to 1 (Chebyshev)
    if step == 2:
        assert 1 + largest == pytest.approx(SIGN_LIMIT, abs=1e-3)


@pytest.mark.parametrize("size", [0.05, 0.165, 0.3, MAX_STEP])
def test_a_retraction_leaves_little_of_any_step(size: float) -> None:
    R, A = rotation_of((12, 12), 0), skew(noise((12, 12), 1))
    U = A * (size / torch.linalg.matrix_norm(A, 2))
    found = retract(R, U, size).double()
    assert torch.linalg.matrix_norm(found.mT @ found - torch.eye(12), 2) < DRIFT
    left, _, right = torch.linalg.svd((R - R @ U).double())
    assert torch.linalg.matrix_norm(found - left @ right, 2) < DRIFT / 2


@by_shape
def test_skew_is_the_antisymmetric_part(shape: tuple[int, ...]) -> None:
    A = noise(shape, 0)
    assert torch.equal(skew(A), -skew(A).mT)
    torch.testing.assert_close(skew(A) + (A + A.mT) / 2, A)
    assert not skew(A + A.mT).any()


# Invertible maps.

by_kind = pytest.mark.parametrize("kind", GRADIENTS)
by_class = pytest.mark.parametrize("optimizer_class", [RiemannianAdam, Spectral])
HEADS = (3, 6, 6)


def largest_condition(n: int) -> float:
    return 1.001 * math.sqrt(n) / FLOOR


@by_class
@by_kind
@pytest.mark.parametrize("learning_rate", [1e-3, 0.1, 10.0, 1e4])
def test_invertible_maps_stay_well_conditioned(
    optimizer_class: type[RiemannianAdam | Spectral], kind: str, learning_rate: float
) -> None:
    optimizer = optimizer_class(identity(HEADS), learning_rate, "invertible")
    for step in range(60):
        M = optimizer.rotation()
        assert M.isfinite().all(), step
        assert torch.linalg.cond(M.double()).max() < largest_condition(6), step
        optimizer.update(GRADIENTS[kind](noise(HEADS, step)), torch.zeros(()))


@by_class
def test_a_gradient_that_always_stretches_the_same_way_ends_at_the_bound(
    optimizer_class: type[RiemannianAdam | Spectral],
) -> None:
    optimizer = optimizer_class(identity(HEADS), 0.1, "invertible")
    pull = torch.diag(torch.tensor([-1.0, -0.5, -0.1, 0.1, 0.5, 1.0])).expand(HEADS)
    for _ in range(300):
        M = optimizer.rotation()
        optimizer.update(torch.linalg.inv(M).mT @ pull, torch.zeros(()))  # M^T G = pull
    found = torch.linalg.cond(optimizer.rotation().double())
    assert (found > 10).all()
    assert (found < largest_condition(6)).all()


@by_class
def test_without_a_gradient_an_invertible_map_stays(optimizer_class: type[RiemannianAdam | Spectral]) -> None:
    optimizer = optimizer_class(identity(HEADS), 0.1, "invertible")
    assert torch.equal(optimizer.rotation(), identity(HEADS))
    for _ in range(3):
        optimizer.update(torch.zeros(HEADS), torch.zeros(()))
    torch.testing.assert_close(optimizer.rotation(), identity(HEADS), rtol=0, atol=1e-6)


@by_class
def test_they_approach_a_map_that_no_rotation_is_near(optimizer_class: type[RiemannianAdam | Spectral]) -> None:
    target = torch.linalg.matrix_exp(0.3 * noise(HEADS, 3))
    target *= math.sqrt(6) / torch.linalg.matrix_norm(target, keepdim=True)
    learning_rate = {RiemannianAdam: 0.005, Spectral: 0.05}[optimizer_class]
    reached = {}
    for value_map in GROUPS:
        optimizer = optimizer_class(identity(HEADS), learning_rate, value_map)
        start = (optimizer.rotation() - target).norm()
        for step in range(300):
            optimizer.update(optimizer.rotation() - target, torch.tensor(step / 300))
        reached[value_map] = float((optimizer.rotation() - target).norm() / start)
    assert reached["invertible"] < 0.01 < 0.3 < reached["orthogonal"]


def test_a_small_step_is_that_along_the_whole_gradient_in_the_body_frame() -> None:
    M = stretch(identity(HEADS) + 0.2 * noise(HEADS, 1), torch.zeros(HEADS))
    G = noise(HEADS, 2)
    optimizer = Spectral(M, 1e-3, "invertible")
    optimizer.update(G, torch.zeros(()))
    left, _, right = torch.linalg.svd(M.mT @ G)
    expected = stretch(M, 1e-3 * left @ right)
    assert (optimizer.rotation() - expected).norm() < 0.3 * (expected - stretch(M, torch.zeros(HEADS))).norm()


def test_a_step_keeps_a_maps_size_and_lifts_its_small_singular_values() -> None:
    left, _, right = torch.linalg.svd(noise(HEADS, 0).double())
    values = torch.tensor([5.0, 1.5, 1.0, 0.3, 0.1, 0.04], dtype=torch.float64)
    scaled = values * math.sqrt(6) / values.norm()
    expected = scaled + (0.75 * FLOOR) ** 4 / (3 * scaled**3)
    found = stretch(left * values @ right, torch.zeros(HEADS).double())
    torch.testing.assert_close(found, left * expected @ right, rtol=1e-9, atol=1e-9)
    assert FLOOR < expected.min() < 1.1 * FLOOR
    assert scaled.min() < 0.5 * FLOOR
    torch.testing.assert_close(stretch(7 * left * values @ right, torch.zeros(HEADS).double()), found)


@by_kind
def test_a_step_of_any_size_is_cut_where_a_map_would_lose_its_inverse(kind: str) -> None:
    U = GRADIENTS[kind](noise(HEADS, 0))
    cut_U = cut(U)
    norms = torch.linalg.matrix_norm(U, 2), torch.linalg.matrix_norm(cut_U, 2)
    assert (norms[1] < MAX_STEP + 1e-5).all()
    assert (norms[1] > 0.2 * norms[0].clamp_max(MAX_STEP) - 1e-9).all()
    torch.testing.assert_close(norms[1][norms[0] < 0.2], norms[0][norms[0] < 0.2])


def test_a_qr_factor_is_no_invertible_map() -> None:
    with pytest.raises(AssertionError, match="PruneConfig refuses it"):
        AdamQR(identity(HEADS), 0.01, "invertible")
