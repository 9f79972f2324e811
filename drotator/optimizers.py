"""Optimizers on the orthogonal group, and on that of the invertible matrices. Each holds its own parameters and knows
the way from them to a rotation.

R is (..., n, n): R1 as one matrix, R2 as a batch of them. G = dL/dR is the gradient in the ambient space. All float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drotator.rotation import inverse_transpose, polar

RETRACTION_STEPS = 2
MAX_STEP = 0.7
FLOOR = 0.05
"""The least singular value of an invertible map, where that of the identity is 1."""
REFERENCE_SIZE = 576
"""hidden_size at which learning_rate of riemannian_adam is stated."""


class RotationOptimizer(Protocol):
    """One group of rotations under optimisation.

    rotation: the current R, detached. update: one step along the gradient G at that R; `progress`, (), runs from 0 to 1
    over the training. can_capture: `update` changes the tensors of `state` in place and nothing else, so that a CUDA
    graph can replay it.
    """

    can_capture: bool
    state: Sequence[Tensor]

    def rotation(self) -> Tensor: ...

    def update(self, G: Tensor, progress: Tensor) -> None: ...


@dataclass(frozen=True)
class Group:
    """A group of matrices: which directions U lead along it from R, and where a step R <- R - R U ends.

    project: the nearest direction to A, (..., n, n). step: (R, U) -> the next R, for a U of any size.
    """

    project: Callable[[Tensor], Tensor]
    step: Callable[[Tensor, Tensor], Tensor]


class AdamQR:
    """The paper's optimizer: Adam on a free matrix A whose QR factor is the rotation, gradient norm clipped to 1.

    The signs of Q's columns are those that make the triangular factor's diagonal positive: Q is then a smooth function
    of A that starts at Q(I) = I.
    Source: DenoiseRotator, section 3.4 and appendix A.
    """

    can_capture = False  # the QR waits for the device
    state: Sequence[Tensor] = ()

    def __init__(self, R: Tensor, learning_rate: float, value_map: str = "orthogonal") -> None:
        assert value_map == "orthogonal", "PruneConfig refuses it: a QR factor is orthogonal"
        self.A = R.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.A], lr=learning_rate)
        self._decompose()

    @torch.enable_grad()
    def _decompose(self) -> None:
        Q, triangular = torch.linalg.qr(self.A)
        self.Q = Q * triangular.detach().diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)

    def rotation(self) -> Tensor:
        return self.Q.detach()

    def update(self, G: Tensor, progress: Tensor) -> None:
        (self.A.grad,) = torch.autograd.grad(self.Q, self.A, G)
        torch.nn.utils.clip_grad_norm_([self.A], 1.0)
        self.optimizer.step()
        self._decompose()


class RiemannianAdam:
    """Adam on the gradient in the body frame, skew-symmetric for a rotation; cosine schedule, Newton-Schulz retraction.

    Omega = (R^T G - G^T R) / 2; the second moment is symmetric, so the step U stays skew; R <- polar(R - R U).
    An invertible map takes Omega = R^T G, and R <- R - R U is kept well-conditioned instead.
    All n (n - 1) / 2 planes are treated alike, where Adam on a QR factor favours the first columns.
    Adam's first steps are signs, whose spectral norm can be far above that of noise: a step is cut to MAX_STEP, inside
    the basin of the retraction.
    """

    can_capture = True

    def __init__(
        self,
        R: Tensor,
        learning_rate: float,
        value_map: str = "orthogonal",
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.R = R.clone()
        self.group = GROUPS[value_map]
        self.learning_rate = learning_rate * math.sqrt(REFERENCE_SIZE / R.shape[-1])
        self.betas = betas
        self.first = torch.zeros_like(R)
        self.second = torch.zeros_like(R)
        self.step = torch.zeros((), device=R.device)
        self.state: Sequence[Tensor] = (self.R, self.first, self.second, self.step)

    def rotation(self) -> Tensor:
        return self.R

    def update(self, G: Tensor, progress: Tensor) -> None:
        self.step.add_(1)
        omega = self.group.project(self.R.mT @ G)
        beta1, beta2 = self.betas
        self.first.lerp_(omega, 1 - beta1)
        self.second.lerp_(omega.square(), 1 - beta2)
        corrected = (self.second / (1 - beta2**self.step)).sqrt_().clamp_min_(torch.finfo(G.dtype).tiny)
        U = self.first / corrected * (cosine(self.learning_rate, progress) / (1 - beta1**self.step))
        self.R.copy_(self.group.step(self.R, U))


class Spectral:
    """Steepest descent in the spectral norm: every plane of the momentum turns by the same angle.

    U = msign(momentum of Omega) is skew, and orthogonal on the planes that have momentum: retracting R - tan(a) R U
    turns those by the angle a and leaves the others alone. a follows a cosine from learning_rate (radians) to 0.
    An invertible map takes the whole momentum: U is orthogonal, and stretches as well as turns.
    """

    can_capture = True

    def __init__(self, R: Tensor, learning_rate: float, value_map: str = "orthogonal", momentum: float = 0.9) -> None:
        self.R = R.clone()
        self.group = GROUPS[value_map]
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.average = torch.zeros_like(R)
        self.state: Sequence[Tensor] = (self.R, self.average)

    def rotation(self) -> Tensor:
        return self.R

    def update(self, G: Tensor, progress: Tensor) -> None:
        R = self.R
        omega = self.group.project(R.mT @ G)
        size = torch.linalg.matrix_norm(omega, keepdim=True).clamp_min(torch.finfo(R.dtype).tiny)
        self.average.lerp_(omega / size, 1 - self.momentum)
        U = self.group.project(matrix_sign(self.average))
        angle = cosine(self.learning_rate, progress).clamp_max(MAX_STEP)
        self.R.copy_(self.group.step(R, angle.tan() * U))


OPTIMIZERS: dict[str, Callable[..., RotationOptimizer]] = {
    "adam_qr": AdamQR,
    "riemannian_adam": RiemannianAdam,
    "spectral": Spectral,
}
"""(R, learning_rate, value_map="orthogonal") -> the optimizer that starts at R."""


def retract(R: Tensor, U: Tensor) -> Tensor:
    """Return the orthogonal polar factor of R - R U for a skew U, (..., n, n), cut to a spectral norm of MAX_STEP.

    |U|_2 <= sqrt(largest absolute row sum of U^2). (R - R U)^T (R - R U) = I - U^2, so the first Newton-Schulz step is
    known without forming that product.
    """
    square = U @ U
    scale = cut(square)
    U, square = U * scale, square * scale.square()
    turned = R - R @ U
    return polar(turned + 0.5 * turned @ square, RETRACTION_STEPS)


def stretch(M: Tensor, U: Tensor) -> Tensor:
    """Return M - M U for any U, (..., n, n), cut to a spectral norm of MAX_STEP, with a bounded condition number.

    The cut leaves M invertible. Its size is free (v and o scale against each other), so it is brought to that of the
    identity: then no singular value s is above sqrt(n). With N = M^-T, M + w N N^T N has s + w / s^3 in the place of s,
    which is (4/3) (3 w)^(1/4) = FLOOR or more, and s but for 1 part in 10^4 from s = 0.3 on. So the condition number
    stays below sqrt(n) / FLOOR, 160 for n = 64.
    """
    M = M - M @ (U * cut(U.mT @ U))
    M = M * (math.sqrt(M.shape[-1]) / torch.linalg.matrix_norm(M, keepdim=True))
    N = inverse_transpose(M)
    return M + (0.75 * FLOOR) ** 4 / 3 * N @ (N.mT @ N)


def cut(square: Tensor) -> Tensor:
    """Factor that brings |U|_2 <= sqrt(largest absolute row sum of U^T U) down to MAX_STEP. square: +-U^T U."""
    bound = square.abs().sum(-1, keepdim=True).amax(-2, keepdim=True).sqrt()
    return (MAX_STEP / bound.clamp_min(MAX_STEP)).to(square.dtype)


def skew(A: Tensor) -> Tensor:
    return (A - A.mT) / 2


def cosine(start: float, progress: Tensor) -> Tensor:
    """Cosine schedule from start (progress 0) to 0 (progress 1)."""
    return start * 0.5 * (1 + torch.cos(math.pi * progress))


def matrix_sign(A: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factor of (..., n, n): quintic Newton-Schulz steps that lift small singular values fast,
    then a cubic one that settles them near 1. Odd polynomials keep a skew matrix skew. Where float32 products
    may be rounded (`float32_products`), these are bfloat16: a direction needs no more.

    Source: Muon (Jordan et al., 2024) for the quintic coefficients.
    """
    X = A / torch.linalg.matrix_norm(A, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    if A.is_cuda and torch.get_float32_matmul_precision() != "highest":
        X = X.bfloat16()
    for _ in range(steps):
        gram = X @ X.mT
        X = 3.4445 * X + (-4.7750 * gram + 2.0315 * gram @ gram) @ X
    return polar(X, 1).to(A.dtype)


GROUPS = {"orthogonal": Group(skew, retract), "invertible": Group(lambda A: A, stretch)}
"""By the name of the map."""
