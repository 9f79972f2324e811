"""Products of a layer's weights with its rotation, in the precision that is asked for.

d = hidden_size, n = the other side of a weight. A weight is held as X (d, n): W^T of a linear that reads the residual
stream, W of one that writes into it. Then T = R^T X is the rotated weight, transposed for what reads, and X D^T the
gradient of R from that of T.

Float8: X and R as E4M3, D as E5M2, whose range lets gradients go without a scale found at run time; sums are float32.
Source: FP8 Formats for Deep Learning, Micikevicius et al., arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from drotator.architecture import LayerSizes
from drotator.config import OptimizerConfig
from drotator.distributed import ALIGNED
from drotator.graphs import fused

Products = torch.dtype | None
"""Of factors. None: that of the matrices, and nothing is rounded."""

FLOAT8 = torch.float8_e4m3fn
GRADIENT8 = torch.float8_e5m2
LARGEST8 = 256.0
"""Norm of the columns of X and R as E4M3: no entry of them, or of R^T X, is above it, of 448 that the format holds."""
CAPABILITY = (8, 9)
"""Of GPUs that multiply 8 bits."""
DTYPES = {"float8": FLOAT8, "bfloat16": torch.bfloat16, "float32": None}


def choose_products(
    settings: OptimizerConfig, sizes: LayerSizes, stored: torch.dtype, device: torch.device
) -> Products:
    """The dtype of products with R1.

    auto: the fastest that a GPU has for weights stored in 16 bits; nothing is rounded for others, or on a CPU.
    Raises: ValueError for float8 where the device or the sizes do not allow it.
    """
    why_not_8 = why_not_float8(sizes, settings.batches, device)
    if settings.products == "float8" and why_not_8:
        raise ValueError(f"optimizer.products=float8 {why_not_8}. Use bfloat16 or auto.")
    if settings.products != "auto":
        return DTYPES[settings.products]
    if device.type != "cuda" or stored.itemsize > 2:
        return None
    return torch.bfloat16 if why_not_8 else FLOAT8


def name_of(products: Products) -> str:
    """As the setting names it."""
    return next(name for name, dtype in DTYPES.items() if dtype == products)


def why_not_float8(sizes: LayerSizes, batches: int, device: torch.device) -> str:
    """What keeps 8-bit products from a model's layers, in words; empty if nothing does."""
    if device.type == "cuda" and not multiplies_8_bits(device):
        return f"needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))}"
    values = sizes.num_key_value_heads * sizes.head_dim
    counts = (sizes.hidden_size, sizes.intermediate_size, values, sizes.num_attention_heads * sizes.head_dim)
    if any(count % (ALIGNED * batches) for count in counts):
        return f"needs sizes that {ALIGNED * batches} divides, not {', '.join(map(str, counts))}"
    return ""


def multiplies_8_bits(gpu: torch.device) -> bool:
    return torch.cuda.get_device_capability(gpu) >= CAPABILITY


def sixteen_bits(products: Products) -> Products:
    """The dtype of products beside the large ones: 16 bits where those have 8."""
    return torch.bfloat16 if products == FLOAT8 else products


@dataclass(frozen=True)
class Factor:
    """A weight as products with rotations want it.

    X: (d, n). mirrored: X^T, (n, d) in memory, where sums must run along the fast dimension; else None.
    counts: (n,) from 0 to 1, and scale, (): importances of a column of X are multiplied by both; None: by 1.
    Before `of_batch` has chosen, X, mirrored and counts have a dimension in front, of the batches.
    """

    X: Tensor
    mirrored: Tensor | None = None
    counts: Tensor | None = None
    scale: Tensor | None = None

    def of_batch(self, batch: Tensor | None) -> Factor:
        mirrored, counts = (None if part is None else one_of(part, batch) for part in (self.mirrored, self.counts))
        return Factor(one_of(self.X, batch), mirrored, counts, self.scale)

    def columns(self, span: slice) -> Factor:
        if span == slice(0, self.X.shape[1]):
            return self
        mirrored, counts = (None if part is None else part[span] for part in (self.mirrored, self.counts))
        return Factor(self.X[:, span], mirrored, counts, self.scale)


def dealt(W: Tensor, dim: int, batches: int) -> Tensor:
    """Deal the slices of W along a dimension out to batches, like cards: (batches, ...), each contiguous."""
    return W.unflatten(dim, (-1, batches)).movedim(dim + 1, 0).contiguous()


def one_of(hands: Tensor, batch: Tensor | None, dim: int = 0) -> Tensor:
    """One of what lies along a dimension, as what was `dealt` does, chosen on the device; without a batch the first."""
    if batch is None:
        return hands.select(dim, 0)
    bits = hands.view(torch.uint8) if hands.itemsize == 1 else hands  # numbers of 8 bits have no index_select
    return bits.index_select(dim, batch).squeeze(dim).view(hands.dtype)


def factor_of(
    rows: Sequence[Tensor],
    counts: Sequence[Tensor] | None,
    products: Products,
    batches: int = 1,
    *,
    is_scale_free: bool = False,
) -> Factor:
    """Round X^T, given in parts of its rows, and deal X's columns out to batches.

    Args:
        rows: (n_i, d) float32 or float64. counts: (n_i,) each, of the columns of X.
        is_scale_free: what becomes of a column does not depend on its scale, nor therefore on its count.
    """
    rounded, norms = zip(*(_rounded_rows(part, products) for part in rows), strict=True)
    X = dealt(torch.cat(rounded).mT, 1, batches)
    mirrored = X.mT.contiguous() if products == FLOAT8 else None
    if is_scale_free:
        return Factor(X, mirrored)
    whole = torch.cat(norms if counts is None else [a * b for a, b in zip(counts, norms, strict=True)])
    scale = torch.cat([whole, whole.new_full((1,), torch.finfo(whole.dtype).tiny)]).max()
    return Factor(X, mirrored, dealt(whole / scale, 0, batches), scale)


def _rounded_rows(W: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    """W in the dtype of products, and the squares of what its rows are multiplied by to be those of W."""
    if products != FLOAT8:
        return W.to(products), W.new_ones(len(W))
    scale = LARGEST8 / W.norm(dim=1).clamp_min(torch.finfo(W.dtype).tiny ** 0.5)
    return (W * scale[:, None]).to(FLOAT8), scale.square().reciprocal()


class RoundedRotation(NamedTuple):
    """R^T, (d', d), of some columns of R. scale: (d',) what the rows of products with it are multiplied by, or None."""

    rows: Tensor
    scale: Tensor | None


def rounded_rotation(R: Tensor, products: Products) -> RoundedRotation:
    """Round columns of an orthogonal matrix, (d, d'), and scale each so that it keeps its length.

    With 4 bits an entry near 1 is off by up to 3 %, and with it all importances of a column near the basis's own.
    """
    if products != FLOAT8:
        return RoundedRotation(R.to(products).mT, None)
    return RoundedRotation(fused(_transposed8, R)(R), fused(_shortfall, R)(R))  # one after the other: rows, columns


def _transposed8(R: Tensor) -> Tensor:
    return (R.mT * LARGEST8).to(FLOAT8, memory_format=torch.contiguous_format)


def _shortfall(R: Tensor) -> Tensor:
    """Lengths of R's columns, over those of their rounded multiples."""
    return (R.square().sum(0) / (R * LARGEST8).to(FLOAT8).to(R.dtype).square().sum(0)).sqrt()


def rotated(rotation: RoundedRotation, factor: Factor) -> Tensor:
    """R^T X, (d', n), but for the rotation's scale; bfloat16 of 8-bit factors."""
    if factor.mirrored is None:
        return rotation.rows @ factor.X
    return product8(rotation.rows, factor.mirrored)


def gradient_of_rotation(factor: Factor, D: Tensor) -> Tensor:
    """X D^T, (d, d'), in the dtype of D (d', n); bfloat16 of 8-bit factors."""
    return factor.X @ D.mT if factor.mirrored is None else product8(factor.X, D)


def product8(A: Tensor, B: Tensor) -> Tensor:
    """A B^T, the dimension that is summed contiguous in both. The units that do it fast keep 14 bits of the sums."""
    one = torch.ones((), device=A.device)
    scales = (one, ScalingType.TensorWise, one, ScalingType.TensorWise)
    found: Tensor = scaled_mm(A, B.mT, *scales, output_dtype=torch.bfloat16, use_fast_accum=A.is_cuda)
    return found
