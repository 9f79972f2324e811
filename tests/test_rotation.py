"""Rotations merged in a model leave its function as it was; and what the merge is made of."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import families, some_tokens, stretched, tiny_model, tiny_source, without_float32
from torch import Tensor

from drotator.architecture import LayerSizes, LayerSpec, ModelSource, linear
from drotator.modeling_rotated import ROTATED_FAMILIES
from drotator.rotation import (
    CONDITION_LIMIT,
    Rotation,
    boundary_weight,
    fold_norms,
    inverse_transpose,
    merge_rotation,
    polar,
    rotate_output_columns,
    rotate_value_rows,
)

SIZES = LayerSizes(hidden_size=10, intermediate_size=7, num_attention_heads=6, num_key_value_heads=2, head_dim=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def block_diagonal(R2: Tensor, repeats: int) -> Tensor:
    """Write out what R2 does to all heads: each group's matrix `repeats` times along the diagonal."""
    return torch.block_diag(*(R for R in R2 for _ in range(repeats)))


def merged_model(source: ModelSource, rotations: list[Rotation], *, has_boundaries: bool) -> Any:
    """Put merged layers, boundaries, embeddings and head together in a model of float64, untied."""
    state = {
        "model.embed_tokens.weight": source.tensor("model.embed_tokens.weight") @ rotations[0].R1,
        "model.norm.weight": torch.ones(source.sizes.hidden_size),
        "lm_head.weight": source.head_weight() * source.tensor("model.norm.weight") @ rotations[-1].R1,
    }
    for index, rotation in enumerate(rotations):
        layer = source.layer(index)
        merge_rotation(layer, source.spec, source.sizes, rotation, fold_norms(layer, source.spec))
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
        if has_boundaries and index + 1 < len(rotations):
            state[f"model.layers.{index}.boundary.weight"] = boundary_weight(rotation.R1, rotations[index + 1].R1)
    family = ROTATED_FAMILIES[source.config.model_type]
    config_class, model_class = family.config, family.causal_lm
    if not has_boundaries:
        config_class, model_class = config_class.__bases__[-1], model_class.__bases__[-1]
    changes = {"tie_word_embeddings": False, "model_type": config_class.model_type}
    model = model_class(config_class(**(source.config.to_dict() | changes))).double().eval()
    model.load_state_dict(state)
    return model


@families
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scope", ["per_layer", "shared"])
@torch.no_grad()
def test_merged_rotations_leave_the_logits_unchanged(family: str, scope: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, torch.float64, tie_word_embeddings=tied)
    expected = without_float32(tiny_model(family, torch.float64, tie_word_embeddings=tied))(some_tokens()).logits
    drawn = [Rotation.random(source.sizes, generator(seed)) for seed in range(source.num_layers)]
    if scope == "shared":
        drawn = [Rotation(drawn[0].R1, rotation.R2) for rotation in drawn]
    model = without_float32(merged_model(source, drawn, has_boundaries=scope == "per_layer"))
    found = model(some_tokens()).logits
    assert found.dtype is torch.float64
    assert (found - expected).abs().max() < 1e-9
    model.model.layers[1].self_attn.v_proj.weight[0, 0] += 0.1
    assert (model(some_tokens()).logits - expected).abs().max() > 1e-3  # the comparison would see a wrong merge


@families
@pytest.mark.parametrize("scope", ["per_layer", "shared"])
@torch.no_grad()
def test_merged_invertible_maps_leave_the_logits_unchanged(family: str, scope: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, torch.float64)
    expected = without_float32(tiny_model(family, torch.float64))(some_tokens()).logits
    drawn = [stretched(Rotation.random(source.sizes, generator(seed))).polished() for seed in range(source.num_layers)]
    if scope == "shared":
        drawn = [dataclasses.replace(rotation, R1=drawn[0].R1) for rotation in drawn]
    found = without_float32(merged_model(source, drawn, has_boundaries=scope == "per_layer"))(some_tokens()).logits
    assert found.dtype is torch.float64
    assert (found - expected).abs().max() < 1e-9
    drawn[1] = dataclasses.replace(drawn[1], value_map="orthogonal")  # o would not undo what is done to v
    wrong = without_float32(merged_model(source, drawn, has_boundaries=scope == "per_layer"))(some_tokens()).logits
    assert (wrong - expected).abs().max() > 1e-3


def float64_merge(layer: torch.nn.Module, spec: LayerSpec, rotation: Rotation, repeats: int) -> dict[str, Tensor]:
    """Fold and merge in float64 throughout: every weight and bias of the linears, not rounded."""
    gain_of = {name: norm for norm, names in spec.norms.items() for name in names}
    R1, heads = rotation.R1.double(), rotation.R2.double()
    undo = heads if rotation.value_map == "orthogonal" else torch.linalg.inv(heads).mT
    expected = {}
    for name in spec.linears:
        module = linear(layer, name)
        W, bias = module.weight.double(), None if module.bias is None else module.bias.double()
        if name in gain_of:
            W = (W * layer.get_submodule(gain_of[name]).get_parameter("weight").double()) @ R1
        else:
            W, bias = R1.T @ W, None if bias is None else R1.T @ bias
        if name == spec.value:
            W, bias = block_diagonal(heads, 1).T @ W, None if bias is None else block_diagonal(heads, 1).T @ bias
        if name == spec.output:
            W = W @ block_diagonal(undo, repeats)
        expected[f"{name}.weight"] = W
        if bias is not None:
            expected[f"{name}.bias"] = bias
    return expected


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_and_merging_round_once(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, dtype)
    layer = source.layer(1)
    twice_rounded = copy.deepcopy(layer)
    rotation = Rotation.random(source.sizes, generator())
    expected = float64_merge(layer, source.spec, rotation, source.sizes.queries_per_group)
    merge_rotation(layer, source.spec, source.sizes, rotation, fold_norms(layer, source.spec))
    state = layer.state_dict()
    for name, exact in expected.items():
        assert state[name].dtype is dtype
        assert torch.equal(state[name], exact.to(dtype)), name
    fold_norms(twice_rounded, source.spec)
    again = float64_merge(twice_rounded, source.spec, rotation, source.sizes.queries_per_group)
    up = f"{source.spec.up}.weight"
    assert not torch.equal(again[up].to(dtype), state[up])  # rounding after the fold too would be seen


@families
def test_folded_gains_become_one_and_the_layer_keeps_its_function(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, torch.bfloat16)
    layer, dense = source.layer(0), source.layer(0)
    weights = fold_norms(layer, source.spec)
    assert set(weights) == set(source.spec.linears)
    for norm, names in source.spec.norms.items():
        gain = dense.get_submodule(norm).get_parameter("weight").double()
        assert (layer.get_submodule(norm).get_parameter("weight") == 1).all()
        for name in names:
            folded = linear(dense, name).weight.double() * gain
            assert weights[name].dtype is torch.float32
            assert torch.equal(weights[name].double(), folded)  # exact: 8 + 8 bits fit in 24
            assert torch.equal(linear(layer, name).weight, folded.to(torch.bfloat16))
    for name in (source.spec.output, source.spec.down):
        assert torch.equal(weights[name], linear(dense, name).weight.float())
        weights[name].zero_()  # the caller's own: the layer does not see it
        assert torch.equal(linear(layer, name).weight, linear(dense, name).weight)


def test_the_identity_merges_to_the_folded_layer(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", torch.bfloat16)
    layer = source.layer(0)
    weights = fold_norms(layer, source.spec)
    folded = copy.deepcopy(layer.state_dict())
    merge_rotation(layer, source.spec, source.sizes, Rotation.identity(source.sizes), weights)
    assert all(torch.equal(tensor, folded[name]) for name, tensor in layer.state_dict().items())


def test_value_rows_and_output_columns_turn_by_the_rotation_of_their_group() -> None:
    R2 = Rotation.random(SIZES, generator()).R2
    value, output = randn(6, 10), randn(10, 18)
    torch.testing.assert_close(rotate_value_rows(value, R2), block_diagonal(R2, 1).T @ value)
    torch.testing.assert_close(rotate_output_columns(output, R2, 3), output @ block_diagonal(R2, 3))


@families
def test_an_invertible_map_is_merged_in_the_rows_of_v_and_its_inverse_transpose_in_the_columns_of_o(
    family: str, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family)
    layer = source.layer(1)
    rotation = stretched(Rotation.random(source.sizes, generator()))
    expected = float64_merge(layer, source.spec, rotation, source.sizes.queries_per_group)
    merge_rotation(layer, source.spec, source.sizes, rotation, fold_norms(layer, source.spec))
    for name, exact in expected.items():
        torch.testing.assert_close(layer.state_dict()[name], exact.float(), rtol=1e-6, atol=1e-6, msg=name)


def test_what_o_is_multiplied_by_is_r2_itself_where_it_is_orthogonal() -> None:
    rotation = Rotation.random(SIZES, generator())
    assert rotation.output_map is rotation.R2
    M = stretched(rotation)
    torch.testing.assert_close(M.output_map.mT @ M.R2, torch.eye(3).double().expand(2, 3, 3))


@pytest.mark.parametrize("condition", [1, 20, 160])
def test_inverses_by_newton_steps_are_those_of_a_factorization(condition: float) -> None:
    M = stretched(Rotation(randn(4, 4), torch.linalg.qr(randn(3, 16, 16)).Q), condition).R2
    torch.testing.assert_close(inverse_transpose(M), torch.linalg.inv(M).mT, rtol=1e-9, atol=1e-9)
    single = inverse_transpose(M.float()).double()
    assert (single.mT @ M - torch.eye(16)).abs().max() < 1e-5 * condition
    assert torch.autograd.gradcheck(inverse_transpose, M.requires_grad_(), fast_mode=True)


def test_a_boundary_takes_rows_from_one_basis_to_the_next() -> None:
    before, after = (Rotation.random(SIZES, generator(seed)).R1 for seed in range(2))
    x = randn(4, 10, seed=2)
    found = torch.nn.functional.linear(x @ before, boundary_weight(before, after))
    torch.testing.assert_close(found, x @ after)
    assert boundary_weight(before.float(), after.float()).dtype is torch.float64


def test_random_rotations_are_orthogonal_different_and_drawn_again_by_their_seed() -> None:
    rotation = Rotation.random(SIZES, generator())
    assert rotation.R1.shape == (10, 10)
    assert rotation.R2.shape == (2, 3, 3)
    assert rotation.R1.dtype is rotation.R2.dtype is torch.float64
    assert rotation.orthogonality() < 1e-14
    assert not torch.allclose(rotation.R2[0], rotation.R2[1])
    assert torch.equal(rotation.R1, Rotation.random(SIZES, generator()).R1)
    assert not torch.allclose(rotation.R1, Rotation.random(SIZES, generator(1)).R1)


def test_orthogonality_is_the_largest_error_of_all_matrices() -> None:
    identity = Rotation.identity(SIZES)
    assert identity.orthogonality() == 0
    stretched = identity.R2.clone()
    stretched[1, 2, 2] = 1.1
    assert Rotation(identity.R1, stretched).orthogonality() == pytest.approx(0.21, abs=1e-6)
    assert Rotation(2 * identity.R1, stretched).orthogonality() == pytest.approx(3)


def test_polishing_gives_the_nearest_orthogonal_matrices_in_float64() -> None:
    rotation = Rotation.random(SIZES, generator())
    noisy = Rotation(rotation.R1 + 1e-3 * randn(10, 10, seed=1), rotation.R2 + 1e-3 * randn(2, 3, 3, seed=2))
    polished = noisy.to(dtype=torch.float32).polished()
    assert polished.R1.dtype is polished.R2.dtype is torch.float64
    assert polished.orthogonality() < 1e-14
    for found, given in ((polished.R1, noisy.R1), (polished.R2, noisy.R2)):
        left, _, right = torch.linalg.svd(given.float().double())
        torch.testing.assert_close(found, left @ right, rtol=0, atol=1e-12)


def test_an_invertible_map_is_not_polished_and_only_r1_has_to_be_orthogonal() -> None:
    rotation = stretched(Rotation.random(SIZES, generator()))
    assert rotation.orthogonality() < 1e-14
    assert dataclasses.replace(rotation, value_map="orthogonal").orthogonality() > 0.5
    assert dataclasses.replace(rotation, R1=2 * rotation.R1).orthogonality() == pytest.approx(3)
    single = rotation.to(dtype=torch.float32)
    polished = single.polished()
    assert single.value_map == polished.value_map == "invertible"
    assert polished.R1.dtype is polished.R2.dtype is torch.float64
    assert polished.orthogonality() < 1e-14
    assert torch.equal(polished.R2, single.R2.double())
    with pytest.raises(RuntimeError, match="not orthogonal"):
        dataclasses.replace(rotation, R1=3 * rotation.R1).polished()


@pytest.mark.parametrize(("condition", "said"), [(2 * CONDITION_LIMIT, r"2e\+03"), (math.inf, ".*"), (math.nan, "nan")])
def test_a_map_that_is_nearly_singular_is_an_error_that_says_how_near(condition: float, said: str) -> None:
    drawn = Rotation.random(SIZES, generator())
    assert stretched(drawn, CONDITION_LIMIT / 2).polished().condition() == pytest.approx(CONDITION_LIMIT / 2)
    with pytest.raises(RuntimeError, match=f"nearly singular: its condition number is {said}, over 1000. Lower"):
        stretched(drawn, condition).polished()
    with pytest.raises(RuntimeError, match="nearly singular"):
        dataclasses.replace(stretched(drawn), R2=torch.zeros(2, 3, 3)).polished()


def test_polar_converges_while_singular_values_are_below_the_root_of_three() -> None:
    left, _, right = torch.linalg.svd(randn(2, 6, 6))
    values = torch.tensor([1.7, 1.2, 1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    found = polar(left @ torch.diag(values) @ right, 16)
    torch.testing.assert_close(found, left @ right, rtol=0, atol=1e-12)
