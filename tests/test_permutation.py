"""Orders of inputs that lose less to an N:M mask, against losses that are counted one group after another."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import calls_of, families, some_tokens, tiny_source
from torch import Tensor, nn

from drotator import permutation
from drotator.architecture import ModelSource, hidden_states, linear
from drotator.config import SparsityConfig
from drotator.permutation import MAX_OUTPUTS, search_order
from drotator.rotation import fold_norms, reorder_intermediate
from drotator.statistics import ActivationStream

TWO_OF_FOUR, FOUR_OF_EIGHT = SparsityConfig(keep=2, group=4), SparsityConfig(keep=4, group=8)
ONE_OF_FOUR, HALF = SparsityConfig(keep=1, group=4), SparsityConfig(ratio=0.5)

by_pattern = pytest.mark.parametrize(
    "sparsity", [TWO_OF_FOUR, FOUR_OF_EIGHT, ONE_OF_FOUR], ids=lambda sparsity: sparsity.label
)


def importance(num_inputs: int, num_outputs: int, seed: int = 0) -> Tensor:
    """S^T, (num_inputs, num_outputs): some inputs matter to all outputs, and every output has its own taste."""
    generator = torch.Generator().manual_seed(seed)
    of_inputs = torch.randn(num_inputs, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(num_inputs, num_outputs, generator=generator, dtype=torch.float64)
    return (of_inputs + 0.5 * own).exp()


def lost_by_hand(S: Tensor, order: Tensor, sparsity: SparsityConfig) -> float:
    """Go through all outputs, and through their groups, and add up the smallest of each."""
    total = 0.0
    for output in S[order].T.double().tolist():
        for start in range(0, len(output), sparsity.group):
            total += sum(sorted(output[start : start + sparsity.group])[: sparsity.group - sparsity.keep])
    return total


def identity(S: Tensor) -> Tensor:
    return torch.arange(len(S))


@by_pattern
@pytest.mark.parametrize("num_inputs", [8, 24, 40])
def test_every_input_has_one_place(sparsity: SparsityConfig, num_inputs: int) -> None:
    order = search_order([importance(num_inputs, 5)], sparsity, seed=0)
    assert order.dtype is torch.int64
    assert order.sort().values.tolist() == list(range(num_inputs))


@by_pattern
@pytest.mark.parametrize("seed", range(2))
def test_the_order_loses_less_than_the_identity(sparsity: SparsityConfig, seed: int) -> None:
    S = importance(48, 7, seed)
    order = search_order([S], sparsity, seed)
    assert lost_by_hand(S, order, sparsity) < 0.95 * lost_by_hand(S, identity(S), sparsity)


@by_pattern
@pytest.mark.parametrize("seed", range(2))
def test_an_order_that_cannot_be_bettered_is_kept(sparsity: SparsityConfig, seed: int) -> None:
    S = torch.zeros(48, 7)
    S[torch.arange(48) % sparsity.group < sparsity.keep] = 1  # as many in each group as are kept: nothing is lost
    assert lost_by_hand(S, identity(S), sparsity) == 0
    assert search_order([S], sparsity, seed).tolist() == list(range(48))


@by_pattern
def test_inputs_that_matter_are_shared_out_over_the_groups(sparsity: SparsityConfig) -> None:
    S = torch.full((48, 7), 0.0)
    S[: 48 * sparsity.keep // sparsity.group] = 1.0  # side by side: whole groups of what must not be lost
    assert lost_by_hand(S, identity(S), sparsity) > 0
    assert lost_by_hand(S, search_order([S], sparsity, seed=0), sparsity) == 0


@by_pattern
def test_no_swap_between_two_groups_would_lose_less(sparsity: SparsityConfig) -> None:
    S = importance(2 * sparsity.group, 9)
    order = search_order([S], sparsity, seed=0)
    reached = lost_by_hand(S, order, sparsity)
    for first, second in itertools.product(range(sparsity.group), range(sparsity.group, 2 * sparsity.group)):
        swapped = order.clone()
        swapped[[first, second]] = order[[second, first]]
        assert lost_by_hand(S, swapped, sparsity) >= reached * (1 - 1e-12)


@by_pattern
def test_all_linears_that_read_the_inputs_count(sparsity: SparsityConfig) -> None:
    # The first linear alone would have the inputs that matter to the second one side by side.
    first, second = torch.zeros(48, 3), torch.zeros(48, 5)
    first[torch.arange(48) % sparsity.group < sparsity.keep] = 1
    second[: 48 * sparsity.keep // sparsity.group] = 100
    alone, both = (search_order(given, sparsity, seed=0) for given in ([first], [first, second]))
    S = torch.cat([first, second], dim=1)
    assert alone.tolist() == list(range(48))
    assert lost_by_hand(S, both, sparsity) < 0.5 * lost_by_hand(S, alone, sparsity)
    assert torch.equal(both, search_order([S], sparsity, seed=0))


@by_pattern
def test_a_seed_gives_one_order_and_another_seed_another(sparsity: SparsityConfig) -> None:
    S = importance(48, 7)
    orders = [search_order([S], sparsity, seed) for seed in (3, 3, 4)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("num_inputs", [32, 33])
def test_without_groups_inputs_stay_where_they_are(num_inputs: int) -> None:
    assert search_order([importance(num_inputs, 7)], HALF, seed=0).tolist() == list(range(num_inputs))


@by_pattern
def test_a_single_group_stays_where_it_is(sparsity: SparsityConfig) -> None:
    S = importance(sparsity.group, 7)
    assert search_order([S], sparsity, seed=0).tolist() == list(range(sparsity.group))


@by_pattern
def test_of_many_outputs_a_sample_decides_for_all(sparsity: SparsityConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    S = importance(16, MAX_OUTPUTS + 500)
    sizes = set()
    lost = permutation.lost

    def seen(groups: Tensor, sparsity: SparsityConfig) -> Tensor:
        sizes.add(groups.shape[-1])
        return lost(groups, sparsity)

    monkeypatch.setattr(permutation, "lost", seen)
    orders = [search_order([S], sparsity, seed=0) for _ in range(2)]
    assert sizes == {MAX_OUTPUTS}
    assert torch.equal(*orders)
    assert lost_by_hand(S, orders[0], sparsity) < 0.95 * lost_by_hand(S, identity(S), sparsity)
    # The sample is of all outputs, not the first ones: those that matter here come last.
    S[:, :MAX_OUTPUTS] = 1e-9
    assert lost_by_hand(S, search_order([S], sparsity, seed=0), sparsity) < 0.95 * lost_by_hand(
        S, identity(S), sparsity
    )


@torch.no_grad()
def outputs_of(layer: nn.Module, source: ModelSource) -> Tensor:
    stream = ActivationStream.start(source, some_tokens(), 2, torch.device("cpu"))
    return torch.cat([hidden_states(layer(hidden, **kwargs)) for hidden, kwargs in calls_of(stream, 0, None)])


def with_mlp_biases(layer: nn.Module, names: tuple[str, ...]) -> None:
    """Give the linears random biases, which few families have of their own."""
    generator = torch.Generator().manual_seed(2)
    for name in names:
        module = linear(layer, name)
        bias = torch.randn(len(module.weight), generator=generator).to(module.weight.dtype)
        module.bias = nn.Parameter(bias, requires_grad=False)


@families
def test_another_order_of_the_intermediate_channels_leaves_the_layers_function(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, torch.float64)
    layer, spec = source.layer(0), source.spec
    with_mlp_biases(layer, (spec.gate, spec.up, spec.down))
    weights = fold_norms(layer, spec)
    before, dense = outputs_of(layer, source), {name: linear(layer, name).weight.clone() for name in spec.linears}
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    reorder_intermediate(layer, spec, weights, order)
    assert (outputs_of(layer, source) - before).abs().max() < 1e-12 * before.abs().max()
    expected = dense | {spec.gate: dense[spec.gate][order], spec.up: dense[spec.up][order]}
    expected[spec.down] = dense[spec.down][:, order]
    for name, weight in expected.items():
        assert torch.equal(linear(layer, name).weight, weight), name
        assert torch.equal(weights[name], weight), name
    linear(layer, spec.up).bias[[0, 1]] = linear(layer, spec.up).bias[[1, 0]]
    assert (outputs_of(layer, source) - before).abs().max() > 1e-3 * before.abs().max()  # a bias left behind is seen


def test_weights_are_reordered_before_they_are_rounded(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", torch.bfloat16)
    layer, spec = source.layer(0), source.spec
    weights = fold_norms(layer, spec)
    folded = dict(weights)
    order = torch.arange(47, -1, -1)
    reorder_intermediate(layer, spec, weights, order)
    for name in (spec.gate, spec.up):
        assert weights[name].dtype is torch.float32
        assert torch.equal(weights[name], folded[name].flip(0))
        assert torch.equal(linear(layer, name).weight, folded[name].flip(0).bfloat16())
    assert torch.equal(weights[spec.down], folded[spec.down].flip(1))
