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

from drotator.graphs import fused
from drotator.products import Products
from drotator.rotation import eye_like, inverse_transpose
from drotator.symmetric_kernel import add_product

MAX_STEP = 0.7
"""Largest |U|_2 of a step R <- R - R U, inside the basin of the retraction."""
DRIFT = 1e-3
"""|R^T R - I|_2 that a retraction may leave; the next one takes it up."""
FLOOR = 0.05
"""The least singular value of an invertible map, where that of the identity is 1."""
SMALLEST, SIGN_LIMIT = 0.02, 1.094
QUINTICS = ((7.711, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013), (2.2183, -1.594, 0.4107))
"""a x + b x^3 + c x^5, each with the least largest |1 - p(x)| on what the one before makes of [SMALLEST, 1]; the last
leaves [2 - SIGN_LIMIT, SIGN_LIMIT]. Greedy choice is optimal: Polar Express, Amsel et al., arXiv 2505.16932."""
FAINT = 1e-4
"""A matrix's norm whose eighth power, and that of its inverse, float32 still holds."""
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

    project: the nearest direction to A, (..., n, n). symmetry: -1 where directions are skew, else 0. step: (R, U, size,
        products) -> the next R, for |U|_2 <= size <= MAX_STEP.
    """

    project: Callable[[Tensor], Tensor]
    symmetry: int
    step: Callable[[Tensor, Tensor, float, Products], Tensor]


class AdamQR:
    """The paper's optimizer: Adam on a free matrix A whose QR factor is the rotation, gradient norm clipped to 1.

    The signs of Q's columns are those that make the triangular factor's diagonal positive: Q is then a smooth function
    of A that starts at Q(I) = I.
    Source: DenoiseRotator, section 3.4 and appendix A.
    """

    can_capture = False  # the QR waits for the device
    state: Sequence[Tensor] = ()

    def __init__(
        self, R: Tensor, learning_rate: float, value_map: str = "orthogonal", products: Products = None
    ) -> None:
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
    Adam's first steps are signs, whose spectral norm can be far above that of noise: a step is cut to MAX_STEP.
    """

    can_capture = True

    def __init__(
        self,
        R: Tensor,
        learning_rate: float,
        value_map: str = "orthogonal",
        products: Products = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.R = R.clone()
        self.value_map, self.products = value_map, products
        self.learning_rate = learning_rate * math.sqrt(REFERENCE_SIZE / R.shape[-1])
        self.betas = betas
        self.first = torch.zeros_like(R)
        self.second = torch.zeros_like(R)
        self.step = torch.zeros((), device=R.device)
        self.state: Sequence[Tensor] = (self.R, self.first, self.second, self.step)

    def rotation(self) -> Tensor:
        return self.R

    def update(self, G: Tensor, progress: Tensor) -> None:
        step, state = fused(step_of_adam, self.R), (self.R, self.first, self.second, self.step)
        omega = direction(self.R, G, self.value_map, self.products)
        step(*state, omega, progress, self.learning_rate, self.betas, self.value_map, self.products)


class Spectral:
    """Steepest descent in the spectral norm: every plane of the momentum turns by the same angle.

    U = msign(momentum of Omega) is skew, and orthogonal on the planes that have momentum: retracting R - tan(a) R U
    turns those by the angle a and leaves the others alone. a follows a cosine from learning_rate (radians) to 0.
    An invertible map takes the whole momentum: U is orthogonal, and stretches as well as turns.
    """

    can_capture = True

    def __init__(
        self,
        R: Tensor,
        learning_rate: float,
        value_map: str = "orthogonal",
        products: Products = None,
        momentum: float = 0.9,
    ) -> None:
        self.R = R.clone()
        self.value_map, self.products = value_map, products
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.average = torch.zeros_like(R)
        self.state: Sequence[Tensor] = (self.R, self.average)

    def rotation(self) -> Tensor:
        return self.R

    def update(self, G: Tensor, progress: Tensor) -> None:
        omega = direction(self.R, G, self.value_map, self.products)
        average = fused(average_of_directions, omega)(self.average, omega, self.momentum, self.products)
        fused(step_of_spectral, self.R)(self.R, average, progress, self.learning_rate, self.value_map, self.products)


def direction(R: Tensor, G: Tensor, value_map: str, products: Products) -> Tensor:
    """The gradient in the body frame, (..., n, n), in the dtype of products. What is made here and in
    `average_of_directions` is compiled by itself: a step reads it often, and would make it anew each time."""
    project = GROUPS[value_map].project
    return fused(project, R)(rounded_product(R.mT, G, products))


def step_of_adam(
    R: Tensor,
    first: Tensor,
    second: Tensor,
    num_steps: Tensor,
    omega: Tensor,
    progress: Tensor,
    learning_rate: float,
    betas: tuple[float, float],
    value_map: str,
    products: Products,
) -> None:
    """The step of RiemannianAdam, in place."""
    group, (beta1, beta2), omega = GROUPS[value_map], betas, omega.to(R.dtype)
    num_steps.add_(1)
    first.lerp_(omega, 1 - beta1)
    second.lerp_(omega.square(), 1 - beta2)
    corrected = (second / (1 - beta2**num_steps)).sqrt().clamp_min(torch.finfo(omega.dtype).tiny)
    U = first / corrected * (cosine(learning_rate, progress) / (1 - beta1**num_steps))
    R.copy_(group.step(R, cut(U, products), MAX_STEP, products))


def average_of_directions(average: Tensor, omega: Tensor, momentum: float, products: Products) -> Tensor:
    """Take a direction over its norm into the average, in place, and return that in the dtype of products."""
    omega = omega.to(average.dtype)
    size = torch.linalg.matrix_norm(omega, keepdim=True).clamp_min(torch.finfo(omega.dtype).tiny)
    average.lerp_(omega / size, 1 - momentum)
    return rounded(average, products)


def step_of_spectral(
    R: Tensor, average: Tensor, progress: Tensor, learning_rate: float, value_map: str, products: Products
) -> None:
    """The step of Spectral, in place. average: in the dtype of products."""
    group = GROUPS[value_map]
    largest = min(math.tan(min(learning_rate, 1.0)), MAX_STEP / SIGN_LIMIT)
    turn = cosine(learning_rate, progress).clamp_max(1.0).tan().clamp_max(largest)
    U = turn * matrix_sign(average, group.symmetry)
    R.copy_(group.step(R, U, largest * SIGN_LIMIT, products))


OPTIMIZERS: dict[str, Callable[..., RotationOptimizer]] = {
    "adam_qr": AdamQR,
    "riemannian_adam": RiemannianAdam,
    "spectral": Spectral,
}
"""(R, learning_rate, value_map="orthogonal", products=None) -> the optimizer that starts at R."""


def retract(R: Tensor, U: Tensor, size: float, products: Products = None) -> Tensor:
    """Return R - R U, (..., n, n), for a skew U made orthogonal: the singular values of I - U are sqrt(1 + |U|^2).

    Of cubic Newton-Schulz steps, each of which turns an error e of a singular value into 3/2 e^2, as many are taken as
    a U of that size needs to leave no more than DRIFT. What rounding a matrix near I to 16 bits spoils in I - R R^T is
    its diagonal, the lengths of the rows: that is summed in float32.
    """
    R = R - rounded_product(R, U, products)
    error = math.sqrt(1 + size**2) - 1
    while error > DRIFT / 2:
        low = rounded(R, products)
        missing = add_product(low, low.mT, 1, eye_like(low).expand_as(low), alpha=-1)
        change = missing @ low
        if products is not None:
            lengths = 1 - R.square().sum(-1) - missing.diagonal(dim1=-2, dim2=-1)
            change = change + lengths.unsqueeze(-1) * R
        R = R + 0.5 * change
        error = 1.5 * error**2
    return R


def stretch(M: Tensor, U: Tensor, size: float = MAX_STEP, products: Products = None) -> Tensor:
    """Return M - M U for any U, (..., n, n), of a spectral norm up to MAX_STEP, with a bounded condition number.

    Such a U leaves M invertible. M's size is free (v and o scale against each other), so it is brought to that of the
    identity: then no singular value s is above sqrt(n). With N = M^-T, M + w N N^T N has s + w / s^3 in the place of s,
    which is (4/3) (3 w)^(1/4) = FLOOR or more, and s but for 1 part in 10^4 from s = 0.3 on. So the condition number
    stays below sqrt(n) / FLOOR, 160 for n = 64.
    """
    M = M - M @ U.to(M.dtype)
    M = M * (math.sqrt(M.shape[-1]) / torch.linalg.matrix_norm(M, keepdim=True))
    N = inverse_transpose(M)
    return M + (0.75 * FLOOR) ** 4 / 3 * N @ (N.mT @ N)


def cut(U: Tensor, products: Products = None) -> Tensor:
    """Scale U, (..., n, n), so that |U|_2 <= sqrt(largest absolute row sum of U^T U) is MAX_STEP or less."""
    bound = rounded_product(U.mT, U, products).abs().sum(-1, keepdim=True).amax(-2, keepdim=True).sqrt()
    return U * (MAX_STEP / bound.clamp_min(MAX_STEP)).to(U.dtype)


def rounded(A: Tensor, products: Products) -> Tensor:
    return A if products is None else A.to(products)


def rounded_product(A: Tensor, B: Tensor, products: Products) -> Tensor:
    """A B, (..., n, n), of `rounded` factors and rounded as they are."""
    return rounded(A, products) @ rounded(B, products)


def skew(A: Tensor) -> Tensor:
    return (A - A.mT) / 2


def cosine(start: float, progress: Tensor) -> Tensor:
    """Cosine schedule from start (progress 0) to 0 (progress 1)."""
    return start * 0.5 * (1 + torch.cos(math.pi * progress))


def matrix_sign(A: Tensor, symmetry: int = 0) -> Tensor:
    """Approximate polar factor of (..., n, n), by odd quintic polynomials. symmetry: -1 if A is skew, else 0.

    They bring singular values from SMALLEST to 1 of A, over a bound of its largest, within SIGN_LIMIT of 1 on both
    sides, and lift smaller ones by as much. Odd polynomials keep a skew matrix skew. The bound is the Schatten 8-norm,
    (sum s^8)^(1/8), which the first polynomial's own products give: for a matrix of noise it is far below the Frobenius
    norm, so that fewer steps do. It is 1 / FAINT at most; from FAINT down, what is returned fades with A.
    Source: Muon (Jordan et al., 2024) for the form of the steps.
    """
    for step, (a, b, c) in enumerate(QUINTICS):
        gram = add_product(A, A.mT, 1)
        if step == 0:
            square = add_product(gram, gram, 1)
            bound = torch.linalg.matrix_norm(square, keepdim=True).float() ** 0.25
            scale = torch.exp2(-bound.clamp_min(FAINT).log2().ceil()).to(A.dtype)  # exact in any format
            A, gram, square = A * scale, gram * scale**2, square * scale**4
            of_gram = torch.add(b * gram, square, alpha=c)
        else:
            of_gram = add_product(gram, gram, 1, gram, beta=b, alpha=c)
        A = add_product(of_gram, A, symmetry, A, beta=a)
    return A


def unchanged(A: Tensor) -> Tensor:
    return A


GROUPS = {"orthogonal": Group(skew, -1, retract), "invertible": Group(unchanged, 0, stretch)}
"""By the name of the map."""
