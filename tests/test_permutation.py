"""The free permutations lower what an N:M mask loses, and leave the layer's function as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import families, tiny_source
from torch import Tensor

from drotator.config import SparsityConfig
from drotator.permutation import MAX_OUTPUTS, search_order
from drotator.rotation import fold_norms, reorder_intermediate

GROUPS = [SparsityConfig(keep=keep, group=group) for keep, group in ((2, 4), (4, 8), (1, 3))]

by_sparsity = pytest.mark.parametrize("sparsity", GROUPS, ids=lambda sparsity: sparsity.label)


def importances(num_inputs: int, num_outputs: int) -> Tensor:
    """S^T whose large inputs stand side by side, so that most orders are better than the one given."""
    noise = torch.rand(num_inputs, num_outputs, generator=torch.Generator().manual_seed(0))
    return noise * torch.logspace(0, -2, num_inputs)[:, None]


def loss_of(S: Tensor, order: list[int], sparsity: SparsityConfig) -> float:
    total = 0.0
    for start in range(0, len(order), sparsity.group):
        for column in S[order[start : start + sparsity.group]].T.tolist():
            total += sum(sorted(column)[: sparsity.group - sparsity.keep])
    return total


@by_sparsity
def test_the_order_found_is_a_permutation_that_loses_less(sparsity: SparsityConfig) -> None:
    S = importances(48, 10)
    order = search_order([S[:, :4], S[:, 4:]], sparsity, seed=0).tolist()
    assert sorted(order) == list(range(48))
    assert loss_of(S, order, sparsity) < 0.8 * loss_of(S, list(range(48)), sparsity)


def test_a_seed_gives_one_order_and_another_seed_another() -> None:
    S = importances(48, 10)
    orders = [search_order([S], GROUPS[0], seed) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_of_many_outputs_a_sample_is_looked_at() -> None:
    S = importances(24, MAX_OUTPUTS + 100)
    order = search_order([S], GROUPS[0], seed=0).tolist()
    assert loss_of(S, order, GROUPS[0]) < loss_of(S, list(range(24)), GROUPS[0])


@pytest.mark.parametrize(("sparsity", "num_inputs"), [(SparsityConfig(ratio=0.5), 12), (GROUPS[0], 4)])
def test_without_groups_or_with_one_there_is_nothing_to_order(sparsity: SparsityConfig, num_inputs: int) -> None:
    assert search_order([importances(num_inputs, 3)], sparsity, seed=0).tolist() == list(range(num_inputs))


@families
@torch.no_grad()
def test_another_order_of_the_intermediate_channels_leaves_the_mlp_as_it_was(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, torch.float64)
    layer = source.layer(1)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = fold_norms(layer, source.spec)
    before = layer.mlp(hidden)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    reorder_intermediate(layer, source.spec, weights, order)
    torch.testing.assert_close(layer.mlp(hidden), before, rtol=1e-12, atol=1e-12)
    for name in (source.spec.gate, source.spec.up, source.spec.down):
        assert torch.equal(weights[name], layer.get_submodule(name).weight)
    assert torch.equal(
        layer.get_submodule(source.spec.up).weight, fold_norms(source.layer(1), source.spec)["mlp.up_proj"][order]
    )
