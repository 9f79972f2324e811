"""One layer: learned, merged, pruned; against the same done by hand, input after input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calls_of, families, some_tokens, stretched, tiny_source
from torch import Tensor

from drotator.architecture import ModelSource, hidden_states, linear
from drotator.config import (
    CalibrationConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PruneConfig,
    PrunerConfig,
    RotationConfig,
    SparsityConfig,
)
from drotator.distributed import ALONE
from drotator.objectives import with_gradients
from drotator.pruners import PRUNERS
from drotator.pruning import (
    LEAST_WEIGHT,
    DenseLayer,
    LayerContext,
    importance_of_gate,
    learn_layer,
    learn_rotation,
    merge,
    objective_of,
    open_layer,
    prune_linears,
    prune_weights,
    row_scale,
    starting_rotation,
)
from drotator.resources import Stopwatch
from drotator.results import LinearResult
from drotator.rotation import Rotation
from drotator.statistics import ActivationStream

CPU = torch.device("cpu")
WINDOWS = some_tokens(5, 30)
TWO_OF_FOUR, SIXTY = SparsityConfig(keep=2, group=4), SparsityConfig(ratio=0.6)

by_pruner = pytest.mark.parametrize("pruner", PRUNERS)
by_sparsity = pytest.mark.parametrize("sparsity", [TWO_OF_FOUR, SIXTY], ids=lambda sparsity: sparsity.label)


def context_of(source: ModelSource, index: int = 0) -> LayerContext:
    """Bring layer `index` and the hidden states that enter it."""
    stream = ActivationStream.start(source, WINDOWS, 2, CPU)
    for before in range(index):
        stream.advance(source.layer(before), before, None)
    return LayerContext(
        index, source.layer(index), source.spec, source.sizes, source.num_layers, stream, Stopwatch(CPU)
    )


def settings(pruner: str = "wanda", objective: str = "pruning_error", **optimizer: Any) -> PruneConfig:
    return PruneConfig(
        model=ModelConfig(path="tiny"),
        pruner=PrunerConfig(name=pruner),
        sparsity=TWO_OF_FOUR,
        rotation=RotationConfig(),
        objective=ObjectiveConfig(name=objective),
        optimizer=OptimizerConfig(**({"steps": 25, "learning_rate": 0.005} | optimizer)),
        calibration=CalibrationConfig(dataset="embedded"),
        eval=EvalConfig(),
    )


@torch.no_grad()
def objective_at(dense: DenseLayer, rotation: Rotation | None, objective: str = "pruning_error") -> float:
    rotation = rotation or Rotation.identity(dense.context.sizes)
    return float(objective_of(dense.problem, settings(objective=objective))(rotation.R1, rotation.R2))


@torch.no_grad()
def moments(context: LayerContext, name: str, R1: Tensor | None = None) -> Tensor:
    """Gather the inputs of one linear of the layer as it is now, in one list, and form H in float64."""
    gathered: list[Tensor] = []
    module = linear(context.layer, name)
    handle = module.register_forward_pre_hook(lambda _, args: gathered.append(args[0].flatten(0, 1).double()))
    for hidden, kwargs in calls_of(context.stream, context.index, R1):
        context.layer(hidden, **kwargs)
    handle.remove()
    X = torch.cat(gathered).T
    return 2 / X.shape[1] * X @ X.T


@torch.no_grad()
def outputs(context: LayerContext, R1: Tensor | None = None) -> Tensor:
    batches = calls_of(context.stream, context.index, R1)
    return torch.cat([hidden_states(context.layer(hidden, **kwargs)) for hidden, kwargs in batches])


@torch.no_grad()
def pruned_in_order(
    context: LayerContext,
    by_hand: LayerContext,
    pruner: PrunerConfig,
    sparsity: SparsityConfig,
    R1: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, LinearResult]:
    """Prune the layer, and follow it by hand: each linear was given its weight and the moments that those pruned before
    it leave, became what the pruner makes of them, and its error is told as it is.

    The pruner is given the very same moments: a search turns some that differ by rounding into other masks.
    """
    given: list[tuple[list[Tensor], Tensor]] = []
    prune = PRUNERS[pruner.name]

    def recording(weights: Sequence[Tensor], H: Tensor, *settings: Any) -> Any:
        given.append(([W.clone() for W in weights], H.clone()))
        return prune(weights, H, *settings)

    monkeypatch.setitem(PRUNERS, pruner.name, recording)
    results, raised = prune_linears(context, pruner, sparsity, R1, None)
    assert raised == {}
    assert list(results) == list(context.spec.linears)
    for names, (weights, H_given) in zip(context.spec.inputs.values(), given, strict=True):
        H = moments(by_hand, names[0], R1)
        torch.testing.assert_close(H_given.double(), H, rtol=1e-4, atol=1e-5 * float(H.diagonal().mean()))
        for name, W, pruned in zip(names, weights, prune(weights, H_given, sparsity, pruner), strict=True):
            weight = linear(by_hand.layer, name).weight
            assert torch.equal(W, weight.float())
            weight.copy_(pruned.weight)
            assert torch.equal(linear(context.layer, name).weight, weight), name
            change = W.double() - weight.double()
            error = torch.trace(change @ H @ change.T) / torch.trace(W.double() @ H @ W.double().T)
            assert results[name].relative_error == pytest.approx(float(error), rel=1e-3)
    return results


@families
@by_pruner
@by_sparsity
def test_linears_are_pruned_with_the_moments_that_the_pruned_ones_before_leave(
    family: str, pruner: str, sparsity: SparsityConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tmp_path, family)
    context, by_hand = context_of(source, 1), context_of(source, 1)
    assert context.spec.linears == tuple(name for names in context.spec.inputs.values() for name in names)
    dense = {name: moments(context, names[0]) for names in context.spec.inputs.values() for name in names}
    results = pruned_in_order(context, by_hand, PrunerConfig(name=pruner), sparsity, None, monkeypatch)
    for name, result in results.items():
        weight = linear(context.layer, name).weight
        assert result.sparsity == round(sparsity.fraction * weight.numel()) / weight.numel()
        assert float((weight == 0).float().mean()) == pytest.approx(result.sparsity)
    for name in (context.spec.output, context.spec.gate, context.spec.down):
        H = moments(by_hand, name)
        assert (H - dense[name]).norm() > 0.02 * dense[name].norm()  # the order is seen


@by_pruner
def test_a_rotated_layer_is_pruned_with_moments_of_its_own_basis(
    pruner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tmp_path, "llama")
    context, by_hand = context_of(source), context_of(source)
    rotation = Rotation.random(source.sizes, torch.Generator().manual_seed(0))
    for each in (context, by_hand):
        merged = merge(each, open_layer(each, settings(pruner)).weights, rotation)
    pruned_in_order(context, by_hand, PrunerConfig(name=pruner), TWO_OF_FOUR, merged.R1, monkeypatch)


@by_pruner
@by_sparsity
def test_steps_of_the_solver_lower_the_errors_and_keep_the_masks(
    pruner: str, sparsity: SparsityConfig, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, "llama")
    errors, layers = [], []
    for steps in (0, 4, 40):
        context = context_of(source)
        chosen = PrunerConfig(name=pruner, solve_steps=steps)
        results, _ = prune_linears(context, chosen, sparsity, None, None)
        errors.append([results[name].relative_error for name in source.spec.inputs["attention"]])
        layers.append(context.layer)
    plain, few, many = (torch.tensor(each) for each in errors)
    gain = 1 + 1e-6 if pruner == "admm" else 0.95  # admm ends with such steps of its own
    assert (few < gain * plain).all()
    assert (many < (1 + 1e-6) * few).all()
    for name in source.spec.inputs["attention"]:
        masks = [linear(layer, name).weight != 0 for layer in layers]
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_moments_that_are_known_are_used_for_attention_and_not_collected_again(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    context, spec = context_of(source), source.spec
    dense = source.layer(0)
    known = torch.diag(torch.logspace(-3, 3, 32))
    passes: list[str] = []
    context.layer.register_forward_pre_hook(lambda *_: passes.append("pass"))
    pruner = PrunerConfig(name="wanda")
    results, _ = prune_linears(context, pruner, TWO_OF_FOUR, None, known)
    assert len(passes) == 3 * 3  # three batches for output, mlp and down
    for name in spec.inputs["attention"]:
        W = linear(dense, name).weight
        weight = PRUNERS["wanda"]([W], known, TWO_OF_FOUR, pruner)[0].weight
        assert torch.equal(linear(context.layer, name).weight, weight)
        change = ((W - weight) ** 2 * known.diagonal()).sum() / (W**2 * known.diagonal()).sum()
        assert results[name].relative_error == pytest.approx(float(change), rel=1e-4)
    plain = context_of(source)
    prune_linears(plain, pruner, TWO_OF_FOUR, None, None)
    assert not torch.equal(linear(plain.layer, spec.query).weight, linear(context.layer, spec.query).weight)


@families
def test_without_a_pruner_weights_stay_and_errors_are_zero(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, torch.bfloat16)
    context, dense = context_of(source), source.layer(0).state_dict()
    results, raised = prune_linears(context, PrunerConfig(name="none"), TWO_OF_FOUR, None, None)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in context.layer.state_dict().items())
    assert [result.relative_error for result in results.values()] == [0] * 7
    assert raised == {}
    for name, result in results.items():
        assert result.sparsity == pytest.approx(float((dense[f"{name}.weight"] == 0).float().mean()))


@by_pruner
@by_sparsity
def test_a_bfloat16_layer_keeps_exact_zeros_and_its_errors_are_those_of_the_stored_weights(
    pruner: str, sparsity: SparsityConfig, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, "qwen2", torch.bfloat16)
    context, dense = context_of(source), source.layer(0)
    H = moments(context, source.spec.query)
    results, _ = prune_linears(context, PrunerConfig(name=pruner), sparsity, None, None)
    for name, result in results.items():
        weight = linear(context.layer, name).weight
        assert weight.dtype is torch.bfloat16
        assert result.sparsity == float((weight == 0).double().mean())
        assert result.sparsity >= round(sparsity.fraction * weight.numel()) / weight.numel()
        assert not weight[weight == 0].signbit().any()
    W = linear(dense, source.spec.key).weight.double()
    change = W - linear(context.layer, source.spec.key).weight.double()
    expected = torch.trace(change @ H @ change.T) / torch.trace(W @ H @ W.T)
    assert results[source.spec.key].relative_error == pytest.approx(float(expected), rel=1e-5)


def test_sparsegpt_leaves_less_error_than_wanda_and_wanda_less_than_magnitude(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    gate = {}
    for pruner in PRUNERS:
        results, _ = prune_linears(context_of(source), PrunerConfig(name=pruner), TWO_OF_FOUR, None, None)
        gate[pruner] = results[source.spec.query].relative_error
    assert 0 < gate["sparsegpt"] < gate["wanda"] < gate["magnitude"] < 1


@by_pruner
@by_sparsity
@pytest.mark.parametrize("solve_steps", [0, 3])
def test_weights_that_read_the_same_inputs_are_pruned_as_each_alone(
    pruner: str, sparsity: SparsityConfig, solve_steps: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(24, 96, generator=generator, dtype=torch.float64)
    X[1:] += 0.5 * X[:-1]
    dense = [size * torch.randn(rows, 24, generator=generator).double() for size, rows in ((1, 20), (3, 8), (0.1, 8))]
    scales = [torch.logspace(-1, 1, 20).double()[:, None], None, torch.logspace(1, 0, 8).double()[:, None]]
    settings = (sparsity, PrunerConfig(name=pruner, solve_steps=solve_steps, block_size=16), ALONE)
    H = X @ X.mT
    found, damping = prune_weights(dense, H, scales, *settings)
    for W, scale, weight in zip(dense, scales, found, strict=True):
        (alone,), alone_damping = prune_weights([W], H, [scale], *settings)
        assert torch.equal(weight != 0, alone != 0)
        torch.testing.assert_close(weight, alone, rtol=1e-9, atol=1e-12)
        assert damping == alone_damping
        assert int((weight == 0).sum()) == round(sparsity.fraction * W.numel())


def test_a_pruner_that_fails_names_layer_and_linears(tmp_path: Path) -> None:
    context = context_of(tiny_source(tmp_path, "llama"), 2)
    with pytest.raises(RuntimeError, match=r"Layer 2, self_attn\.q_proj, .*k_proj, .*v_proj: .*not positive definite"):
        prune_linears(context, PrunerConfig(), TWO_OF_FOUR, None, -torch.eye(32))
    linear(context.layer, context.spec.up).weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"Layer 2, mlp\.gate_proj, mlp\.up_proj: .*not finite"):
        prune_linears(context, PrunerConfig(name="magnitude"), TWO_OF_FOUR, None, None)


def test_damping_that_had_to_be_raised_is_told_for_its_linear(tmp_path: Path) -> None:
    context = context_of(tiny_source(tmp_path, "llama"))
    known = torch.eye(32)
    known[0, 1] = known[1, 0] = 1.05  # indefinite by 0.05
    _, raised = prune_linears(context, PrunerConfig(damping=0.01), TWO_OF_FOUR, None, known)
    assert raised == {name: pytest.approx(0.1) for name in context.spec.inputs["attention"]}


@families
@pytest.mark.parametrize("objective", ["entropy", "pruning_error"])
def test_a_learned_and_merged_rotation_lowers_the_objective_and_keeps_the_layers_function(
    family: str, objective: str, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family)
    context = context_of(source, 1)
    before = outputs(context)
    dense = open_layer(context, settings(objective=objective))
    trained = learn_layer(dense, settings(objective=objective))
    assert objective_at(dense, None, objective) == pytest.approx(trained.objective_before, rel=1e-5)
    assert trained.objective_after < trained.objective_before
    assert objective_at(dense, trained.rotation, objective) == pytest.approx(trained.objective_after, rel=1e-5)
    merged = merge(context, dense.weights, trained.rotation)
    assert merged.R1.dtype is torch.float64
    assert merged.orthogonality() < 1e-13
    torch.testing.assert_close(merged.R1.float(), trained.rotation.R1, rtol=0, atol=1e-3)
    torch.testing.assert_close(outputs(context, merged.R1) @ merged.R1.mT.float(), before, rtol=1e-4, atol=1e-4)
    assert set(context.watch.seconds) == {"calibrate", "rotate"}


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_a_learned_rotation_lowers_the_error_that_pruning_leaves(pruner: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    errors = []
    for steps in (0, 60):
        context = context_of(source)
        chosen = settings(pruner, steps=steps)
        dense = open_layer(context, chosen)
        R1 = merge(context, dense.weights, learn_layer(dense, chosen).rotation).R1
        results, _ = prune_linears(context, chosen.pruner, chosen.sparsity, R1, None)
        errors.append(sum(result.relative_error for result in results.values()))
    assert errors[1] < 0.95 * errors[0]


def with_invertible_map(chosen: PruneConfig, value_map: str = "invertible", **changes: Any) -> PruneConfig:
    rotation = dataclasses.replace(chosen.rotation, value_map=value_map, **changes)
    objective = dataclasses.replace(chosen.objective, weights="sensitivity")
    return dataclasses.replace(chosen, rotation=rotation, objective=objective)


@families
@pytest.mark.parametrize("optimizer", ["riemannian_adam", "spectral"])
def test_a_learned_and_merged_invertible_map_keeps_the_layers_function(
    family: str, optimizer: str, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family)
    context, chosen = context_of(source, 1), with_invertible_map(settings("sparsegpt", name=optimizer))
    before = outputs(context)
    dense = open_layer(context, chosen)
    trained = learn_layer(dense, chosen)
    assert trained.objective_after < trained.objective_before
    merged = merge(context, dense.weights, trained.rotation)
    assert merged.value_map == "invertible"
    assert merged.condition() > 1.05
    assert torch.equal(merged.R2, trained.rotation.R2.double())
    torch.testing.assert_close(outputs(context, merged.R1) @ merged.R1.mT.float(), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("salience", ["wanda", "obs", "sequential_obs"])
@pytest.mark.parametrize("learns_R1", [False, True], ids=["map alone", "with R1"])
def test_an_invertible_map_reaches_a_lower_objective_than_r2(salience: str, learns_R1: bool, tmp_path: Path) -> None:
    chosen = settings("sparsegpt", name="spectral", steps=200, learning_rate=0.05)
    chosen = dataclasses.replace(chosen, objective=ObjectiveConfig(salience=salience, weights="sensitivity"))
    context, reached = context_of(tiny_source(tmp_path, "llama")), {}
    dense = open_layer(context, with_invertible_map(chosen))
    for value_map in ("orthogonal", "invertible"):
        trained = learn_layer(dense, with_invertible_map(chosen, value_map, R1=learns_R1))
        assert trained.warnings == []
        reached[value_map] = (trained.objective_before, trained.objective_after)
    (start, orthogonal), (same_start, invertible) = reached["orthogonal"], reached["invertible"]
    assert same_start == pytest.approx(start, rel=1e-5)
    assert invertible < orthogonal < start


def test_the_error_of_v_is_that_of_its_outputs_before_r2(tmp_path: Path) -> None:
    source, chosen = tiny_source(tmp_path, "qwen2"), settings("sparsegpt")
    context = context_of(source)
    rotation = stretched(Rotation.random(source.sizes, torch.Generator().manual_seed(0)))
    weights = open_layer(context, chosen).weights
    merged = merge(context, weights, rotation)
    H = moments(context, source.spec.value, merged.R1)
    R1, R2, condition = merged.R1, torch.block_diag(*merged.R2), merged.condition()
    results, _ = prune_linears(context, chosen.pruner, TWO_OF_FOUR, R1, None, merged.R2)
    W = weights[source.spec.value].double() @ R1
    change = W - torch.linalg.inv(R2).mT @ linear(context.layer, source.spec.value).weight.double()
    expected = torch.trace(change @ H @ change.T) / torch.trace(W @ H @ W.T)
    assert condition == pytest.approx(20)
    assert results[source.spec.value].relative_error == pytest.approx(float(expected), rel=1e-3)
    again = context_of(source)
    merge(again, open_layer(again, chosen).weights, rotation)
    stretched_outputs, _ = prune_linears(again, chosen.pruner, TWO_OF_FOUR, R1, None)
    assert stretched_outputs[source.spec.value].relative_error != pytest.approx(float(expected), rel=0.1)
    for name in set(source.spec.linears) - {source.spec.value}:
        assert results[name] == stretched_outputs[name]


@pytest.mark.parametrize("value_map", ["orthogonal", "invertible"])
def test_one_r1_is_learned_for_several_layers_with_an_r2_for_each(value_map: str, tmp_path: Path) -> None:
    source, chosen = tiny_source(tmp_path, "llama"), with_invertible_map(settings(), value_map)
    layers = [open_layer(context_of(source, index), chosen) for index in range(3)]
    objectives = [objective_of(layer.problem, chosen) for layer in layers]
    start = starting_rotation(layers[0].problem, 3, chosen)
    trained = learn_rotation(objectives, start, chosen)
    assert trained.rotation.value_map == value_map
    assert trained.rotation.R1.shape == (32, 32)
    assert trained.rotation.R2.shape == (6, 12, 12)
    identity = Rotation.identity(source.sizes)
    before = sum(float(objective(identity.R1, identity.R2)) for objective in objectives)
    assert trained.objective_before == pytest.approx(before, rel=1e-5)
    heads = trained.rotation.R2.chunk(3)
    reached = sum(float(objective(trained.rotation.R1, R2)) for objective, R2 in zip(objectives, heads, strict=True))
    assert reached == pytest.approx(trained.objective_after, rel=1e-5)
    assert reached < trained.objective_before


def test_an_objective_that_is_not_finite_names_its_layer(tmp_path: Path) -> None:
    dense = open_layer(context_of(tiny_source(tmp_path, "llama"), 2), settings())
    dense.problem.weights["gate"][0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="Layer 2: the objective is not finite"):
        learn_layer(dense, settings())


@pytest.mark.parametrize(
    ("pruner", "objective", "reads"),
    [
        ("magnitude", "entropy", set()),
        ("magnitude", "pruning_error", set()),
        ("wanda", "entropy", {"attention", "output", "mlp"}),
        ("sparsegpt", "pruning_error", {"attention", "output", "mlp", "down"}),
    ],
)
def test_only_the_moments_that_the_objective_reads_are_collected(
    pruner: str, objective: str, reads: set[str], tmp_path: Path
) -> None:
    dense = open_layer(context_of(tiny_source(tmp_path, "llama")), settings(pruner, objective))
    assert set(dense.problem.hessians) == reads
    loss, *gradients = with_gradients([objective_of(dense.problem, settings(pruner, objective))])(
        torch.eye(32), torch.eye(12).repeat(2, 1, 1)
    )
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@by_pruner
def test_the_importance_of_the_gate_is_that_of_its_rotated_weight(pruner: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    chosen = settings(pruner, "entropy")
    context = context_of(source)
    dense = open_layer(context, chosen)
    rotation = Rotation.random(source.sizes, torch.Generator().manual_seed(0)).to(dtype=torch.float32)
    for R1 in (None, rotation.R1):
        drawn = importance_of_gate(dense.problem, R1, chosen)
        R = torch.eye(32).double() if R1 is None else R1.double()
        W = dense.weights[source.spec.gate].double() @ R
        H = moments(context_of(source), source.spec.gate)
        gain = source.layer(0).get_submodule(source.spec.mlp_norm).get_parameter("weight").double()
        H = R.T @ (H / gain / gain[:, None]) @ R  # of the norm's output without its gain
        damped = H + chosen.pruner.damping * H.diagonal().mean() * torch.eye(32)
        energy = {
            "magnitude": torch.ones(32).double(),
            "wanda": H.diagonal(),
            "sparsegpt": 1 / torch.linalg.inv(damped).diagonal(),
            "admm": 1 / torch.linalg.inv(damped).diagonal(),
        }[pruner]
        torch.testing.assert_close(drawn.double(), W**2 * energy, rtol=2e-3, atol=1e-4)


def permuted(chosen: PruneConfig, permute: str) -> PruneConfig:
    return dataclasses.replace(chosen, rotation=RotationConfig(permute=permute))


@families
@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_channels_in_a_better_order_lose_less_and_their_moments_go_with_them(
    family: str, pruner: str, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family)
    context, plain = context_of(source, 1), context_of(source, 1)
    before, chosen = outputs(context), settings(pruner)
    dense, unordered = open_layer(context, permuted(chosen, "intermediate")), open_layer(plain, chosen)
    assert unordered.order is None
    assert dense.order is not None
    assert dense.order.sort().values.tolist() == list(range(48))
    torch.testing.assert_close(outputs(context), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(dense.problem.weights["down"], linear(context.layer, source.spec.down).weight)
    if pruner == "wanda":
        H = moments(context, source.spec.down)
        assert (dense.problem.hessians["down"] - H).norm() < 1e-5 * H.norm()
    start = Rotation.identity(source.sizes)
    found = [float(objective_of(each.problem, chosen)(start.R1, start.R2)) for each in (dense, unordered)]
    assert found[0] < found[1]
    assert learn_layer(dense, settings(pruner, steps=0)).rotation.order is dense.order


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_training_starts_from_the_order_of_the_residual_channels_that_loses_less(pruner: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    dense = open_layer(context_of(source, 1), settings(pruner))
    for permute in ("none", "intermediate"):
        start = starting_rotation(dense.problem, 1, permuted(settings(pruner), permute))
        assert torch.equal(start.R1, torch.eye(32))
    start = starting_rotation(dense.problem, 2, permuted(settings(pruner), "residual"))
    assert ((start.R1 == 0) | (start.R1 == 1)).all()
    assert (start.R1.sum(0) == 1).all() and (start.R1.sum(1) == 1).all()
    assert torch.equal(start.R2, torch.eye(12).repeat(4, 1, 1))
    objective = objective_of(dense.problem, settings(pruner))
    heads = torch.eye(12).repeat(2, 1, 1)
    found, inverse, identity = (float(objective(R1, heads)) for R1 in (start.R1, start.R1.mT, torch.eye(32)))
    assert found < 0.9 * identity
    assert found < 0.95 * inverse  # the order is not put in the other way round


def test_training_that_goes_on_from_a_rotation_starts_there_and_tells_what_there_was_without_one(
    tmp_path: Path,
) -> None:
    source = tiny_source(tmp_path, "llama")
    dense = open_layer(context_of(source, 1), settings())
    previous = Rotation.random(source.sizes, torch.Generator().manual_seed(0)).R1
    for permute in ("none", "both"):
        start = starting_rotation(dense.problem, 2, permuted(settings(), permute), previous)
        assert torch.equal(start.R1, previous.float())
        assert torch.equal(start.R2, torch.eye(12).repeat(4, 1, 1))
    trained = learn_layer(dense, settings(steps=3), previous)
    assert trained.objective_before == pytest.approx(objective_at(dense, None), rel=1e-6)
    identity = Rotation.identity(source.sizes)
    at_previous = objective_at(dense, dataclasses.replace(identity, R1=previous.float()))
    assert trained.history[0] == pytest.approx(at_previous, rel=1e-5)
    assert abs(at_previous - trained.objective_before) > 0.01 * at_previous
    assert trained.objective_after == min(trained.history)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_permutations_alone_lower_the_error_that_pruning_leaves(pruner: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    errors = {}
    for permute in ("none", "both"):
        context, chosen = context_of(source), permuted(settings(pruner, steps=0), permute)
        dense = open_layer(context, chosen)
        R1 = merge(context, dense.weights, learn_layer(dense, chosen).rotation).R1
        results, _ = prune_linears(context, chosen.pruner, chosen.sparsity, R1, None)
        errors[permute] = sum(result.relative_error for result in results.values())
    assert errors["both"] < 0.97 * errors["none"]


@pytest.mark.parametrize(("R1", "R2"), [(True, False), (False, True)])
def test_a_rotation_that_is_switched_off_stays_the_identity(R1: bool, R2: bool, tmp_path: Path) -> None:
    dense = open_layer(context_of(tiny_source(tmp_path, "llama")), settings())
    chosen = dataclasses.replace(settings(), rotation=RotationConfig(R1=R1, R2=R2))
    trained = learn_layer(dense, chosen)
    assert trained.objective_after < trained.objective_before
    for R, is_learned in ((trained.rotation.R1, R1), (trained.rotation.R2, R2)):
        assert torch.equal(R, torch.eye(R.shape[-1]).expand_as(R)) is not is_learned


@families
def test_weights_by_sensitivity_are_collected_and_reach_the_objective(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family)
    weighted, chosen = (
        dataclasses.replace(settings(), objective=ObjectiveConfig(name="pruning_error", weights=weights))
        for weights in ("sensitivity", "uniform")
    )
    dense, uniform = (open_layer(context_of(source, 1), each) for each in (weighted, chosen))
    assert uniform.problem.sensitivities == {}
    assert set(dense.problem.sensitivities) == set(dense.problem.weights)
    assert all(moments.isfinite().all() for moments in dense.problem.sensitivities.values())
    start = Rotation.identity(source.sizes)
    found = [float(objective_of(each.problem, chosen)(start.R1, start.R2)) for each in (dense, uniform)]
    assert 0 < found[0] < 0.5  # a part of what all linears do to the output: the lesser half of the weights goes
    assert 0 < found[1] < 7 * 0.5  # the sum of such parts of seven linears
    assert found[1] > 2 * found[0]
    trained = learn_layer(dense, weighted)
    assert trained.objective_after < 0.98 * trained.objective_before


# Masks that weigh the outputs by their sensitivities.


@pytest.mark.parametrize(
    ("changes", "auto", "sensitivity"),
    [
        ({}, True, True),
        ({"rotation": RotationConfig(name="shared")}, True, True),
        ({"rotation": RotationConfig(name="none")}, False, True),
        ({"objective": ObjectiveConfig(name="entropy")}, False, True),
        ({"objective": ObjectiveConfig(weights="uniform")}, False, True),
        ({"sparsity": TWO_OF_FOUR}, False, False),
    ],
)
def test_masks_are_weighed_as_the_rotation_is_learned_unless_they_are_grouped(
    changes: dict[str, Any], auto: bool, sensitivity: bool
) -> None:
    for name in (*PRUNERS, "none"):
        for weights, expected in (("auto", auto), ("sensitivity", sensitivity), ("uniform", False)):
            pruner = PrunerConfig(name=name, weights=weights)
            given: dict[str, Any] = {"sparsity": SIXTY, "pruner": pruner} | changes
            chosen = dataclasses.replace(settings(), **given)
            assert chosen.mask_is_weighed is (expected and name != "none"), (name, weights)


def test_rows_are_scaled_by_the_root_of_what_their_outputs_count(tmp_path: Path) -> None:
    context = context_of(tiny_source(tmp_path, "llama"))
    spec = context.spec
    noise = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0))
    G = {spec.query: torch.logspace(-2, 2, 48), spec.value: noise @ noise.mT, spec.down: torch.tensor(3.0)}
    random = Rotation.random(context.sizes, torch.Generator().manual_seed(0))

    def squares(name: str, R2: Tensor | None = None) -> Tensor:
        scale = row_scale(name, context, G, R2)
        assert scale is not None
        assert scale.dtype is torch.float32
        assert scale.shape == (len(linear(context.layer, name).weight), 1)
        return scale[:, 0].double().square() / scale.square().mean()

    def parts(weights: Tensor) -> Tensor:
        return weights.double() / weights.double().mean()

    for R2 in (None, random.R2):
        torch.testing.assert_close(squares(spec.query, R2), parts(G[spec.query]), rtol=1e-5, atol=0)
        assert row_scale(spec.down, context, G, R2) is None
        assert row_scale(spec.up, context, G, R2) is None  # nothing is known of it
    dense = torch.block_diag(*G[spec.value].double())
    torch.testing.assert_close(squares(spec.value), parts(dense.diagonal()), rtol=1e-5, atol=0)
    for R2 in (random.R2, stretched(random).R2):
        undo = torch.linalg.inv(torch.block_diag(*R2)).mT  # an error E' of the merged v is undo E' in the dense one
        weights = torch.stack([column @ dense @ column for column in undo.T])
        torch.testing.assert_close(squares(spec.value, R2), parts(weights), rtol=1e-4, atol=0)


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
@pytest.mark.parametrize("dead", ["some", "all"])
def test_outputs_that_nothing_reads_leave_weights_finite(pruner: str, dead: str, tmp_path: Path) -> None:
    context = context_of(tiny_source(tmp_path, "llama"))
    spec = context.spec
    alive = torch.ones(48) if dead == "some" else torch.zeros(48)
    alive[::3] = 0
    G = {spec.query: alive, spec.value: torch.diag_embed(alive[:24].reshape(2, 12)), spec.down: torch.zeros(())}
    scale = row_scale(spec.query, context, G, None)
    assert scale is not None
    assert float(scale.min() / scale.max()) == pytest.approx(1 if dead == "all" else LEAST_WEIGHT**0.5, rel=0.3)
    results, _ = prune_linears(context, PrunerConfig(name=pruner), SIXTY, None, None, None, G)
    for name in spec.linears:
        weight = linear(context.layer, name).weight
        assert weight.isfinite().all()
        assert int((weight == 0).sum()) == round(0.6 * weight.numel())
        assert 0 < results[name].relative_error < 1


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
@pytest.mark.parametrize("solve_steps", [0, 5])
def test_a_weighed_mask_does_less_harm_where_outputs_matter_differently(
    pruner: str, solve_steps: int, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, "llama")
    spec, order = source.spec, torch.randperm(48, generator=torch.Generator().manual_seed(0))
    G = {spec.query: torch.logspace(-3, 3, 48)[order]}
    chosen, dense = PrunerConfig(name=pruner, solve_steps=solve_steps), source.layer(0)
    H = moments(context_of(source), spec.query)
    harm, errors, layers = [], [], []
    for sensitivities in ({}, G):
        context = context_of(source)
        results, _ = prune_linears(context, chosen, SIXTY, None, None, None, sensitivities)
        weight = linear(context.layer, spec.query).weight
        assert int((weight == 0).sum()) == round(0.6 * weight.numel())
        assert not weight[weight == 0].signbit().any()
        E = linear(dense, spec.query).weight.double() - weight.double()
        harm.append(float((G[spec.query].double() * ((E @ H) * E).sum(1)).sum()))
        errors.append(results[spec.query].relative_error)
        layers.append(context.layer)
    assert harm[1] < 0.5 * harm[0]
    assert errors[1] > errors[0]  # all outputs count alike in what is told
    for name in (spec.key, spec.value):  # of the same inputs, and nothing weighs them
        assert torch.equal(*(linear(layer, name).weight for layer in layers))
