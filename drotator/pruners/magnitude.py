"""Magnitude pruning: the smallest weights go, whatever their inputs are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners.masks import (
    PrunedLinear,
    apply_mask,
    grouped_mask,
    matrix_mask,
    num_removed,
    require_finite,
    validate,
)


@torch.no_grad()
def prune_magnitude(
    weights: Sequence[Tensor], H: Tensor, sparsity: SparsityConfig, settings: PrunerConfig
) -> list[PrunedLinear]:
    """Remove the smallest weights of every group, or of each whole matrix.

    Args:
        weights: (d_out, d_in) each, float32 or float64, not modified.
        H: not read.
        settings: not read.
    Raises: ValueError if the group does not divide d_in; RuntimeError if a weight is not finite.
    """
    return [_prune(W, sparsity) for W in weights]


def _prune(W: Tensor, sparsity: SparsityConfig) -> PrunedLinear:
    validate(sparsity, W.shape[1], "the weight")
    require_finite(W, "The weight W")
    importance = W.abs()
    if sparsity.is_grouped:
        mask = grouped_mask(importance, sparsity.keep, sparsity.group)
    else:
        mask = matrix_mask(importance, num_removed(sparsity, *W.shape))
    return PrunedLinear(apply_mask(W, mask), mask, damping=0.0)
