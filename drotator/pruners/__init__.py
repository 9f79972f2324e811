"""The pruners: one function each, from weights that read the same inputs and their Hessian to what is left of them.

A new pruner is a function of type `Pruner` and one line in `PRUNERS`; the tests then run on it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners.admm import prune_admm
from drotator.pruners.magnitude import prune_magnitude
from drotator.pruners.masks import PrunedLinear, sparsity_of, validate
from drotator.pruners.sparsegpt import prune_sparsegpt
from drotator.pruners.wanda import prune_wanda

__all__ = ["PRUNERS", "PrunedLinear", "Pruner", "relative_error", "sparsity_of", "validate"]

Pruner = Callable[[Sequence[Tensor], Tensor, SparsityConfig, PrunerConfig], list[PrunedLinear]]
"""(weights (d_out, d_in) each, H (d_in, d_in) = 2/N X X^T undamped, sparsity, settings) -> a PrunedLinear for each.

Writes into none of them. Each weight becomes what it would become alone; what follows from H is computed once for all.
"""

PRUNERS: dict[str, Pruner] = {
    "magnitude": prune_magnitude,
    "wanda": prune_wanda,
    "sparsegpt": prune_sparsegpt,
    "admm": prune_admm,
}


@torch.no_grad()
def relative_error(W: Tensor, W_pruned: Tensor, H: Tensor) -> Tensor:
    """Measure the energy of the outputs that pruning changed, as a part of the energy of all outputs.

    Args:
        W, W_pruned: (d_out, d_in) float, before and after.
        H: (d_in, d_in) dtype of W, undamped.
    Returns: () dtype of W: tr((W-W')H(W-W')^T) / tr(W H W^T); 0 where the dense outputs have no energy and neither
        has the change.
    Source: the layer-wise objective of SparseGPT, arXiv 2301.00774, eq. 1, normalised.
    """
    change = W - W_pruned
    error = ((change @ H) * change).sum()
    energy = ((W @ H) * W).sum()
    return torch.where(energy == 0, error, error / energy)
