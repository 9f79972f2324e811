from __future__ import annotations

import pytest
from tiny_models import families, tiny_source

from drotator import bounds
from drotator.architecture import LayerSizes, linear
from drotator.bounds import Work
from drotator.config import PrunerConfig

SIZES = {
    "8B": LayerSizes(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    ),
    "70B": LayerSizes(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, head_dim=128
    ),
}
PEAKS = {"float8": 1400e12, "bfloat16": 790e12, "tf32": 400e12, "float32": 50e12, "bytes": 4e12}


@pytest.mark.parametrize(
    ("model", "weights", "moments", "heads", "total", "milliseconds"),
    [("8B", 3.57, 0.27, 0.02, 3.87, 4.90), ("70B", 28.0, 2.20, 0.075, 30.3, 38.4)],
)
def test_a_rotation_step_counts_what_was_counted_by_hand(model, weights, moments, heads, total, milliseconds):
    sizes = SIZES[model]
    assert bounds.weight_products(sizes) / 1e12 == pytest.approx(weights, abs=0.05 if model == "70B" else 0.005)
    assert bounds.moment_products(sizes) / 1e12 == pytest.approx(moments, abs=0.006)
    assert bounds.head_products(sizes) / 1e12 == pytest.approx(heads, abs=0.002)
    work = bounds.rotation_step(sizes)
    assert work.operations / 1e12 == pytest.approx(total, rel=2e-3)
    assert 1e3 * work.seconds(PEAKS) == pytest.approx(milliseconds, rel=2e-3)
    magnitude = bounds.rotation_step(sizes, reads_moments=False)
    assert work.operations - magnitude.operations == bounds.moment_products(sizes)


def test_moments_of_the_widest_inputs_count_what_was_counted_by_hand():
    assert bounds.moments(14336, 128 * 2048).operations / 1e12 == pytest.approx(107.7, rel=1e-3)
    whole = bounds.moments_of_layer(SIZES["8B"], 128 * 2048)
    assert whole.operations == sum(bounds.moments(size, 128 * 2048).operations for size in (4096, 4096, 4096, 14336))


def test_in_8_bits_are_the_products_with_what_r1_alone_turns():
    sizes = SIZES["8B"]
    rounded, exact = (bounds.rotation_step(sizes, batches=2, in_float8=in_8) for in_8 in (True, False))
    assert rounded.operations == exact.operations
    alone = sum(
        d_out * d_in for name, (d_out, d_in) in bounds.linear_shapes(sizes).items() if name not in ("value", "output")
    )
    assert rounded.float8 == 4 * 4096 * alone / 2
    assert exact.float8 == 0


def test_a_retraction_and_an_update_are_five_and_seven_cubes():
    assert bounds.retraction(SIZES["8B"]).operations == 5 * 4096**3
    assert bounds.rotation_update(SIZES["8B"]).operations == 7 * 4096**3


@families
def test_the_weights_counted_are_those_of_the_layer(tmp_path, family):
    source = tiny_source(tmp_path, family)
    layer = source.layer(0)
    shapes = bounds.linear_shapes(source.sizes)
    assert {name: tuple(linear(layer, getattr(source.spec, name)).weight.shape) for name in shapes} == shapes
    assert bounds.num_weights(source.sizes) == sum(linear(layer, name).weight.numel() for name in source.spec.linears)


def test_a_layer_of_8b_has_436_megabytes_and_nine_sixteenths_of_it_if_it_is_2_of_4():
    sizes = SIZES["8B"]
    assert bounds.layer_bytes(sizes) / 1e6 == pytest.approx(436, abs=0.5)
    assert bounds.layer_bytes(sizes, sparse=True) == bounds.layer_bytes(sizes) * 9 / 16
    assert bounds.layer_bytes(sizes, boundary=True) - bounds.layer_bytes(sizes) == 2 * 4096**2


def test_prefill_is_bound_by_operations_and_decoding_by_bytes():
    sizes = SIZES["8B"]
    assert bounds.forward(sizes, 1, 2048).is_computing(PEAKS)
    assert not bounds.decode(sizes, 1, 2048).is_computing(PEAKS)
    dense, sparse = (bounds.forward(sizes, 1, 2048, sparse=sparse).operations for sparse in (False, True))
    assert dense - sparse == 2048 * bounds.num_weights(sizes)
    assert bounds.cache_bytes(sizes, 2, 2048) == 2 * 2048 * 2 * 8 * 128 * 2


def test_work_takes_the_longer_of_computing_and_moving_bytes():
    peaks = {"float8": 20.0, "bfloat16": 10.0, "tf32": 5.0, "float32": 1.0, "bytes": 2.0}
    work = Work(float8=10, bfloat16=5, tf32=5, float32=1, bytes=4)
    assert work.seconds(peaks) == 3
    assert work.operations == 21
    assert (work * 2).seconds(peaks) == 6
    assert (work + Work(bytes=20)).seconds(peaks) == 12
    assert not (work + Work(bytes=20)).is_computing(peaks)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_pruners_that_solve_for_weights_are_bound_by_operations(name):
    work = bounds.pruning(SIZES["8B"], PrunerConfig(name=name))
    assert work.bytes == 8 * bounds.num_weights(SIZES["8B"])
    assert (work.float32 > 0) == (name in ("sparsegpt", "admm"))
    if name == "sparsegpt":
        shapes = bounds.linear_shapes(SIZES["8B"]).values()
        removals = sum(d_out * d_in**2 for d_out, d_in in shapes)
        assert work.float32 - removals == pytest.approx(2 / 3 * (3 * 4096**3 + 14336**3), rel=1e-6)
