"""The best values for weights whose mask is chosen: conjugate gradients on the kept weights, all rows at once.

Legend: d_out, d_in = outputs and inputs of a linear; W the dense weight, V the sparse one, H = 2/N X X^T. A row of V
has its own least squares problem, on its own kept inputs, but one product with H serves all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drotator.pruners.masks import require_finite


@torch.no_grad()
def solve_on_mask(W: Tensor, start: Tensor, mask: Tensor, H: Tensor, *, damping: float, steps: int) -> Tensor:
    """Move the kept weights towards the least error tr((W - V) (H + damping * mean(diag H) I) (W - V)^T).

    Rows do not wait for each other: one that has arrived stays, and one whose error would end above that of its start,
    by rounding, is given back as it started. The loop reads no value back to the host.

    Args:
        W: (d_out, d_in) float32 or float64, the dense weight, not modified.
        start: (d_out, d_in) dtype of W, zero outside the mask, not modified.
        mask: (d_out, d_in) bool, True = kept.
        H: (d_in, d_in) dtype of W, symmetric, positive semidefinite, undamped, not modified. A weight whose input is
            dead (H_jj = 0) has no error to lose if damping is 0, and stays.
        damping: part of the mean diagonal of H that is added to the diagonal, 0 or more.
        steps: products with H; 5 to 10 are enough from the start of a good pruner.
    Returns: (d_out, d_in) dtype of W, +0.0 outside the mask.
    Raises: RuntimeError if H is not finite.
    Source: preconditioned conjugate gradients with the diagonal as preconditioner, as ALPS ends, arXiv 2406.07831,
        section 3.3.
    """
    require_finite(H, "The Hessian H")
    W, start = W.contiguous(), torch.where(mask, start, 0)  # one layout: the same bits for any strides
    H = H.clone(memory_format=torch.contiguous_format)
    diagonal = H.diagonal()
    diagonal += damping * diagonal.mean()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)

    V, gap = start, W - start
    downhill = gap @ H  # half the negative gradient, (d_out, d_in)
    error_at_start = (downhill * gap).sum(dim=1, keepdim=True)
    residual = torch.where(mask, downhill, 0)
    direction = residual * inverse
    energy = (residual * direction).sum(dim=1, keepdim=True)  # (d_out, 1), as are all the factors below
    for _ in range(steps):
        curved = torch.where(mask, direction @ H, 0)
        step = _ratio(energy, (direction * curved).sum(dim=1, keepdim=True))
        V = torch.addcmul(V, step, direction)
        residual = torch.addcmul(residual, step, curved, value=-1)
        preconditioned = residual * inverse
        next_energy = (residual * preconditioned).sum(dim=1, keepdim=True)
        direction = torch.addcmul(preconditioned, _ratio(next_energy, energy), direction)
        energy = next_energy

    gap = W - V
    error = ((gap @ H) * gap).sum(dim=1, keepdim=True)
    # A comparison with NaN is false, so a row that overflowed stays as it started too.
    return torch.where(mask & (error < error_at_start), V, start)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 0 where the row has arrived and nothing is left to divide by."""
    return torch.where(denominator > 0, numerator / denominator, 0)
