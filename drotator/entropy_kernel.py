"""The two passes of the entropy along the columns of a large rotated weight, as Triton kernels for bfloat16 on a GPU.

What torch.compile makes of them is bound by instructions: the logarithm that it calls takes some twenty. A GPU has one
for it, exact to 2^-22, with which both passes are bound by memory.

Legend: T (d, n) = the weight as products of 8-bit factors leave it; scale (d,) = what its rows are to be multiplied
by; S = (scale T)^2 * strength = importances; a tile is (ROWS, COLUMNS). Columns are summed in PARTS of the rows, and
rows in PARTS of the columns.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from drotator.products import GRADIENT8
from drotator.triton_support import tl, triton, works

ROWS, COLUMNS = 16, 128
PARTS = 8
NUM_WARPS = 4
TINY = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(GRADIENT8).max
LOG2 = math.log(2)
HAS_PTX = True
"""Not where Triton is interpreted."""


def is_available(T: Tensor, strength: Tensor | None) -> bool:
    """Tell whether the kernels work on such a weight."""
    fits = T.dtype == torch.bfloat16 and T.shape[0] % ROWS == 0 and T.shape[1] % COLUMNS == 0
    fits = fits and T.is_contiguous() and (strength is None or strength.is_contiguous())
    return T.is_cuda and fits and triton is not None and _runs_on(T.device)


@cache
def _runs_on(device: torch.device) -> bool:
    T, rows = torch.ones(ROWS, COLUMNS, device=device, dtype=torch.bfloat16), torch.ones(ROWS, device=device)

    def trial() -> None:
        columns = sums(T, rows, rows)[0].sum(0)
        slopes(T, rows, rows, columns, columns)

    return works(trial, device, "steps of the entropy take longer")


def sums(T: Tensor, scale: Tensor, strength: Tensor | None) -> Tensor:
    """Sum S and S log S over parts of the rows: (2, PARTS, n) float32.

    Args:
        T: (d, n) bfloat16. scale, strength: (d,) float32, contiguous; without a strength it is 1.
    """
    d, n = T.shape
    found = torch.empty(2, PARTS, n, device=T.device)
    constants = (ROWS, COLUMNS, PARTS, TINY, LOG2, HAS_PTX)
    with torch.cuda.device_of(T):  # Triton launches on the current device, whatever the tensors' own is
        _sums_kernel[(n // COLUMNS, PARTS)](T, scale, strength, found, d, n, *constants, num_warps=NUM_WARPS)
    return found


def slopes(
    T: Tensor, scale: Tensor, strength: Tensor | None, mean_log: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return D = scale T * (mean_log - log S) * weight, (d, n) GRADIENT8 and held within it, and sums of D scale T over
    parts of the columns, (PARTS, d) float32.

    Args:
        T, scale, strength: as of `sums`. mean_log, weight: (n,) float32, contiguous.
    """
    d, n = T.shape
    D, found = torch.empty(d, n, device=T.device, dtype=GRADIENT8), torch.empty(PARTS, d, device=T.device)
    tensors = (T, scale, strength, mean_log, weight, D, found)
    constants = (LARGEST, ROWS, COLUMNS, PARTS, TINY, LOG2, HAS_PTX)
    with torch.cuda.device_of(T):
        _slopes_kernel[(d // ROWS, PARTS)](*tensors, d, n, *constants, num_warps=NUM_WARPS)
    return D, found


def _multiply_factors(own_scale: tl.tensor, strength: tl.tensor | None, row: tl.tensor) -> tl.tensor:
    """What the squares of some rows of T are multiplied by, (rows,)."""
    factor = own_scale * own_scale
    if strength is not None:
        factor *= tl.load(strength + row)
    return factor


def _take_logarithm(S: tl.tensor, TINY: tl.constexpr, HAS_PTX: tl.constexpr) -> tl.tensor:
    """log2 of S, or of TINY where S is less."""
    above = tl.maximum(S, TINY)
    if HAS_PTX:
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [above], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log = tl.log2(above)
    return log


def _sum_columns(
    T: tl.tensor,  # (d, n) bfloat16
    scale: tl.tensor,  # (d,)
    strength: tl.tensor | None,  # (d,)
    found: tl.tensor,  # (2, PARTS, n), out
    d: int,
    n: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TINY: tl.constexpr,
    LOG2: tl.constexpr,
    HAS_PTX: tl.constexpr,
) -> None:
    """Sum one part of the rows of COLUMNS columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    tiles = tl.cdiv(d // ROWS, PARTS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    of_logs = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(part * tiles * ROWS, tl.minimum((part + 1) * tiles * ROWS, d), ROWS):
        row = start + tl.arange(0, ROWS)
        weights = tl.load(T + row.to(tl.int64)[:, None] * n + column[None, :]).to(tl.float32)
        S = weights * weights * _factor(tl.load(scale + row), strength, row)[:, None]
        total += S
        of_logs += S * _logarithm(S, TINY, HAS_PTX)
    tl.store(found + part * n + column, tl.sum(total, axis=0))
    tl.store(found + (PARTS + part) * n + column, tl.sum(of_logs, axis=0) * LOG2)


def _slope_rows(
    T: tl.tensor,  # (d, n) bfloat16
    scale: tl.tensor,  # (d,)
    strength: tl.tensor | None,  # (d,)
    mean_log: tl.tensor,  # (n,)
    weight: tl.tensor,  # (n,)
    D: tl.tensor,  # (d, n) float8, out
    found: tl.tensor,  # (PARTS, d), out
    d: int,
    n: int,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TINY: tl.constexpr,
    LOG2: tl.constexpr,
    HAS_PTX: tl.constexpr,
) -> None:
    """Work on one part of the columns of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    tiles = tl.cdiv(n // COLUMNS, PARTS)
    own_scale = tl.load(scale + row)
    factor = _factor(own_scale, strength, row)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(part * tiles * COLUMNS, tl.minimum((part + 1) * tiles * COLUMNS, n), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = row.to(tl.int64)[:, None] * n + column[None, :]
        weights = tl.load(T + place).to(tl.float32)
        log = _logarithm(weights * weights * factor[:, None], TINY, HAS_PTX)
        weights *= own_scale[:, None]
        slope = (tl.load(mean_log + column)[None, :] - LOG2 * log) * tl.load(weight + column)[None, :]
        gradient = tl.minimum(tl.maximum(weights * slope, -LARGEST), LARGEST)
        tl.store(D + place, gradient.to(D.dtype.element_ty))
        total += gradient * weights
    tl.store(found + part * d + row, tl.sum(total, axis=1))


_factor: Any = triton.jit(_multiply_factors) if triton else None
_logarithm: Any = triton.jit(_take_logarithm) if triton else None
_sums_kernel: Any = triton.jit(_sum_columns) if triton else None
_slopes_kernel: Any = triton.jit(_slope_rows) if triton else None
