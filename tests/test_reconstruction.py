"""Block reconstruction lowers a layer's error, keeps its masks, and never makes it worse."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import some_tokens, tiny_source
from torch import Tensor, nn

from drotator.architecture import ModelSource, hidden_states, linear
from drotator.config import PrunerConfig, ReconstructConfig, SparsityConfig
from drotator.pruning import LayerContext, prune_linears
from drotator.reconstruction import mean_error, reconstruct_layer, schedule
from drotator.resources import Stopwatch
from drotator.rotation import Rotation, fold_norms, merge_rotation
from drotator.statistics import ActivationStream

CPU = torch.device("cpu")
SETTINGS = ReconstructConfig(name="block", epochs=10, learning_rate=3e-3)
TWO_OF_FOUR = SparsityConfig(ratio=0.0, keep=2, group=4)


def pruned(source: ModelSource, index: int = 1, R1: Tensor | None = None) -> tuple[nn.Module, ActivationStream]:
    """A pruned layer, in the basis of R1, on what a dense layer before it puts out; `dense` holds its targets."""
    stream = ActivationStream.start(source, some_tokens(6, 20), 2, CPU)
    for before in range(index):
        stream.advance(source.layer(before), before, None)
    layer = source.layer(index)
    stream.advance_dense(layer, index, stream.hidden)
    if R1 is not None:
        rotation = Rotation(R1, Rotation.identity(source.sizes).R2)
        merge_rotation(layer, source.spec, source.sizes, rotation, fold_norms(layer, source.spec))
    context = LayerContext(index, layer, source.spec, source.sizes, source.num_layers, stream, Stopwatch(CPU))
    prune_linears(context, PrunerConfig(name="wanda"), TWO_OF_FOUR, R1, None)
    return layer, stream


def reconstruct(
    source: ModelSource, layer: nn.Module, stream: ActivationStream, R1: Tensor | None = None, **changes: float
) -> tuple[float, float]:
    settings = ReconstructConfig(name="block", **({"epochs": 10, "learning_rate": 3e-3} | changes))  # type: ignore[arg-type]
    found = reconstruct_layer(layer, source.spec, stream, 1, R1, settings, seed=0)
    return found.before, found.after


@torch.no_grad()
def error_by_hand(source: ModelSource, layer: nn.Module, stream: ActivationStream) -> float:
    errors = []
    for hidden, target in zip(stream.hidden, stream.dense, strict=True):
        y = hidden_states(layer(hidden, **stream.arguments(hidden, 1)))
        for row, wanted in zip(y.flatten(0, 1), target.flatten(0, 1), strict=True):
            errors.append(float((row - wanted).norm() ** 2 / wanted.norm() ** 2))
    return sum(errors) / len(errors)


def test_the_error_falls_and_zeros_stay(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer, stream = pruned(source)
    masks = {name: linear(layer, name).weight != 0 for name in source.spec.linears}
    expected = error_by_hand(source, layer, stream)
    before, after = reconstruct(source, layer, stream)
    assert before == pytest.approx(expected, rel=1e-4)
    assert after < 0.8 * before
    assert after == pytest.approx(error_by_hand(source, layer, stream), rel=1e-4)
    for name, mask in masks.items():
        weight = linear(layer, name).weight
        assert not weight.requires_grad
        assert torch.equal(weight != 0, mask)
        assert not weight[~mask].signbit().any()


def test_nothing_but_the_pruned_linears_is_tuned(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "qwen2")
    layer, stream = pruned(source)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    reconstruct(source, layer, stream)
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in source.spec.linears}


def test_a_layer_whose_error_does_not_fall_is_left_as_it_was(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer, stream = pruned(source)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    first, last = reconstruct(source, layer, stream, learning_rate=10.0)
    assert first == last
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_bfloat16_layer_is_tuned_on_float32_copies(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", torch.bfloat16)
    layer, stream = pruned(source)
    masks = {name: linear(layer, name).weight != 0 for name in source.spec.linears}
    before, after = reconstruct(source, layer, stream)
    assert after < 0.9 * before
    assert all(linear(layer, name).weight.dtype is torch.bfloat16 for name in masks)
    assert all(torch.equal(linear(layer, name).weight != 0, mask) for name, mask in masks.items())


def test_twice_the_same_gives_the_same_bits(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layers = []
    for _ in range(2):
        layer, stream = pruned(source)
        reconstruct(source, layer, stream, epochs=2)
        layers.append(layer.state_dict())
    assert all(torch.equal(tensor, layers[1][name]) for name, tensor in layers[0].items())


def test_in_a_rotated_basis_the_error_is_that_of_the_dense_one(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    R1 = Rotation.random(source.sizes, torch.Generator().manual_seed(0)).R1
    layer, stream = pruned(source, R1=R1)
    outputs = [hidden_states(layer(hidden @ R1.float(), **stream.arguments(hidden, 1))) for hidden in stream.hidden]
    turned = [output @ R1.mT.float() for output in outputs]
    by_hand = [
        ((y - target).square().sum(-1) / target.square().sum(-1)).mean()
        for y, target in zip(turned, stream.dense, strict=True)
    ]
    assert mean_error(layer, stream, 1, R1) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-4)
    before, after = reconstruct(source, layer, stream, R1)
    assert after < 0.8 * before


def test_the_rate_rises_and_follows_a_cosine_to_nothing() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-3
