"""Every objective against slow, obvious float64 loops, its gradients against finite differences."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from tiny_models import stretched
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from drotator.architecture import PRE_NORM, LayerSizes
from drotator.config import SALIENCES, ObjectiveConfig, PrunerConfig, SparsityConfig
from drotator.energies import column_energy
from drotator.objectives import (
    INPUT_OF,
    LayerProblem,
    Objective,
    build_objective,
    chosen_salience,
    needed_hessians,
    reader_moments,
    require_batches,
    with_gradients,
)
from drotator.pruners import PRUNERS
from drotator.pruners.masks import grouped_mask
from drotator.rotation import Rotation
from drotator.scores import entropy_along, importance_score, removal

SIZES = LayerSizes(hidden_size=24, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
NUM_ROWS = {"query": 48, "key": 24, "value": 24, "output": 24, "gate": 48, "up": 48, "down": 24}
NUM_INPUTS = {"attention": 24, "output": 48, "mlp": 24, "down": 48}
DAMPING = 0.02
GROUPS = [SparsityConfig(keep=keep, group=group) for keep, group in ((2, 4), (4, 8), (1, 3), (3, 4))]
SPARSITIES = [*GROUPS, SparsityConfig(ratio=0.5), SparsityConfig(ratio=0.6)]
TWO_OF_FOUR = GROUPS[0]

by_name = pytest.mark.parametrize("name", ["entropy", "pruning_error"])
by_salience = pytest.mark.parametrize("salience", [salience for salience in SALIENCES if salience != "auto"])
by_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda sparsity: sparsity.label)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moments(n: int, seed: int) -> Tensor:
    """H of inputs that are correlated and of unequal size."""
    mix = torch.randn(n, n, generator=generator(seed), dtype=torch.float64) * torch.logspace(0.3, -0.7, n)
    X = mix @ torch.randn(n, 3 * n, generator=generator(seed + 1), dtype=torch.float64)
    return 2 / X.shape[1] * X @ X.T


def problem(seed: int = 0) -> LayerProblem:
    weights = {
        name: torch.randn(rows, NUM_INPUTS[INPUT_OF[name]], generator=generator(seed + rows + i), dtype=torch.float64)
        for i, (name, rows) in enumerate(NUM_ROWS.items())
    }
    hessians = {inputs: moments(n, seed + 10 * i) for i, (inputs, n) in enumerate(NUM_INPUTS.items())}
    return LayerProblem(weights, hessians, SIZES)


def random_rotation(seed: int = 5) -> Rotation:
    return Rotation.random(SIZES, generator(seed))


def objective_of(
    name: str, salience: str, sparsity: SparsityConfig = TWO_OF_FOUR, layer: LayerProblem | None = None
) -> Objective:
    return build_objective(ObjectiveConfig(name=name), salience, sparsity, layer or problem(), DAMPING)


# The reference. Every rotation is written out as a dense matrix for the whole input, every inverse is formed.


def energy_reference(H: Tensor, salience: str) -> Tensor:
    n = len(H)
    shift = DAMPING * sum(float(H[j, j]) for j in range(n)) / n
    inverse = torch.linalg.inv(H + shift * torch.eye(n, dtype=torch.float64))
    if salience == "magnitude":
        return torch.ones(n, dtype=torch.float64)
    if salience == "wanda":
        return torch.tensor([float(H[j, j]) for j in range(n)], dtype=torch.float64)
    if salience == "obs":
        return torch.tensor([1 / float(inverse[j, j]) for j in range(n)], dtype=torch.float64)
    U = torch.linalg.cholesky(inverse, upper=True)  # what the sweep divides by
    return torch.tensor([1 / float(U[j, j]) ** 2 for j in range(n)], dtype=torch.float64)


def rotated(layer: LayerProblem, rotation: Rotation) -> LayerProblem:
    """Merge the rotation in weights and moments, with R2 as the block-diagonal matrix that it stands for."""
    R1 = rotation.R1
    R_value = torch.block_diag(rotation.R2[0], rotation.R2[1])
    R_output = torch.block_diag(rotation.R2[0], rotation.R2[0], rotation.R2[1], rotation.R2[1])
    W, H = layer.weights, layer.hessians
    weights = {name: W[name] @ R1 for name in ("query", "key", "gate", "up")} | {
        "value": R_value.T @ W["value"] @ R1,
        "output": R1.T @ W["output"] @ R_output,
        "down": R1.T @ W["down"],
    }
    bases = {"attention": R1, "output": R_output, "mlp": R1, "down": torch.eye(48, dtype=torch.float64)}
    return LayerProblem(weights, {inputs: R.T @ H[inputs] @ R for inputs, R in bases.items()}, SIZES)


def importances(layer: LayerProblem, salience: str) -> dict[str, Tensor]:
    return {
        name: W**2 * energy_reference(layer.hessians[INPUT_OF[name]], salience) for name, W in layer.weights.items()
    }


def entropy_of(values: list[float]) -> float:
    parts = [value / sum(values) for value in values]
    return -sum(part * math.log(part) for part in parts if part > 0)


def entropy_reference(layer: LayerProblem, salience: str) -> float:
    S = importances(layer, salience)
    rows = [row for name in ("query", "key", "value", "output", "gate", "up") for row in S[name].tolist()]
    columns = [column for name in ("value", "output", "down") for column in S[name].T.tolist()]
    return sum(entropy_of(values) for values in rows + columns)


def removed_reference(S: Tensor, sparsity: SparsityConfig) -> float:
    total = 0.0
    for row in S.tolist():
        if sparsity.is_grouped:
            for start in range(0, len(row), sparsity.group):
                group = sorted(row[start : start + sparsity.group])
                total += sum(group[: sparsity.group - sparsity.keep])
        else:
            total += sum(sorted(row)[: round(sparsity.ratio * len(row))])
    return total


def output_energy(W: Tensor, H: Tensor, salience: str) -> float:
    return float(torch.trace(W @ W.T if salience == "magnitude" else W @ H @ W.T))


def pruning_error_reference(layer: LayerProblem, salience: str, sparsity: SparsityConfig) -> float:
    return sum(
        removed_reference(S, sparsity) / output_energy(layer.weights[name], layer.hessians[INPUT_OF[name]], salience)
        for name, S in importances(layer, salience).items()
    )


@by_salience
@pytest.mark.parametrize("seed", [None, 5], ids=["identity", "random"])
def test_the_entropy_is_that_of_rows_and_columns_written_out(salience: str, seed: int | None) -> None:
    rotation = Rotation.identity(SIZES).to(dtype=torch.float64) if seed is None else random_rotation(seed)
    found = objective_of("entropy", salience)(rotation.R1, rotation.R2)
    assert float(found) == pytest.approx(entropy_reference(rotated(problem(), rotation), salience), rel=1e-9)


@by_salience
@by_sparsity
def test_the_pruning_error_is_what_the_groups_lose_over_the_outputs_energy(
    salience: str, sparsity: SparsityConfig
) -> None:
    rotation = random_rotation()
    found = objective_of("pruning_error", salience, sparsity)(rotation.R1, rotation.R2)
    expected = pruning_error_reference(rotated(problem(), rotation), salience, sparsity)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@by_name
@by_salience
def test_an_objective_at_a_rotation_is_that_of_the_merged_layer_at_the_identity(name: str, salience: str) -> None:
    rotation, identity = random_rotation(), Rotation.identity(SIZES).to(dtype=torch.float64)
    merged = objective_of(name, salience, layer=rotated(problem(), rotation))(identity.R1, identity.R2)
    torch.testing.assert_close(objective_of(name, salience)(rotation.R1, rotation.R2), merged)


@by_name
@by_salience
@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("is_weighed", [False, True])
def test_the_mean_of_its_batches_is_the_objective_and_so_are_the_gradients(
    name: str, salience: str, batches: int, is_weighed: bool
) -> None:
    at, layer = random_rotation(), problem()
    if is_weighed:
        layer = weighed(layer)
    given = (ObjectiveConfig(name=name), salience, TWO_OF_FOUR, layer, DAMPING)
    expected = with_gradients([build_objective(*given)])(at.R1, at.R2)
    objective = build_objective(*given, batches=batches)
    of_batches = [with_gradients([objective])(at.R1, at.R2, torch.tensor([i])) for i in range(batches)]
    assert len({float(loss) for loss, *_ in of_batches}) == batches
    for found, whole in zip(zip(*of_batches, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(0), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(objective(at.R1, at.R2), expected[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("batches", [1, 2])
def test_an_objective_lets_go_of_its_weights_when_it_is_dropped(batches: int) -> None:
    """A large layer's weights cannot wait for the collector of cycles."""
    given = (ObjectiveConfig(), "wanda", TWO_OF_FOUR, problem(), DAMPING)
    objective = build_objective(*given, batches=batches)
    dropped = weakref.ref(objective)
    at = random_rotation()
    with_gradients([objective])(at.R1, at.R2)
    gc.disable()
    try:
        del objective
        assert dropped() is None
    finally:
        gc.enable()


def test_a_batch_costs_its_part_of_the_products() -> None:
    at, layer = random_rotation(), problem()
    given = (ObjectiveConfig(), "wanda", TWO_OF_FOUR, layer, DAMPING)
    counted = []
    for batches in (1, 2):
        objective = with_gradients([build_objective(*given, batches=batches)])
        with FlopCounterMode(display=False) as counter:
            objective(at.R1, at.R2, torch.tensor([0]) if batches > 1 else None)
        counted.append(counter.get_total_flops())
    assert counted[1] < 0.65 * counted[0]  # v and the moments are read whole


@pytest.mark.parametrize("batches", [5, 7])
def test_batches_that_do_not_divide_the_outputs_are_refused(batches: int) -> None:
    require_batches(2, SIZES)
    with pytest.raises(ValueError, match=rf"^optimizer.batches={batches} does not divide the outputs .*24, 48, 24"):
        require_batches(batches, SIZES)


@by_salience
def test_at_the_identity_the_pruning_error_is_what_the_pruners_mask_removes(salience: str) -> None:
    layer, identity = problem(), Rotation.identity(SIZES).to(dtype=torch.float64)
    expected = 0.0
    for name, W in layer.weights.items():
        H = layer.hessians[INPUT_OF[name]]
        S = W**2 * energy_reference(H, salience)
        mask = grouped_mask(S, 2, 4)
        if salience in PRUNERS:
            (pruned,) = PRUNERS[salience]([W], H, TWO_OF_FOUR, PrunerConfig(name=salience))
            assert torch.equal(mask, pruned.mask)
        expected += float(S[~mask].sum()) / output_energy(W, H, salience)
    found = objective_of("pruning_error", salience)(identity.R1, identity.R2)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@by_salience
def test_every_linears_outputs_have_the_same_energy_in_every_basis(salience: str) -> None:
    layer, turned = problem(), rotated(problem(), random_rotation())
    for name, inputs in INPUT_OF.items():
        before = output_energy(layer.weights[name], layer.hessians[inputs], salience)
        assert output_energy(turned.weights[name], turned.hessians[inputs], salience) == pytest.approx(before)


@by_name
@by_salience
def test_gradients_are_those_of_finite_differences(name: str, salience: str) -> None:
    rotation = random_rotation()
    leaves = (rotation.R1.requires_grad_(), rotation.R2.requires_grad_())
    assert torch.autograd.gradcheck(objective_of(name, salience), leaves, fast_mode=True)


@by_salience
@by_sparsity
def test_the_pruning_error_falls_as_its_gradient_says_along_rotations(salience: str, sparsity: SparsityConfig) -> None:
    rotation, step = random_rotation(), 1e-6
    objective = objective_of("pruning_error", salience, sparsity)
    _, G1, G2 = with_gradients([objective])(rotation.R1, rotation.R2)
    for seed in range(3):
        planes = [torch.randn(R.shape, generator=generator(seed), dtype=torch.float64) for R in (G1, G2)]
        A1, A2 = (plane - plane.mT for plane in planes)
        slope = (G1 * (rotation.R1 @ A1)).sum() + (G2 * (rotation.R2 @ A2)).sum()
        ahead, behind = (
            objective(
                rotation.R1 @ torch.linalg.matrix_exp(sign * step * A1),
                rotation.R2 @ torch.linalg.matrix_exp(sign * step * A2),
            )
            for sign in (1, -1)
        )
        assert float((ahead - behind) / (2 * step)) == pytest.approx(float(slope), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_entropys_gradient_is_exact(dim: int) -> None:
    T = torch.rand(5, 7, generator=generator(0), dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda T: importance_score(T, None, entropy_along(dim)), (T.requires_grad_(),))
    uniform = float(importance_score(torch.ones(3, 4), None, entropy_along(dim)))
    assert uniform == pytest.approx(4 * math.log(3) if dim == 0 else 3 * math.log(4))


@by_salience
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_exactly_zero_leave_the_entropy_and_its_gradients_finite(
    salience: str, dtype: torch.dtype
) -> None:
    layer = problem()
    for W in layer.weights.values():
        W[torch.rand(W.shape, generator=generator(1)) < 0.3] = 0
    expected = entropy_reference(layer, salience)
    weights, hessians = ({name: t.to(dtype) for name, t in part.items()} for part in (layer.weights, layer.hessians))
    low = LayerProblem(weights, hessians, SIZES)
    identity = Rotation.identity(SIZES).to(dtype=dtype)
    loss, *gradients = with_gradients([objective_of("entropy", salience, layer=low)])(identity.R1, identity.R2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.count_nonzero() for gradient in gradients)


def test_a_row_of_zeros_has_no_entropy_and_no_gradient() -> None:
    W = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], requires_grad=True)
    value = importance_score(W, None, entropy_along(1))
    value.backward()
    assert W.grad is not None
    assert float(value.detach()) == pytest.approx(entropy_of([1, 4, 9]))
    assert W.grad[0].count_nonzero()
    assert torch.equal(W.grad[1], torch.zeros(3))


@by_name
@by_salience
def test_only_the_moments_that_are_needed_are_read(name: str, salience: str) -> None:
    layer, rotation = problem(), random_rotation()
    needed = needed_hessians(ObjectiveConfig(name=name), salience)
    less = LayerProblem(layer.weights, {inputs: layer.hessians[inputs] for inputs in needed}, SIZES)
    found = objective_of(name, salience, layer=less)(rotation.R1, rotation.R2)
    torch.testing.assert_close(found, objective_of(name, salience)(rotation.R1, rotation.R2))
    assert ("down" in needed) == (name == "pruning_error" and salience != "magnitude")


@pytest.mark.parametrize("salience", ["obs", "sequential_obs"])
def test_moments_that_are_not_positive_definite_make_the_objective_nan(salience: str) -> None:
    layer, rotation = problem(), random_rotation()
    layer.hessians["attention"].neg_()
    assert column_energy(layer.hessians["attention"], rotation.R1, salience, DAMPING).isnan().all()
    assert objective_of("pruning_error", salience, layer=layer)(rotation.R1, rotation.R2).isnan()


@pytest.mark.parametrize("sparsity", GROUPS, ids=lambda sparsity: sparsity.label)
def test_of_equal_importances_a_group_loses_as_many_as_its_mask_removes(sparsity: SparsityConfig) -> None:
    S = torch.tensor([1.0, 2.0, 2.0, 2.0]).repeat(2, 6)
    assert float(removal(sparsity, 0).summary(S.mT)[0]) == removed_reference(S, sparsity)


def test_a_ratio_that_removes_nothing_of_a_row_removes_no_importance() -> None:
    assert float(removal(SparsityConfig(ratio=0.05), 0).summary(torch.ones(8, 2))[0]) == 0


def test_objectives_of_several_layers_add_up_over_one_r1_and_each_its_own_r2() -> None:
    layers = [problem(0), problem(100)]
    objectives = [objective_of("pruning_error", "obs", layer=layer) for layer in layers]
    R1, heads = random_rotation().R1, [random_rotation(seed).R2 for seed in (6, 7)]
    leaves = [tensor.clone().requires_grad_() for tensor in (R1, *heads)]
    expected = objectives[0](leaves[0], leaves[1]) + objectives[1](leaves[0], leaves[2])
    gradients = torch.autograd.grad(expected, leaves)
    with torch.no_grad():
        loss, G1, G2 = with_gradients(objectives)(R1, torch.cat(heads))
    assert not loss.requires_grad and not G1.requires_grad and not G2.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(G1, gradients[0])
    torch.testing.assert_close(G2, torch.cat(gradients[1:]))


@pytest.mark.parametrize(
    ("pruner", "entropy_salience", "error_salience"),
    [
        ("magnitude", "magnitude", "magnitude"),
        ("wanda", "wanda", "wanda"),
        ("sparsegpt", "obs", "wanda"),
        ("none", "wanda", "wanda"),
    ],
)
def test_auto_is_the_pruners_own_importance(pruner: str, entropy_salience: str, error_salience: str) -> None:
    assert chosen_salience(ObjectiveConfig(name="entropy"), pruner) == entropy_salience
    assert chosen_salience(ObjectiveConfig(name="pruning_error"), pruner) == error_salience
    assert chosen_salience(ObjectiveConfig(salience="wanda"), pruner) == "wanda"


def test_a_problem_takes_weights_by_their_module_names_in_float32() -> None:
    weights = {getattr(PRE_NORM, name): W for name, W in problem().weights.items()}
    found = LayerProblem.of_layer(weights, PRE_NORM, SIZES, {})
    assert found.weights.keys() == NUM_ROWS.keys()
    for name, W in found.weights.items():
        assert torch.equal(W, problem().weights[name].float())


# An invertible map in the place of R2.


def weighed(layer: LayerProblem) -> LayerProblem:
    """The layer with a sensitivity for every linear, of the shapes that `collect_sensitivities` gives."""
    blocks = torch.stack([moments(12, 70), moments(12, 80)])
    rows = {
        name: torch.rand(NUM_ROWS[name], generator=generator(90)).double() for name in ("query", "key", "gate", "up")
    }
    scalars = {"output": torch.tensor(0.7).double(), "down": torch.tensor(1.3).double()}
    return dataclasses.replace(layer, sensitivities={"value": blocks, **rows, **scalars})


def mapped(layer: LayerProblem, rotation: Rotation) -> LayerProblem:
    """Merge an invertible map, written out as block-diagonal matrices, in weights, moments and sensitivities."""
    N = torch.linalg.inv(rotation.R2).mT
    merged = rotated(layer, rotation)
    weights = dict(merged.weights)
    weights["output"] = rotation.R1.T @ layer.weights["output"] @ torch.block_diag(N[0], N[0], N[1], N[1])
    G = dict(layer.sensitivities)
    if "value" in G:
        G["value"] = torch.stack([n.T @ g @ n for n, g in zip(N, G["value"], strict=True)])
    return dataclasses.replace(merged, weights=weights, sensitivities=G)


def invertible_objective(
    layer: LayerProblem, salience: str = "sequential_obs", sparsity: SparsityConfig = TWO_OF_FOUR
) -> Objective:
    return build_objective(ObjectiveConfig(name="pruning_error"), salience, sparsity, layer, DAMPING, "invertible")


def random_map(seed: int = 5) -> Rotation:
    return stretched(random_rotation(seed))


by_weights = pytest.mark.parametrize("is_weighed", [False, True], ids=["uniform", "sensitivity"])
by_seen_inputs = pytest.mark.parametrize("salience", ["wanda", "obs", "sequential_obs"])


def layer_of(is_weighed: bool) -> LayerProblem:
    return weighed(problem()) if is_weighed else problem()


@by_weights
@by_seen_inputs
@by_sparsity
def test_an_objective_at_an_invertible_map_is_that_of_the_merged_layer_at_the_identity(
    salience: str, sparsity: SparsityConfig, is_weighed: bool
) -> None:
    layer, at, identity = layer_of(is_weighed), random_map(), Rotation.identity(SIZES).to(dtype=torch.float64)
    found = invertible_objective(layer, salience, sparsity)(at.R1, at.R2)
    merged = invertible_objective(mapped(layer, at), salience, sparsity)(identity.R1, identity.R2)
    torch.testing.assert_close(found, merged, rtol=1e-9, atol=0)
    unmapped = invertible_objective(layer, salience, sparsity)(at.R1, identity.R2)
    assert abs(float(unmapped / found) - 1) > 1e-3  # a map that nothing looks at would be seen


@by_seen_inputs
def test_the_error_of_v_counts_by_what_o_makes_of_it(salience: str) -> None:
    layer, at = problem(), random_map()
    merged = mapped(layer, at)
    S, G = importances(merged, salience)["value"], torch.zeros(24, dtype=torch.float64)
    dense = torch.zeros(24, 24, dtype=torch.float64)
    for head in range(4):
        group = slice(12 * (head // 2), 12 * (head // 2) + 12)
        G[group] += merged.weights["output"][:, 12 * head : 12 * head + 12].square().sum(0)
        reader = layer.weights["output"][:, 12 * head : 12 * head + 12]
        dense[group, group] += reader.T @ reader
    W, H, H_merged = layer.weights["value"], layer.hessians["attention"], merged.hessians["attention"]
    value = removed_reference(G[:, None] * S, TWO_OF_FOUR) / float(torch.trace(dense @ W @ H @ W.T))
    own = removed_reference(S, TWO_OF_FOUR) / output_energy(merged.weights["value"], H_merged, salience)
    expected = pruning_error_reference(merged, salience, TWO_OF_FOUR) - own + value
    assert float(invertible_objective(layer, salience)(at.R1, at.R2)) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(torch.block_diag(*reader_moments(layer.weights["output"], SIZES)), dense)


@by_weights
def test_the_energies_that_errors_are_measured_by_are_those_of_every_map(is_weighed: bool) -> None:
    layer, at = layer_of(is_weighed), random_map()
    energies = []
    for each in (layer, mapped(layer, at)):
        blocks = each.sensitivities.get("value", reader_moments(each.weights["output"], SIZES))
        W, H = each.weights["value"], each.hessians["attention"]
        energies.append(float(torch.trace(torch.block_diag(*blocks) @ W @ H @ W.T)))
        energies.append(output_energy(each.weights["output"], each.hessians["output"], "wanda"))
    assert energies[2:] == pytest.approx(energies[:2])
    unweighed = [
        output_energy(e.weights["value"], e.hessians["attention"], "wanda") for e in (layer, mapped(layer, at))
    ]
    assert unweighed[1] != pytest.approx(unweighed[0], rel=0.1)


@by_seen_inputs
def test_an_orthogonal_matrix_is_a_map_like_any_other(salience: str) -> None:
    layer, at = weighed(problem()), random_rotation()
    leaves = (at.R1.requires_grad_(), at.R2.requires_grad_())
    orthogonal, invertible = objective_of("pruning_error", salience, layer=layer), invertible_objective(layer, salience)
    torch.testing.assert_close(orthogonal(*leaves), invertible(*leaves), rtol=1e-9, atol=0)
    # The gradients agree along rotations, and nowhere else is the orthogonal path right.
    (_, A), (_, B) = (torch.autograd.grad(objective(*leaves), leaves) for objective in (orthogonal, invertible))
    turns = [at.R2.detach().mT @ G for G in (A, B)]
    torch.testing.assert_close(*(turn - turn.mT for turn in turns), rtol=1e-7, atol=1e-10)
    assert (A - B).norm() > 1e-3 * A.norm()


@by_weights
@by_seen_inputs
def test_a_map_that_only_scales_changes_nothing(salience: str, is_weighed: bool) -> None:
    objective, at = invertible_objective(layer_of(is_weighed), salience), random_map()
    torch.testing.assert_close(objective(at.R1, 3 * at.R2), objective(at.R1, at.R2), rtol=1e-9, atol=0)


@by_weights
@by_seen_inputs
def test_gradients_at_an_invertible_map_are_those_of_finite_differences(salience: str, is_weighed: bool) -> None:
    at = random_map()
    leaves = (at.R1.requires_grad_(), at.R2.requires_grad_())
    assert torch.autograd.gradcheck(invertible_objective(layer_of(is_weighed), salience), leaves, fast_mode=True)


@by_sparsity
def test_the_error_falls_as_its_gradient_says_along_any_map(sparsity: SparsityConfig) -> None:
    at, step = random_map(), 1e-6
    objective = invertible_objective(weighed(problem()), sparsity=sparsity)
    _, _, G = with_gradients([objective])(at.R1, at.R2)
    for seed in range(3):
        U = torch.randn(G.shape, generator=generator(seed), dtype=torch.float64)
        ahead, behind = (objective(at.R1, at.R2 - sign * step * at.R2 @ U) for sign in (1, -1))
        slope = -(at.R2.mT @ G * U).sum()
        assert float((ahead - behind) / (2 * step)) == pytest.approx(float(slope), rel=1e-4, abs=1e-6)


def test_an_importance_that_sees_no_inputs_has_no_invertible_map() -> None:
    with pytest.raises(AssertionError, match="PruneConfig refuses it"):
        invertible_objective(problem(), "magnitude")
