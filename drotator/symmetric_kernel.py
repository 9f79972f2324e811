"""Products of matrices of which is known that they are symmetric, or skew, as one Triton kernel on a GPU.

Half of such a product says it all: only the tiles on and below the diagonal are computed, and each is stored twice, as
it is and mirrored. cuBLAS has this (syrk) for float32 alone.

Nothing is tuned at run time: processes that work together have to find the same rotations, to the last bit.

Legend: n = the size of the matrices; a tile is (TILE, TILE), and triangle(t) = t (t + 1) / 2.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from drotator.triton_support import descriptor, tl, triton, works

SMALLEST = 2048
"""n from which on half the tiles are enough to keep a GPU busy."""
CAPABILITY = (9, 0)
"""Of GPUs that copy tiles of a matrix to shared memory by themselves, and have room there for the stages."""
TILE = 128
DEPTH = 64
"""Columns of A that are loaded at a time, 128 bytes."""
ROWS_TOGETHER = 8  # rows of tiles whose programs run at the same time and find each other's columns in the L2 cache
LAUNCH = {"num_warps": 8, "num_stages": 4}


def add_product(
    A: Tensor, B: Tensor, symmetry: int = 0, D: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return A B, or alpha A B + beta D, as matrices or batches of them.

    Args:
        A, B, D: (..., n, n) of one dtype.
        symmetry: 1 if what is returned is known to be symmetric but for rounding, -1 if it is skew, else 0.
    Returns: (..., n, n) in the dtype of A, summed in float32 where that is bfloat16. Large matrices on a GPU come out
        symmetric, or skew, to the last bit.
    """
    if symmetry and is_available(A):
        found: Tensor = _half_product(A, B, D, symmetry, beta, alpha if D is not None else 1.0)
        return found
    return _whole_product(A, B, D, beta, alpha)


def is_available(A: Tensor) -> bool:
    """Tell whether the kernel multiplies matrices such as A."""
    fits = A.ndim == 2 and A.dtype == torch.bfloat16 and A.shape[-1] >= SMALLEST and A.shape[-1] % TILE == 0
    return A.is_cuda and fits and triton is not None


def _whole_product(A: Tensor, B: Tensor, D: Tensor | None, beta: float, alpha: float) -> Tensor:
    if D is None:
        return A @ B
    add = torch.addmm if A.ndim == 2 else torch.baddbmm
    return add(D, A, B, beta=beta, alpha=alpha)


# An operator of its own, which torch.compile calls without a look inside: what it asks for is known when it runs.
@torch.library.custom_op(
    "drotator::half_product",
    mutates_args=(),
    schema="(Tensor A, Tensor B, Tensor? D, int symmetry, float beta, float alpha) -> Tensor",
)
def _half_product(A: Tensor, B: Tensor, D: Tensor | None, symmetry: int, beta: float, alpha: float) -> Tensor:
    if not _runs_on(A.device):
        return _whole_product(A, B, D, beta, alpha)
    return multiply(A, B, D, symmetry, beta, alpha)


@_half_product.register_fake
def _(A: Tensor, *_: object) -> Tensor:
    return A.new_empty(A.shape)


@cache
def _runs_on(device: torch.device) -> bool:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    tile = torch.ones(TILE, TILE, device=device, dtype=torch.bfloat16)
    return works(lambda: multiply(tile, tile, tile, 1, 1.0, 1.0), device, "products take twice as long")


def multiply(A: Tensor, B: Tensor, D: Tensor | None, symmetry: int, beta: float, alpha: float) -> Tensor:
    """Return alpha A B + beta D, (n, n), of which is known that it equals symmetry times its transpose.

    Args:
        A, B: (n, n) bfloat16, n a multiple of TILE; fastest with the rows of A and the columns of B contiguous.
            (float32 is rounded to TF32, and less well than by cuBLAS: by truncation.)
        D: (n, n) of the same dtype, as symmetric; only its lower triangle counts.
    """
    n = len(A)
    C = torch.empty((n, n), device=A.device, dtype=A.dtype)
    num_rows = n // TILE
    has_columns = B.stride(0) == 1
    rows = descriptor(A.contiguous(), [TILE, DEPTH])
    columns = descriptor(B.mT, [TILE, DEPTH]) if has_columns else descriptor(B.contiguous(), [DEPTH, TILE])
    D = None if D is None else D.contiguous()
    sizes = (has_columns, TILE, DEPTH, ROWS_TOGETHER)
    with torch.cuda.device_of(A):  # Triton launches on the current device, whatever the tensors' own is
        _kernel[(num_rows * (num_rows + 1) // 2,)](
            rows, columns, D, C, n, alpha, beta, float(symmetry), *sizes, **LAUNCH
        )
    return C


def _multiply_tile(
    A: tl.tensor_descriptor,  # (n, n), tiles (TILE, DEPTH)
    B: tl.tensor_descriptor,  # (n, n), tiles (DEPTH, TILE), or B^T, tiles (TILE, DEPTH)
    D: tl.tensor | None,  # (n, n), its rows contiguous
    C: tl.tensor,  # (n, n), its rows contiguous, out
    n: int,
    alpha: float,
    beta: float,
    symmetry: float,
    HAS_COLUMNS: tl.constexpr,  # B is B^T
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS_TOGETHER: tl.constexpr,
) -> None:
    """Compute a tile and store it twice.

    Rows of tiles are taken together by ROWS_TOGETHER, and their tiles column by column: first those left of all their
    diagonals, then the triangle that is left.
    """
    # triangle(first), the tiles before a row, is where it begins in plain order too. sqrt: the result is never nearer
    # than 0.3 / row to another integer.
    place = tl.program_id(0)
    first = (tl.sqrt(2.0 * place + 1.0) - 0.5).to(tl.int32) // ROWS_TOGETHER * ROWS_TOGETHER
    place -= first * (first + 1) // 2
    together = tl.minimum(ROWS_TOGETHER, n // TILE - first)
    if place < first * together:
        i = first + place % together
        j = place // together
    else:
        place -= first * together
        i = (tl.sqrt(2.0 * place + 1.0) - 0.5).to(tl.int32)
        j = first + place - i * (i + 1) // 2
        i += first
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    tile = tl.zeros((TILE, TILE), dtype=tl.float32)
    for inner in range(0, n, DEPTH):
        rows = A.load([i * TILE, inner])
        columns = tl.trans(B.load([j * TILE, inner])) if HAS_COLUMNS else B.load([inner, j * TILE])
        tile = tl.dot(rows, columns, tile, input_precision="tf32")
    tile *= alpha
    if D is not None:
        tile += beta * tl.load(D + row[:, None] * n + column[None, :]).to(tl.float32)
    if i == j:  # it is stored over itself
        tile = 0.5 * (tile + symmetry * tl.trans(tile))
    tl.store(C + row[:, None] * n + column[None, :], tile.to(C.dtype.element_ty))
    tl.store(C + column[:, None] * n + row[None, :], tl.trans(symmetry * tile).to(C.dtype.element_ty))


_kernel: Any = triton.jit(_multiply_tile) if triton else None
