"""Optimizers on the orthogonal group. Each holds its own parameters and knows the way from them to a rotation.

R is (..., n, n): R1 as one matrix, R2 as a batch of them. G = dL/dR is the gradient in the ambient space. All float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from drotator.rotation import polar

RETRACTION_STEPS = 2
MAX_STEP = 0.7
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


class AdamQR:
    """The paper's optimizer: Adam on a free matrix A whose QR factor is the rotation, gradient norm clipped to 1.

    The signs of Q's columns are those that make the triangular factor's diagonal positive: Q is then a smooth function
    of A that starts at Q(I) = I.
    Source: DenoiseRotator, section 3.4 and appendix A.
    """

    can_capture = False  # the QR waits for the device
    state: Sequence[Tensor] = ()

    def __init__(self, R: Tensor, learning_rate: float) -> None:
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
    """Adam on the skew-symmetric gradient in the body frame, cosine schedule, Newton-Schulz retraction.

    Omega = (R^T G - G^T R) / 2; the second moment is symmetric, so the step U stays skew; R <- polar(R - R U).
    All n (n - 1) / 2 planes are treated alike, where Adam on a QR factor favours the first columns.
    Adam's first steps are signs, whose spectral norm can be far above that of noise: a step is cut to MAX_STEP, inside
    the basin of the retraction.
    """

    can_capture = True

    def __init__(self, R: Tensor, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.R = R.clone()
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
        omega = skew(self.R.mT @ G)
        beta1, beta2 = self.betas
        self.first.lerp_(omega, 1 - beta1)
        self.second.lerp_(omega.square(), 1 - beta2)
        corrected = (self.second / (1 - beta2**self.step)).sqrt_().clamp_min_(torch.finfo(G.dtype).tiny)
        U = self.first / corrected * (cosine(self.learning_rate, progress) / (1 - beta1**self.step))
        self.R.copy_(retract(self.R, U))


class Spectral:
    """Steepest descent in the spectral norm: every plane of the momentum turns by the same angle.

    U = msign(momentum of Omega) is skew, and orthogonal on the planes that have momentum: retracting R - tan(a) R U
    turns those by the angle a and leaves the others alone. a follows a cosine from learning_rate (radians) to 0.
    """

    can_capture = True

    def __init__(self, R: Tensor, learning_rate: float, momentum: float = 0.9) -> None:
        self.R = R.clone()
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.average = torch.zeros_like(R)
        self.state: Sequence[Tensor] = (self.R, self.average)

    def rotation(self) -> Tensor:
        return self.R

    def update(self, G: Tensor, progress: Tensor) -> None:
        R = self.R
        omega = skew(R.mT @ G)
        size = torch.linalg.matrix_norm(omega, keepdim=True).clamp_min(torch.finfo(R.dtype).tiny)
        self.average.lerp_(omega / size, 1 - self.momentum)
        U = skew(matrix_sign(self.average))
        angle = cosine(self.learning_rate, progress).clamp_max(MAX_STEP)
        self.R.copy_(retract(R, angle.tan() * U))


OPTIMIZERS: dict[str, Callable[[Tensor, float], RotationOptimizer]] = {
    "adam_qr": AdamQR,
    "riemannian_adam": RiemannianAdam,
    "spectral": Spectral,
}


def retract(R: Tensor, U: Tensor) -> Tensor:
    """Return the orthogonal polar factor of R - R U for a skew U, (..., n, n), cut to a spectral norm of MAX_STEP.

    |U|_2 <= sqrt(largest absolute row sum of U^2). (R - R U)^T (R - R U) = I - U^2, so the first Newton-Schulz step is
    known without forming that product.
    """
    square = U @ U
    bound = square.abs().sum(-1, keepdim=True).amax(-2, keepdim=True).sqrt()
    scale = (MAX_STEP / bound.clamp_min(MAX_STEP)).to(U.dtype)
    U, square = U * scale, square * scale.square()
    turned = R - R @ U
    return polar(turned + 0.5 * turned @ square, RETRACTION_STEPS)


def skew(A: Tensor) -> Tensor:
    return (A - A.mT) / 2


def cosine(start: float, progress: Tensor) -> Tensor:
    """Cosine schedule from start (progress 0) to 0 (progress 1)."""
    return start * 0.5 * (1 + torch.cos(math.pi * progress))


def matrix_sign(A: Tensor, steps: int = 6) -> Tensor:
    """Approximate polar factor of (..., n, n): quintic Newton-Schulz steps that lift small singular values fast,
    then two cubic ones that settle all of them near 1. Odd polynomials keep a skew matrix skew.

    Source: Muon (Jordan et al., 2024) for the quintic coefficients.
    """
    X = A / torch.linalg.matrix_norm(A, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    for _ in range(steps):
        gram = X @ X.mT
        X = 3.4445 * X + (-4.7750 * gram + 2.0315 * gram @ gram) @ X
    return polar(X, 2)
