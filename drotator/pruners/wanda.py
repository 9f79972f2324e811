"""Wanda: a weight matters as much as its square times the energy of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners.masks import (
    PrunedLinear,
    apply_mask,
    grouped_mask,
    num_removed,
    require_finite,
    row_mask,
    validate,
)


@torch.no_grad()
def prune_wanda(W: Tensor, H: Tensor, sparsity: SparsityConfig, settings: PrunerConfig) -> PrunedLinear:
    """Remove the weights of least W_ij^2 H_jj of every group, or of every row. The others stay as they are.

    Args:
        W: (d_out, d_in) float32 or float64, not modified.
        H: (d_in, d_in) dtype of W, 2/N X X^T over N calibration tokens; only the diagonal is read.
        settings: not read.
    Raises: ValueError if the group does not divide d_in; RuntimeError if W or the diagonal of H is not finite.
    Source: Wanda, arXiv 2306.11695, eq. 1, squared.
    """
    validate(sparsity, W.shape[1], "the weight")
    require_finite(W, "The weight W")
    require_finite(H.diagonal(), "The diagonal of the Hessian H")
    importance = W.square() * H.diagonal()
    if sparsity.is_grouped:
        mask = grouped_mask(importance, sparsity.keep, sparsity.group)
    else:
        mask = row_mask(importance, num_removed(sparsity, *W.shape))
    return PrunedLinear(apply_mask(W, mask), mask, damping=0.0)
