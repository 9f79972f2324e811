"""SparseGPT: remove weights column by column and let the columns to come make up for each.

Legend: d_out, d_in = outputs and inputs of a linear; H = 2/N X X^T; U (d_in, d_in) upper with H^-1 = U^T U, so that
U_jj^2 is the [0, 0] entry of the inverse of H[j:, j:] and U_jj U[j, j:] its first row: all that a removal at column j
needs. The weight is held transposed, (d_in, d_out), so that a column of it is contiguous.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners import sweep_kernel
from drotator.pruners.masks import PrunedLinear, grouped_mask, matrix_mask, num_removed, require_finite, validate

logger = logging.getLogger(__name__)

MAX_ESCALATIONS = 3
BLOCK_ROWS = 8192


@torch.no_grad()
def prune_sparsegpt(
    W: Tensor, H: Tensor, sparsity: SparsityConfig, settings: PrunerConfig, *, may_use_kernel: bool = True
) -> PrunedLinear:
    """Remove weights in one sweep over the inputs, correcting the weights that are still to come.

    A dead input (H_jj = 0: never active in the calibration text) costs nothing, so its weights go first; where more of
    them are dead than are to be removed, the rest stay as they are and counts stay exact.

    Args:
        W: (d_out, d_in) float32 or float64, not modified.
        H: (d_in, d_in) dtype and device of W, symmetric, undamped, not modified.
        may_use_kernel: sweep by the Triton kernel where there is one.
    Raises: ValueError if the group does not divide d_in; RuntimeError if W or H is not finite, or if H is not positive
        definite even with its damping raised.
    Source: SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    validate(sparsity, W.shape[1], "the weight")
    require_finite(W, "The weight W")
    require_finite(H, "The Hessian H")
    U, damping = inverse_factor(H, settings.damping)
    gain = torch.where(H.diagonal() == 0, 0, U.diagonal().pow(-2))
    weight, mask = sweep(W, U, gain, sparsity, settings.block_size, may_use_kernel=may_use_kernel)
    return PrunedLinear(weight, mask, damping)


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Factor the inverse of the damped Hessian.

    Where it fails, it is tried in float64, then with ten times the damping, at most MAX_ESCALATIONS times.

    Args:
        H: (d_in, d_in) float32 or float64, finite, not modified; a zero on the diagonal (dead input) counts as one.
        damping: part of the mean diagonal of H that is added to the diagonal.
    Returns: U (d_in, d_in) upper, dtype of H, with inverse(H + damping * mean * I) = U^T U; the damping that was used.
    Raises: RuntimeError if no damping tried makes H positive definite.
    """
    diagonal = H.diagonal().double()
    live = torch.where(diagonal == 0, 1, diagonal)
    for escalation in range(MAX_ESCALATIONS + 1):
        used = damping * 10**escalation
        if escalation:
            logger.warning("Hessian (%d x %d): not positive definite, damping raised to %g.", len(H), len(H), used)
        for dtype in dict.fromkeys((H.dtype, torch.float64)):
            # Reversed, H = L L^T gives U = L^-1 reversed: one factorisation, and the inverse is never formed.
            damped = H.flip(0, 1).to(dtype)
            damped.diagonal().copy_((live + used * diagonal.mean()).flip(0))
            L, info = torch.linalg.cholesky_ex(damped)
            del damped  # of 28672 inputs each of these takes 3.3 GB
            if int(info) == 0:
                invert_lower(L)
                return L.to(H.dtype).flip(0, 1), used
    raise RuntimeError(
        f"The Hessian H ({len(H)} x {len(H)}) is not positive definite even with damping {used:g} of its mean "
        f"diagonal. Calibrate with more text (calibration.num_samples), raise pruner.damping, or use pruner=wanda."
    )


def invert_lower(L: Tensor) -> None:
    """Replace a lower triangular matrix, (n, n), by its inverse, block of rows by block of rows, in its own memory."""
    for start in range(0, len(L), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        corner = L[rows, rows]
        identity = torch.eye(len(corner), dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        L[rows, :start] = inverse @ (L[rows, :start] @ L[:start, :start]).neg_()
        corner.copy_(inverse)


def sweep(
    W: Tensor, U: Tensor, gain: Tensor, sparsity: SparsityConfig, block_size: int, *, may_use_kernel: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose the mask and correct the weights, block of columns by block of columns, without waiting for the device.

    N:M masks are chosen at the start of each group, unstructured ones at the start of each block and over all its rows,
    both from weights that all removals before have corrected.

    Args:
        W: (d_out, d_in), not modified.
        U: (d_in, d_in) upper, dtype of W.
        gain: (d_in,) importance of a squared weight: 1 / U_jj^2, 0 at dead inputs.
        block_size: columns of a block, rounded up to whole groups.
    Returns: weight (d_out, d_in) dtype of W, +0.0 where removed; mask (d_out, d_in) bool.
    """
    d_out, d_in = W.shape
    columns = W.T.clone(memory_format=torch.contiguous_format)  # (d_in, d_out)
    mask = torch.empty_like(columns, dtype=torch.bool)
    group = sparsity.group if sparsity.is_grouped else 1
    block_size = -(-block_size // group) * group
    has_kernel = may_use_kernel and sweep_kernel.is_available(columns, block_size)
    sweep_block = sweep_kernel.sweep_block if has_kernel else _sweep_block
    removed = num_removed(sparsity, d_out, d_in)
    for start in range(0, d_in, block_size):
        stop = min(start + block_size, d_in)
        block, block_mask = columns[start:stop], mask[start:stop]
        if not sparsity.is_grouped:
            share = stop * removed // d_in - start * removed // d_in
            block_mask.copy_(matrix_mask(block.square() * gain[start:stop, None], share))
        errors = sweep_block(block, block_mask, U[start:stop, start:stop], gain[start:stop], sparsity)
        columns[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return columns.T.contiguous(), mask.T.contiguous()


def _sweep_block(block: Tensor, mask: Tensor, factor: Tensor, gain: Tensor, sparsity: SparsityConfig) -> Tensor:
    """Prune the columns of one block in order, each removal corrected by the columns of the block to come.

    Args:
        block: (width, d_out) weights, pruned in place.
        mask: (width, d_out) bool, written for N:M and read otherwise.
        factor: (width, width) upper, the block of U on its diagonal.
        gain: (width,) importance of a squared weight.
    Returns: errors (width, d_out), what was removed of each column over its U_jj.
    """
    errors = torch.empty_like(block)
    for j in range(len(block)):
        if sparsity.is_grouped and j % sparsity.group == 0:
            members = slice(j, j + sparsity.group)
            importance = block[members].square() * gain[members, None]
            mask[members] = grouped_mask(importance.T, sparsity.keep, sparsity.group).T
        pruned = torch.where(mask[j], block[j], 0)
        torch.div(block[j] - pruned, factor[j, j], out=errors[j])
        block[j] = pruned
        block[j + 1 :].addmm_(factor[j, j + 1 :, None], errors[j : j + 1], alpha=-1)
    return errors
