"""SparseGPT's sweep through one block of columns as one Triton kernel, for float32 on a GPU.

In plain torch each column costs some eight launches of a few microseconds of work each. Here a program holds its rows
of the whole block in registers and walks through the columns by itself. It does so panel by panel, since what is in
registers cannot be indexed: a panel is taken out of the block by one sum, its columns are worked off on this small
part, and only the correction of the columns to come runs over all.

Legend: as in sparsegpt.py. A panel is one group of N:M, or UNGROUPED_PANEL columns; as all that Triton holds, it is
padded to a power of two.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from drotator.config import SparsityConfig
from drotator.triton_support import tl, triton, works

MAX_COLUMNS = 256  # of a block, 512 with padding: all that a program's registers hold
UNGROUPED_PANEL = 8
ROWS = 32  # of a program: 128 bytes of each column, one line of memory, and a program a multiprocessor at d_out = 4096
COLUMNS_PER_WARP = 32  # 32 weights a thread


def is_available(columns: Tensor, block_size: int) -> bool:
    """Tell whether the kernel sweeps through blocks of `block_size` of the columns (d_in, d_out) of this weight."""
    fits = columns.is_cuda and columns.dtype == torch.float32 and block_size <= MAX_COLUMNS
    return fits and triton is not None and _runs_on(columns.device)


@cache
def _runs_on(device: torch.device) -> bool:
    block = torch.ones(1, 1, device=device)
    mask = torch.ones_like(block, dtype=torch.bool)

    def trial() -> Tensor:
        return sweep_block(block, mask, block.clone(), block[0].clone(), SparsityConfig())

    return works(trial, device, "SparseGPT takes many times as long")


def sweep_block(block: Tensor, mask: Tensor, factor: Tensor, gain: Tensor, sparsity: SparsityConfig) -> Tensor:
    """Prune the columns of one block in order, each removal corrected by the columns of the block to come.

    Args:
        block: (width, d_out) float32 contiguous, weights, pruned in place.
        mask: (width, d_out) bool contiguous, written for N:M and read otherwise.
        factor: (width, width) float32, the block of U on its diagonal; only its upper triangle is read.
        gain: (width,) float32, importance of a squared weight.
    Returns: errors (width, d_out) float32, what was removed of each column over its U_jj.
    """
    width, d_out = block.shape
    panel = sparsity.group if sparsity.is_grouped else math.gcd(width, UNGROUPED_PANEL)
    padded_panel = triton.next_power_of_2(panel)
    padded_panels = triton.next_power_of_2(width // panel)
    num_warps = min(max(padded_panels * padded_panel // COLUMNS_PER_WARP, 1), 16)
    errors = torch.empty_like(block)
    tensors = (block, mask.view(torch.uint8), errors, factor.contiguous(), gain.contiguous())
    sizes = (d_out, sparsity.keep, panel, width // panel, padded_panel, padded_panels, ROWS)
    with torch.cuda.device_of(block):  # Triton launches on the current device, whatever the tensors' own is
        _kernel[(triton.cdiv(d_out, ROWS),)](*tensors, *sizes, num_warps=num_warps)
    return errors


def _sweep_rows(
    weights: tl.tensor,  # (width, d_out) float32, in and out
    mask: tl.tensor,  # (width, d_out) uint8, out if KEEP, else in
    errors: tl.tensor,  # (width, d_out) float32, out
    factor: tl.tensor,  # (width, width) float32
    gain: tl.tensor,  # (width,) float32
    d_out: int,
    KEEP: tl.constexpr,  # weights kept of a panel, 0 = the mask is given
    PANEL: tl.constexpr,
    PANELS: tl.constexpr,
    PADDED_PANEL: tl.constexpr,
    PADDED_PANELS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Sweep through all columns of the block for ROWS of its rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    member = tl.arange(0, PADDED_PANEL)
    panel = tl.arange(0, PADDED_PANELS)
    is_row = row < d_out
    is_member = member < PANEL
    column = panel[:, None] * PANEL + member[None, :]  # (PADDED_PANELS, PADDED_PANEL)
    is_column = (panel < PANELS)[:, None] & is_member[None, :]
    everywhere = column[:, :, None] * d_out + row[None, None, :]
    tile = tl.load(weights + everywhere, mask=is_column[:, :, None] & is_row[None, None, :], other=0.0)
    for p in range(PANELS):
        first = p * PANEL
        place = (first + member)[:, None] * d_out + row[None, :]
        is_place = is_member[:, None] & is_row[None, :]
        current = tl.sum(tl.where((panel == p)[:, None, None], tile, 0.0), axis=0)  # (PADDED_PANEL, ROWS)
        if KEEP:
            importance = current * current * tl.load(gain + first + member, mask=is_member, other=0.0)[:, None]
            importance = tl.where(is_member[:, None], importance, -1.0)  # padding is behind every weight
            ahead = tl.zeros((PADDED_PANEL, ROWS), dtype=tl.int32)
            for c in range(PANEL):
                rival = tl.sum(tl.where((member == c)[:, None], importance, 0.0), axis=0)[None, :]
                is_ahead = (rival > importance) | ((rival == importance) & (member > c)[:, None])
                ahead += is_ahead.to(tl.int32)
            kept = ahead < KEEP
            tl.store(mask + place, kept.to(tl.uint8), mask=is_place)
        else:
            kept = tl.load(mask + place, mask=is_place, other=0) != 0
        for c in range(PANEL):
            # Loads first and the store last: the compiler cannot know that what they touch does not overlap.
            U = factor + (first + c) * PANEL * PANELS
            own = tl.load(U + first + c)
            near = tl.load(U + first + member, mask=is_member & (member > c), other=0.0)
            far = tl.load(U + column, mask=is_column & (panel > p)[:, None], other=0.0)
            removed = tl.sum(tl.where((member == c)[:, None] & ~kept, current, 0.0), axis=0)  # (ROWS,)
            error = tl.div_rn(removed, own)
            current -= near[:, None] * error[None, :]
            tile -= far[:, :, None] * error[None, None, :]
            tl.store(errors + (first + c) * d_out + row, error, mask=is_row)
        tl.store(weights + place, tl.where(kept, current, 0.0), mask=is_place)


_kernel: Any = triton.jit(_sweep_rows) if triton else None
