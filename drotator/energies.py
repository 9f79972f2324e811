"""What importances take from the inputs: S = W^2 * energy, with one factor for each input column.

n = a linear's inputs. H = their second moments, (n, n), undamped; M = what of H a rotation of the inputs turns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def damped(H: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I. The mean of the diagonal is the same in every basis."""
    return H + damping * H.diagonal().mean() * torch.eye(len(H), device=H.device, dtype=H.dtype)


def column_energy(H: Tensor, R: Tensor | None, salience: str, damping: float) -> Tensor:
    """Factor of every input column in S = W^2 * energy, in the basis R.

    Args:
        H: (n, n) float32 or float64, undamped moments in the original basis.
        R: (n, n) orthogonal, or None for the original basis; (n / h, h, h) stands for a block-diagonal one.
            Differentiable.
        salience: wanda: (R^T H R)_jj. obs: 1 / (R^T H^-1 R)_jj. sequential_obs: 1 / U_jj^2 with R^T H^-1 R = U^T U.
    Returns: (n,), > 0.
    Source: DenoiseRotator section 3.3; SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    return rotated_energy(energy_moments(H, salience, damping), R, salience)


def energy_moments(H: Tensor, salience: str, damping: float) -> Tensor:
    """What of H does not change with R: H for wanda, its damped inverse for obs, damped H for sequential_obs."""
    if salience == "wanda":
        return H
    H = damped(H, damping)
    return torch.cholesky_inverse(_cholesky(H)).contiguous() if salience == "obs" else H  # TF32 products want rows


def rotated_energy(M: Tensor, R: Tensor | None, salience: str) -> Tensor:
    """`column_energy` from its `energy_moments` M."""
    if salience != "sequential_obs":
        diagonal = M.diagonal() if R is None else _rotated_diagonal(M, R)
        return diagonal if salience == "wanda" else 1 / diagonal
    # H = V V^T with V upper triangular gives U = V^-1, so 1 / U_jj = V_jj: no inverse is formed.
    if R is not None:
        R = torch.block_diag(*R) if R.ndim == 3 else R
        M = R.mT @ M @ R
    return _cholesky(M.flip(0, 1)).diagonal().flip(0).square()


def _rotated_diagonal(M: Tensor, R: Tensor) -> Tensor:
    """diag(R^T M R) of a symmetric M, (n, n), of which a block-diagonal R sees the blocks alone."""
    if R.ndim == 3:
        blocks = M.unflatten(1, (len(R), -1)).unflatten(0, (len(R), -1)).diagonal(dim1=0, dim2=2)
        M = blocks.permute(2, 0, 1)
    diagonal: Tensor = _RotatedDiagonal.apply(M, R)
    return diagonal.flatten()


class _RotatedDiagonal(torch.autograd.Function):
    """Of a symmetric M that does not change: the product M R gives the value and the gradient, 2 M R diag(grad)."""

    @staticmethod
    def forward(ctx: Any, M: Tensor, R: Tensor) -> Tensor:
        read = M @ R
        ctx.save_for_backward(read)
        return (R * read).sum(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (read,) = ctx.saved_tensors
        return None, read * (2 * grad).unsqueeze(-2)


def _cholesky(H: Tensor) -> Tensor:
    """Lower Cholesky factor, all nan if H is not positive definite: asking for an error would wait for the device."""
    factor, info = torch.linalg.cholesky_ex(H)
    return torch.where(info == 0, factor, torch.nan)


def output_weights(G: Tensor, R: Tensor | None) -> Tensor:
    """Weight of each output of a linear: diag(R^T G R), or what G says where the outputs are not rotated.

    Args:
        G: () the same for all outputs; (d_out,) one for each; (n, n) or (k, h, h) moments of what the outputs do.
        R: (n, n) or (k, h, h), the basis of what reads the outputs: their rotation, M^-T for outputs mapped by M^T.
    Returns: () or (d_out,).
    """
    if G.ndim < 2 or R is None:
        return G
    weights: Tensor = _RotatedDiagonal.apply(G, R)
    return weights.flatten()
