"""What the importance of a matrix comes to in a picture: means of blocks, and what the largest weights hold of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGE_CELLS = 256
CURVE_POINTS = 1001


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
    """Summarise an importance, (d_out, d_in) >= 0, where it lies: a large one takes a GPU no time to sort."""
    importance = importance.detach().float()
    d_out, d_in = importance.shape
    kept = np.unique(np.linspace(0, importance.numel(), CURVE_POINTS).round().astype(np.int64))
    ordered = importance.flatten().sort(descending=True).values
    sums = ordered.cumsum(0, dtype=torch.float64)[torch.from_numpy(kept[1:] - 1).to(ordered.device)].cpu().numpy()
    total = float(sums[-1])
    share = np.concatenate([[0.0], sums]) / (total if math.isfinite(total) and total > 0 else math.nan)
    image = _block_means(_block_means(importance).mT).mT.cpu().numpy()
    return ImportanceSummary((d_out, d_in), image, kept / importance.numel(), share)


def _block_means(rows: Tensor) -> Tensor:
    """Average rows over blocks, to at most IMAGE_CELLS of them. Returns float64."""
    if len(rows) <= IMAGE_CELLS:
        return rows.double()
    edges = np.linspace(0, len(rows), IMAGE_CELLS + 1).round().astype(np.int64)
    return torch.stack([block.mean(0, dtype=torch.float64) for block in rows.split(np.diff(edges).tolist())])
