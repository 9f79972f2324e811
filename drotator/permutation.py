"""The free permutations: which inputs share a group of an N:M mask, found by swaps.

The order of the MLP's intermediate channels, and of the residual channels, is nobody's business but the mask's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drotator.config import SparsityConfig

SWEEPS = 400
MAX_OUTPUTS = 1024
"""Outputs that are looked at: groups differ by what most outputs agree on, so that a sample of them decides."""


@torch.no_grad()
def search_order(importances: Sequence[Tensor], sparsity: SparsityConfig, seed: int) -> Tensor:
    """Find an order of the inputs in which the groups of an N:M mask lose less importance.

    In every sweep the groups are paired at random, and of each pair one input of one is swapped for one of the other
    where that lowers what the two lose. Deterministic for a seed.

    Args:
        importances: (d_in, d_out) each, S^T of all linears that read these inputs; their sum counts.
    Returns: (d_in,) int64: input order[i] goes to place i. The identity where the mask has no groups.
    """
    S = torch.cat(list(importances), dim=1)
    device, num_inputs = S.device, len(S)
    if not sparsity.is_grouped:
        return torch.arange(num_inputs, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    if S.shape[1] > MAX_OUTPUTS:
        S = S[:, torch.randperm(S.shape[1], generator=generator, device=device)[:MAX_OUTPUTS]]
    order = torch.arange(num_inputs, device=device).view(-1, sparsity.group)  # (groups, group)
    half = len(order) // 2
    for _ in range(SWEEPS if half else 0):
        shuffled = torch.randperm(len(order), generator=generator, device=device)
        first, second = shuffled[:half], shuffled[half : 2 * half]
        places = torch.randint(sparsity.group, (2, half), generator=generator, device=device)
        before = order[torch.stack([first, second])]  # (2, half, group)
        after = before.clone()
        pairs = torch.arange(half, device=device)
        after[0, pairs, places[0]] = before[1, pairs, places[1]]
        after[1, pairs, places[1]] = before[0, pairs, places[0]]
        is_better = (lost(S[after], sparsity) < lost(S[before], sparsity))[:, None]
        order[first] = torch.where(is_better, after[0], before[0])
        order[second] = torch.where(is_better, after[1], before[1])
    return order.flatten()


def lost(groups: Tensor, sparsity: SparsityConfig) -> Tensor:
    """Importance that each pair of groups loses: (2, pairs, group, d_out) -> (pairs,)."""
    removed = sparsity.group - sparsity.keep
    return groups.topk(removed, dim=2, largest=False).values.sum((0, 2, 3))
