"""The tuning of pruned layers: what it lowers, what it must not touch, and that bases and batches do not matter."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calls_of, families, some_tokens, tiny_source
from torch import Tensor, nn

from drotator import reconstruction
from drotator.architecture import ModelSource, hidden_states, linear
from drotator.config import ReconstructConfig
from drotator.offload import Batches
from drotator.reconstruction import reconstruct_layer, schedule
from drotator.rotation import Rotation, fold_norms, merge_rotation
from drotator.statistics import ActivationStream

CPU = torch.device("cpu")
WINDOWS = some_tokens(5, 12)  # batches of 2, 2 and 1
INDEX = 1


def settings(**changes: Any) -> ReconstructConfig:
    return ReconstructConfig(**({"name": "block", "epochs": 6, "learning_rate": 3e-3} | changes))


@torch.no_grad()
def prune_by_magnitude(layer: nn.Module, source: ModelSource) -> None:
    """Set the smaller two of every four weights of the layer's linears to +0.0."""
    for name in source.spec.linears:
        weight = linear(layer, name).weight
        groups = weight.unflatten(1, (-1, 4))
        kept = groups.abs().argsort(dim=2).argsort(dim=2) >= 2
        weight.copy_(torch.where(kept, groups, 0).flatten(1))


def pruned_layer(source: ModelSource) -> tuple[nn.Module, ActivationStream]:
    """Layer INDEX with folded norms, pruned, and a stream whose inputs and targets are those of the dense model."""
    stream = ActivationStream.start(source, WINDOWS, 2, CPU)
    for index in range(INDEX):
        stream.advance(source.layer(index), index, None)
    layer = source.layer(INDEX)
    stream.advance_dense(layer, INDEX, stream.hidden)
    fold_norms(layer, source.spec)
    prune_by_magnitude(layer, source)
    return layer, stream


def tune(
    layer: nn.Module,
    source: ModelSource,
    stream: ActivationStream,
    R1: Tensor | None = None,
    seed: int = 0,
    **changes: Any,
) -> tuple[float, float]:
    found = reconstruct_layer(layer, source.spec, stream, INDEX, R1, settings(**changes), seed)
    return found.before, found.after


@torch.no_grad()
def error_by_hand(layer: nn.Module, stream: ActivationStream, R1: Tensor | None = None) -> float:
    """Mean of |y - target|^2 / |target|^2 over all tokens at once, float64, in the basis of the dense model."""
    outputs = [hidden_states(layer(hidden, **kwargs)).double() for hidden, kwargs in calls_of(stream, INDEX, R1)]
    y, target = torch.cat(outputs), torch.cat(list(stream.dense)).double()
    if R1 is not None:
        y = y @ R1.double().mT
    return float(((y - target).square().sum(-1) / target.square().sum(-1)).mean())


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same(layer: nn.Module, expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, expected[name]) for name, tensor in layer.state_dict().items())


@families
def test_the_error_of_the_layers_output_falls_and_is_the_one_that_is_told(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family)
    layer, stream = pruned_layer(source)
    at_start = error_by_hand(layer, stream)
    before, after = tune(layer, source, stream)
    assert before == pytest.approx(at_start, rel=1e-5)
    assert after == pytest.approx(error_by_hand(layer, stream), rel=1e-5)
    assert after < 0.8 * before


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_positive_zeros_and_nothing_but_weights_moves(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family, dtype)
    layer, stream = pruned_layer(source)
    pruned = state(layer)
    tune(layer, source, stream)
    tuned = layer.state_dict()
    weights = {f"{name}.weight" for name in source.spec.linears}
    for name, tensor in tuned.items():
        assert tensor.dtype is dtype
        if name in weights:
            assert ((tensor == 0) == (pruned[name] == 0)).all(), name
            assert (tensor == 0).double().mean() == 0.5
            assert not tensor[tensor == 0].signbit().any(), name
            assert (tensor != pruned[name]).double().mean() > 0.25, name
        else:
            assert torch.equal(tensor, pruned[name]), name
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_negative_zeros_of_the_pruned_layer_become_positive(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer, stream = pruned_layer(source)
    with torch.no_grad():
        for name in source.spec.linears:
            weight = linear(layer, name).weight
            weight.copy_(torch.where(weight == 0, -0.0, weight))
    tune(layer, source, stream)
    for name in source.spec.linears:
        weight = linear(layer, name).weight
        assert (weight == 0).double().mean() == 0.5
        assert not weight[weight == 0].signbit().any()


def test_pruned_weights_are_zero_in_every_pass_and_not_only_at_the_end(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer, stream = pruned_layer(source)
    module = linear(layer, source.spec.gate)
    mask, passes = module.weight == 0, []
    module.register_forward_pre_hook(lambda module, _: passes.append(torch.equal(module.weight == 0, mask)))
    tune(layer, source, stream, epochs=2)
    assert len(passes) == 3 * (1 + 2 + 1)  # the three batches before, in two epochs and after
    assert all(passes)


def test_every_step_is_as_long_as_the_schedule_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path, "llama")
    layer, stream = pruned_layer(source)
    pruned = state(layer)
    calls: list[tuple[int, int]] = []

    def nothing_but_the_last(step: int, num_steps: int) -> float:
        calls.append((step, num_steps))
        return float(step == num_steps - 1)

    monkeypatch.setattr(reconstruction, "schedule", nothing_but_the_last)
    before, after = tune(layer, source, stream, epochs=2, learning_rate=1e-3)
    assert calls == [(step, 6) for step in range(6)]
    assert after < before
    for name in source.spec.linears:
        moved = (linear(layer, name).weight - pruned[f"{name}.weight"]).abs().max()
        assert 0 < moved < 1.5e-3  # Adam's single step


def test_a_bfloat16_layer_is_tuned_by_steps_that_are_too_small_for_bfloat16(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", torch.bfloat16)
    layer, stream = pruned_layer(source)
    pruned = state(layer)
    learning_rate = 2e-4  # from 0.25 on, bfloat16 numbers are 2e-3 or more apart
    before, after = tune(layer, source, stream, epochs=8, learning_rate=learning_rate)
    assert after < before
    assert after == pytest.approx(error_by_hand(layer, stream), rel=1e-4)
    up = f"{source.spec.up}.weight"
    is_large = pruned[up].abs() >= 0.25
    assert (layer.state_dict()[up] != pruned[up])[is_large].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_whose_error_did_not_fall_is_left_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", dtype)
    layer, stream = pruned_layer(source)
    pruned = state(layer)
    before, after = tune(layer, source, stream, learning_rate=50.0)
    assert after == before == pytest.approx(error_by_hand(layer, stream), rel=1e-5)
    assert_same(layer, pruned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_that_is_not_finite_is_told_and_not_left_in_the_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", dtype)
    layer, stream = pruned_layer(source)
    pruned = state(layer)
    with pytest.raises(RuntimeError, match=r"^Layer 1: the error of its reconstruction is (nan|inf)\. Lower .*rate"):
        tune(layer, source, stream, learning_rate=1e30)
    assert_same(layer, pruned)
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())


def test_targets_that_are_not_finite_are_told(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer, stream = pruned_layer(source)
    pruned = state(layer)
    stream.dense[1][0, 3, 5] = torch.nan
    with pytest.raises(RuntimeError, match="Layer 1: the error of its reconstruction is nan"):
        tune(layer, source, stream)
    assert_same(layer, pruned)


def test_a_layer_without_an_error_is_left_as_it_is(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer, stream = pruned_layer(source)
    stream.advance_dense(layer, INDEX, stream.hidden)  # its own outputs are the target
    pruned = state(layer)
    before, after = tune(layer, source, stream)
    assert before == after == 0
    assert_same(layer, pruned)


def in_basis(layer: nn.Module, source: ModelSource, R1: Tensor) -> nn.Module:
    """The same layer in another basis of the residual stream."""
    merged = copy.deepcopy(layer)
    weights = {name: linear(layer, name).weight.clone() for name in source.spec.linears}
    identity = Rotation.identity(source.sizes)
    merge_rotation(merged, source.spec, source.sizes, Rotation(R1, identity.R2), weights)
    return merged


def signed_permutation(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    signs = 2.0 * torch.randint(2, (size,), generator=generator) - 1
    return torch.eye(size, dtype=torch.float64)[:, torch.randperm(size, generator=generator)] * signs


@families
def test_channels_in_another_order_with_other_signs_are_tuned_alike(family: str, tmp_path: Path) -> None:
    # Adam treats every weight by itself: it takes the same steps in a basis that only names the channels anew.
    source = tiny_source(tmp_path, family)
    layer, stream = pruned_layer(source)
    R1 = signed_permutation(source.sizes.hidden_size)
    merged = in_basis(layer, source, R1)
    found = tune(merged, source, stream, R1)
    assert found == pytest.approx(tune(layer, source, stream), rel=1e-5)
    expected = in_basis(layer, source, R1).state_dict()
    for name, tensor in merged.state_dict().items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@families
def test_in_any_basis_errors_are_those_of_the_dense_models_basis(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family)
    layer, stream = pruned_layer(source)
    R1 = Rotation.random(source.sizes, torch.Generator().manual_seed(0)).R1
    at_start = error_by_hand(layer, stream)
    merged = in_basis(layer, source, R1)
    before, after = tune(merged, source, stream, R1)
    assert before == pytest.approx(at_start, rel=1e-4)
    assert after == pytest.approx(error_by_hand(merged, stream, R1), rel=1e-4)
    assert after < 0.8 * before


def test_a_seed_gives_one_result_and_another_seed_another(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    found = []
    for seed in (0, 0, 1):
        layer, stream = pruned_layer(source)
        errors = tune(layer, source, stream, seed=seed)
        found.append((errors, state(layer)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
    assert found[0][0] != found[2][0]


def test_more_epochs_and_a_target_of_its_own_decide_the_result(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    errors = []
    for epochs in (1, 12):
        layer, stream = pruned_layer(source)
        errors.append(tune(layer, source, stream, epochs=epochs)[1])
    assert errors[1] < 0.9 * errors[0]
    layer, stream = pruned_layer(source)
    stream.dense = Batches(CPU, batches=[target + 1 for target in stream.dense])
    before, after = tune(layer, source, stream)
    assert before == pytest.approx(error_by_hand(pruned_layer(source)[0], stream), rel=1e-5)
    assert after == pytest.approx(error_by_hand(layer, stream), rel=1e-5)


def test_every_token_counts_by_its_relative_error(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    found = []
    for scale in (1.0, 1000.0):
        layer, stream = pruned_layer(source)
        stream.dense[0][0, 0] *= scale  # one token is as large as such tokens are
        tune(layer, source, stream)
        outputs = [hidden_states(layer(hidden, **kwargs)).detach() for hidden, kwargs in calls_of(stream, INDEX, None)]
        rest = slice(1, None)
        y, target = (torch.cat(list(part))[rest].double() for part in (outputs, stream.dense))
        found.append(float(((y - target).square().sum(-1) / target.square().sum(-1)).mean()))
    assert found[1] == pytest.approx(found[0], rel=0.1)  # all others are tuned as well as without it


def test_the_learning_rate_rises_for_a_twentieth_of_the_steps_and_falls_to_zero() -> None:
    rates = [schedule(step, 100) for step in range(101)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == pytest.approx([math.cos(math.pi / 2 * step / 95) ** 2 for step in range(96)])
    assert all(first > second for first, second in itertools.pairwise(rates[5:]))
    assert rates[100] == pytest.approx(0, abs=1e-15)
    for num_steps in (1, 2, 3, 10, 29):
        rates = [schedule(step, num_steps) for step in range(num_steps)]
        assert rates[0] == 1
        assert all(0 < rate <= 1 for rate in rates)
