"""What the importance of a matrix comes to in a picture: means of blocks, and what the largest weights hold of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGE_CELLS = 256
CURVE_POINTS = 1001
BUCKET_BITS = 20
"""First bits of a float32 above 0, all but 11, by which it is counted: those of a bucket differ by 1 part in 4096."""
CHUNK = 2**24
"""Numbers that are counted at once, which bounds the memory of their buckets."""


@dataclass(frozen=True)
class ImportanceSummary:
    """Of an importance of the shape (d_out, d_in). All arrays are float64.

    image: means of blocks, of IMAGE_CELLS rows and columns at most.
    kept, share: parts of the weights, the most important first, and of the importance that they hold, from 0 to 1, at
        CURVE_POINTS at most; the share is nan throughout if the importance has no finite sum above 0.
    """

    shape: tuple[int, int]
    image: np.ndarray
    kept: np.ndarray
    share: np.ndarray


def summarise(importance: Tensor) -> ImportanceSummary:
    """Summarise an importance, (d_out, d_in) >= 0, where it lies."""
    importance = importance.detach().float()
    d_out, d_in = importance.shape
    kept = np.unique(np.linspace(0, importance.numel(), CURVE_POINTS).round().astype(np.int64))
    sums = _sums_of_largest(importance, kept)
    total = float(sums[-1])
    share = sums / (total if math.isfinite(total) and total > 0 else math.nan)
    image = _block_means(_block_means(importance).mT).mT.cpu().numpy()
    return ImportanceSummary((d_out, d_in), image, kept / importance.numel(), share)


def _sums_of_largest(values: Tensor, counts: np.ndarray) -> np.ndarray:
    """Sums of as many of the largest float32 values >= 0; of a bucket, a part of its sum. Sorting takes memory five
    times over, and 12 s a matrix on two cores."""
    num_buckets = 2**BUCKET_BITS
    numbers, sums = (torch.zeros(num_buckets, device=values.device, dtype=torch.float64) for _ in range(2))
    for chunk in values.flatten().split(CHUNK):
        bucket = (chunk.view(torch.int32) & 0x7FFFFFFF) >> 31 - BUCKET_BITS
        numbers += torch.bincount(bucket, minlength=num_buckets)
        sums += torch.bincount(bucket, weights=chunk.double(), minlength=num_buckets)
    number, total = (np.concatenate([[0.0], part.flip(0).cumsum(0).cpu().numpy()]) for part in (numbers, sums))
    return np.interp(counts, number, total)


def _block_means(rows: Tensor) -> Tensor:
    """Average rows over blocks, to at most IMAGE_CELLS of them. Returns float64."""
    if len(rows) <= IMAGE_CELLS:
        return rows.double()
    edges = np.linspace(0, len(rows), IMAGE_CELLS + 1).round().astype(np.int64)
    return torch.stack([block.mean(0, dtype=torch.float64) for block in rows.split(np.diff(edges).tolist())])
