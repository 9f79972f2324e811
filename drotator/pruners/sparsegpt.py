"""SparseGPT: remove weights column by column and let the columns to come make up for each.

Legend: d_out, d_in = outputs and inputs of a linear; H = 2/N X X^T; U (d_in, d_in) upper with H^-1 = U^T U, so that
U_jj^2 is the [0, 0] entry of the inverse of H[j:, j:] and U_jj U[j, j:] its first row: all that a removal at column j
needs. Linears that read the same inputs are swept together, as so many more rows; they are held transposed,
(d_in, sum of d_out), so that a column is contiguous.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners import sweep_kernel
from drotator.pruners.masks import (
    MAX_COMPARED,
    PrunedLinear,
    grouped_mask,
    matrix_mask,
    num_removed,
    require_finite,
    validate,
)

logger = logging.getLogger(__name__)

MAX_ESCALATIONS = 3
BLOCK_ROWS = 2048
SPAN = 1024
"""Columns after which what their removals owe to all that come later is paid in one product, which takes a GPU less
time than one for every block."""
PANEL = 8
"""Columns that the plain sweep solves at once, or as many as divide both this and a group."""


@torch.no_grad()
def prune_sparsegpt(
    weights: Sequence[Tensor],
    H: Tensor,
    sparsity: SparsityConfig,
    settings: PrunerConfig,
    *,
    may_use_kernel: bool = True,
) -> list[PrunedLinear]:
    """Remove weights in one sweep over the inputs, correcting the weights that are still to come.

    A dead input (H_jj = 0: never active in the calibration text) costs nothing, so its weights go first; where more of
    them are dead than are to be removed, the rest stay as they are and counts stay exact.

    Args:
        weights: (d_out, d_in) each, float32 or float64, not modified.
        H: (d_in, d_in) dtype and device of the weights, symmetric, undamped, not modified.
        may_use_kernel: sweep by the Triton kernel where there is one.
    Raises: ValueError if the group does not divide d_in; RuntimeError if a weight or H is not finite, or if H is not
        positive definite even with its damping raised.
    Source: SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    for W in weights:
        validate(sparsity, W.shape[1], "the weight")
        require_finite(W, "The weight W")
    require_finite(H, "The Hessian H")
    U, damping = inverse_factor(H, settings.damping)
    gain = torch.where(H.diagonal() == 0, 0, U.diagonal().pow(-2))
    found = sweep(weights, U, gain, sparsity, settings.block_size, may_use_kernel=may_use_kernel)
    rows = [len(W) for W in weights]
    parts = zip(*(each.split(rows) for each in found), strict=True)
    return [PrunedLinear(weight, mask, damping) for weight, mask in parts]


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
    weights: Sequence[Tensor],
    U: Tensor,
    gain: Tensor,
    sparsity: SparsityConfig,
    block_size: int,
    *,
    may_use_kernel: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose the masks and correct the weights, block of columns by block of columns, without waiting for the device.

    N:M masks are chosen at the start of each group, unstructured ones at the start of each block and over all rows of
    each linear, both from weights that all removals before have corrected.

    Args:
        weights: (d_out, d_in) each, not modified.
        U: (d_in, d_in) upper, dtype of the weights.
        gain: (d_in,) importance of a squared weight: 1 / U_jj^2, 0 at dead inputs.
        block_size: columns of a block, rounded up to whole groups.
    Returns: the weights one below the other (sum of d_out, d_in), +0.0 where removed; their masks alike, bool.
    """
    columns = torch.cat([W.T for W in weights], dim=1)  # (d_in, sum of d_out)
    d_in, rows = len(columns), [len(W) for W in weights]
    mask = torch.empty_like(columns, dtype=torch.bool)
    group = sparsity.group if sparsity.is_grouped else 1
    block_size = -(-block_size // group) * group
    has_kernel = may_use_kernel and sweep_kernel.is_available(columns, block_size)
    sweep_block = sweep_kernel.sweep_block if has_kernel else _sweep_block
    removed = [num_removed(sparsity, d_out, d_in) for d_out in rows]
    span = block_size * max(SPAN // block_size, 1)
    owed = torch.empty_like(columns[:span])  # errors of the span's blocks
    for start in range(0, d_in, block_size):
        stop = min(start + block_size, d_in)
        first = start // span * span
        last = min(first + span, d_in)
        block, block_mask = columns[start:stop], mask[start:stop]
        if not sparsity.is_grouped:
            importance = block.square() * gain[start:stop, None]
            for part, kept, count in zip(importance.split(rows, 1), block_mask.split(rows, 1), removed, strict=True):
                kept.copy_(matrix_mask(part, stop * count // d_in - start * count // d_in))
        errors = sweep_block(block, block_mask, U[start:stop, start:stop], gain[start:stop], sparsity)
        columns[stop:last].addmm_(U[start:stop, stop:last].T, errors, alpha=-1)
        owed[start - first : stop - first] = errors
        if stop == last:
            columns[last:].addmm_(U[first:last, last:].T, owed[: last - first], alpha=-1)
    return columns.T.contiguous(), mask.T.contiguous()


def _sweep_block(block: Tensor, mask: Tensor, factor: Tensor, gain: Tensor, sparsity: SparsityConfig) -> Tensor:
    """Prune the columns of one block in order, each removal corrected by the columns of the block to come.

    A CPU spends its time on the number of operations, so they are few: a panel of columns is solved at once, and its
    removals correct the rest in one product. What is removed of a panel, P = gone * (weights - shares^T P), follows in
    as many rounds as a row can lose weights, since each depends on those before it alone. Masks are floats, as
    operations on bool take a CPU several times as long.

    Args:
        block: (width, d_out) weights, pruned in place.
        mask: (width, d_out) bool, written for N:M and read otherwise.
        factor: (width, width) upper, the block of U on its diagonal.
        gain: (width,) importance of a squared weight.
    Returns: errors (width, d_out), what was removed of each column over its U_jj.
    """
    own = factor.diagonal()[:, None]
    shares = (factor / own).triu_(1)  # of a removed weight, that each column to come takes over
    gone = torch.empty_like(block)  # 1 where a weight is removed, else 0
    panel = most = math.gcd(sparsity.group, PANEL)
    if sparsity.is_grouped:
        most = min(panel, sparsity.group - sparsity.keep)
        pairs = _pairs(sparsity.group, block)
    else:
        torch.logical_not(mask, out=gone)
    for start in range(0, len(block), panel):
        if sparsity.is_grouped and start % sparsity.group == 0:
            members = slice(start, start + sparsity.group)
            _choose(block[members].square().mul_(gain[members, None]), sparsity.keep, pairs, gone[members])
        members = slice(start, start + panel)
        weights, goes, inner = block[members], gone[members], shares[members, members].T
        removed = weights * goes
        for _ in range(most - 1):
            removed = torch.addmm(weights, inner, removed, alpha=-1).mul_(goes)
        block[start:].addmm_(shares[members, start:].T, removed, alpha=-1)
    if sparsity.is_grouped:
        torch.logical_not(gone, out=mask)
    errors = block * gone
    block.sub_(errors)
    return errors.div_(own)


def _pairs(group: int, like: Tensor) -> Tensor:
    """Subtract the later from the earlier of each pair of a group: (pairs, group) of 1 and -1, dtype of `like`."""
    earlier, later = torch.triu_indices(group, group, 1, device=like.device)
    members = torch.eye(group, dtype=like.dtype, device=like.device)
    return members[earlier] - members[later]


def _choose(importance: Tensor, keep: int, pairs: Tensor, gone: Tensor) -> None:
    """Write 0 for the `keep` largest of a group of columns and 1 for the others: the mask of grouped_mask in floats.

    Args: importance, gone: (group, d_out); pairs: see `_pairs`.
    """
    group = len(gone)
    if group > MAX_COMPARED:
        torch.logical_not(grouped_mask(importance.T, keep, group).T, out=gone)
        return
    earlier_wins = (pairs @ importance).ge_(0)
    later = torch.arange(group - 1, -1, -1, dtype=gone.dtype, device=gone.device)[:, None]
    ahead = torch.addmm(later, pairs.T, earlier_wins, alpha=-1)  # all that come later, then each pair is settled
    torch.ge(ahead, keep, out=gone)
