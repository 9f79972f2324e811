"""Wanda: a weight matters as much as its square times the energy of its input."""

from __future__ import annotations

from collections.abc import Sequence

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
def prune_wanda(
    weights: Sequence[Tensor], H: Tensor, sparsity: SparsityConfig, settings: PrunerConfig
) -> list[PrunedLinear]:
    """Remove the weights of least W_ij^2 H_jj of every group, or of every row. The others stay as they are.

    Args:
        weights: (d_out, d_in) each, float32 or float64, not modified.
        H: (d_in, d_in) dtype of the weights, 2/N X X^T over N calibration tokens; only the diagonal is read.
        settings: not read.
    Raises: ValueError if the group does not divide d_in; RuntimeError if a weight or the diagonal of H is not finite.
    Source: Wanda, arXiv 2306.11695, eq. 1, squared.
    """
    energy = H.diagonal()
    require_finite(energy, "The diagonal of the Hessian H")
    return [_prune(W, energy, sparsity) for W in weights]


def _prune(W: Tensor, energy: Tensor, sparsity: SparsityConfig) -> PrunedLinear:
    validate(sparsity, W.shape[1], "the weight")
    require_finite(W, "The weight W")
    importance = W.square() * energy
    if sparsity.is_grouped:
        mask = grouped_mask(importance, sparsity.keep, sparsity.group)
    else:
        mask = row_mask(importance, num_removed(sparsity, *W.shape))
    return PrunedLinear(apply_mask(W, mask), mask, damping=0.0)
