"""ADMM: look for the mask and the weights at once, with an ever stronger pull towards the sparsity pattern.

Legend: d_out, d_in = outputs and inputs of a linear; H = 2/N X X^T, damped here; e_j = 1 / sqrt([H^-1]_jj), (d_in,).
Everything is scaled by e: A = W e is the dense weight, G = H / (e e^T) the Hessian.

The problem: least tr((A - V) G (A - V)^T) with V = D, where D has the pattern; u is the multiplier of V = D divided by
the penalty rho. With K = rho (G + rho I)^-1 a round of ADMM is

    V = A - (A - D + u) K        the least error near D - u
    D = V + u on the mask        the nearest matrix of the pattern: the mask is where V + u is largest
    u = V + u off the mask

so D and u never meet, and one tensor T = D + u with its mask holds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners.masks import PrunedLinear, grouped_mask, matrix_mask, num_removed, require_finite, validate
from drotator.pruners.solve import solve_on_mask
from drotator.pruners.sparsegpt import inverse_factor, invert_lower

FIRST_PENALTY, LAST_PENALTY = 1.0, 3.0
STAGES = 5
SOLVE_STEPS = 10


@torch.no_grad()
def prune_admm(
    weights: Sequence[Tensor], H: Tensor, sparsity: SparsityConfig, settings: PrunerConfig
) -> list[PrunedLinear]:
    """Remove weights by ADMM, then fit those that are left to the dense outputs.

    Unstructured masks are compared over a whole matrix, as scaled weights are worth the same in every row: that costs
    2 to 24 % less error than a comparison within rows (SmolLM2-135M, 50 % and 70 %). A dead input (H_jj = 0) is worth
    nothing: its weights go first, and those that must stay are not changed.

    Args:
        weights: (d_out, d_in) each, float32 or float64, not modified.
        H: (d_in, d_in) dtype and device of the weights, symmetric, undamped, not modified.
        settings: iterations and damping are read.
    Raises: ValueError if the group does not divide d_in; RuntimeError if a weight or H is not finite, or if H is not
        positive definite even with its damping raised.
    Source: ALPS, arXiv 2406.07831, and ADMM-Grad, arXiv 2401.02938; they scale by sqrt(H_jj), `search` says why not.
    """
    for W in weights:
        validate(sparsity, W.shape[1], "the weight")
        require_finite(W, "The weight W")
    require_finite(H, "The Hessian H")
    U, damping = inverse_factor(H, settings.damping)
    dead = H.diagonal() == 0
    scale = U.square().sum(dim=0).rsqrt()
    del U
    G = H.clone()
    G.diagonal().add_(damping * H.diagonal().mean() + dead)
    G.div_(torch.outer(scale, scale))
    A = torch.cat([torch.where(dead, 0, W * scale) for W in weights])
    rows = [len(W) for W in weights]
    found = search(A, G, sparsity, settings.iterations, rows)
    del A, G
    pruned = []
    for W, T, mask in zip(weights, *(each.split(rows) for each in found), strict=True):
        start = torch.where(mask, torch.where(dead, W, T / scale), 0)
        weight = solve_on_mask(W, start, mask, H, damping=damping, steps=SOLVE_STEPS)
        pruned.append(PrunedLinear(weight, mask, damping))
    return pruned


def search(
    A: Tensor, G: Tensor, sparsity: SparsityConfig, iterations: int, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run ADMM for a fixed number of iterations, one product with K each, without waiting for the device.

    Why e, and why penalties from 1 on: where a single weight is removed and all others make up for it, its multiplier
    is A_ij / [G^-1]_jj, which is A_ij in these units, so u comes to rest at A_ij / rho. From rho = 1 on a removed
    weight cannot oust a kept one by its own worth, only by what the other removals add to it. Below 1 masks never come
    to rest, far above 1 they stay as they began; the same penalties fit every linear.

    The penalty grows geometrically in stages, as each value takes a K of its own. The eigenvectors of G would serve any
    penalty, but as two products an iteration in place of one, and a GPU is far slower at them than at factoring.

    Args:
        A: (d_out, d_in) float32 or float64, contiguous, the scaled weights of all linears, not modified.
        G: (d_in, d_in) dtype of A, the scaled, damped Hessian, whose inverse has a unit diagonal.
        rows: of each linear.
    Returns: T (d_out, d_in) dtype of A, where the mask is True the scaled sparse weight; mask (d_out, d_in) bool.
    """
    mask = keep_largest(A, sparsity, rows)
    T = torch.where(mask, A, 0)
    last = FIRST_PENALTY
    for rho, length in penalties(iterations):
        K = proximal(G, rho)
        T = torch.where(mask, T, T * (last / rho))  # the multiplier is rho u; it must not jump with rho
        last = rho
        for _ in range(length):
            T = torch.addmm(A + torch.where(mask, 0, T), A - torch.where(mask, T, -T), K, alpha=-1)
            mask = keep_largest(T, sparsity, rows)
    return T, mask


def penalties(iterations: int) -> list[tuple[float, int]]:
    """Share the iterations out over the stages: (rho, iterations with it), rho from FIRST_ to LAST_PENALTY."""
    stages = min(STAGES, iterations)
    growth = (LAST_PENALTY / FIRST_PENALTY) ** (1 / max(stages - 1, 1))
    bounds = [stage * iterations // stages for stage in range(stages + 1)]
    return [(FIRST_PENALTY * growth**stage, bounds[stage + 1] - bounds[stage]) for stage in range(stages)]


def proximal(G: Tensor, rho: float) -> Tensor:
    """Return K = rho (G + rho I)^-1, (d_in, d_in) dtype of G.

    Factored in float64: nothing but d_in / damping bounds the norm of G, and beside 10^6 float32 has no digits for rho.
    The inverse factor is at most 1 / sqrt(rho) and may be squared in any dtype; torch.cholesky_inverse would wait for
    the device.
    """
    shifted = G.to(torch.float64, copy=True)
    shifted.diagonal().add_(rho)
    factor = torch.linalg.cholesky_ex(shifted).L
    del shifted
    invert_lower(factor)
    factor = factor.to(G.dtype)
    return (factor.T @ factor).mul_(rho)


def keep_largest(T: Tensor, sparsity: SparsityConfig, rows: Sequence[int]) -> Tensor:
    """Mark the largest |T| of every group, or of each linear; exact counts. (d_out, d_in) -> (d_out, d_in) bool."""
    if sparsity.is_grouped:
        return grouped_mask(T.abs(), sparsity.keep, sparsity.group)
    return torch.cat([matrix_mask(part, num_removed(sparsity, *part.shape)) for part in T.abs().split(rows)])
