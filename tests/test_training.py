"""The training loop keeps the best rotation and says what went wrong."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import some_tokens, tiny_source
from torch import Tensor

from drotator.architecture import LayerSizes
from drotator.config import ObjectiveConfig, OptimizerConfig, SparsityConfig
from drotator.objectives import LayerProblem, ObjectiveWithGradients, build_objective, with_gradients
from drotator.optimizers import OPTIMIZERS
from drotator.rotation import Rotation, fold_norms
from drotator.statistics import ActivationStream, collect_hessians, collect_sensitivities
from drotator.training import ORTHOGONALITY_LIMIT, train_rotation, watch

SIZES = LayerSizes(hidden_size=12, intermediate_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
START = Rotation.identity(SIZES)
LEARNING_RATES = {"adam_qr": 0.01, "riemannian_adam": 0.002, "spectral": 0.1}

by_name = pytest.mark.parametrize("name", OPTIMIZERS)


def distance_to(target: Rotation, *, nan_away_from_start: bool = False) -> ObjectiveWithGradients:
    """Squared distance of both rotations to the target's; optionally NaN anywhere but at the identity."""

    def objective(R1: Tensor, R2: Tensor, batch: Tensor | None = None) -> Tensor:
        distance = (R1 - target.R1).square().sum() + (R2 - target.R2).square().sum()
        is_away = (R1 - torch.eye(len(R1))).abs().max() > 1e-6
        return distance * torch.where(is_away & nan_away_from_start, torch.nan, 1.0)

    return with_gradients([objective])


def distance_to_all(targets: Sequence[Rotation], seen: list[int]) -> ObjectiveWithGradients:
    """Mean of the squared distances to the targets, each of which is a batch; `seen` gets the numbers asked for."""

    def evaluate(R1: Tensor, R2: Tensor, batch: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(-1 if batch is None else int(batch))
        number = slice(None) if batch is None else slice(int(batch), int(batch) + 1)
        of_targets = [distance_to(at)(R1, R2) for at in targets[number]]
        loss, G1, G2 = (torch.stack(found).mean(0) for found in zip(*of_targets, strict=True))
        return loss, G1, G2

    return evaluate


def far_target() -> Rotation:
    return Rotation.random(SIZES, torch.Generator().manual_seed(0)).to(dtype=torch.float32)


def settings(name: str = "riemannian_adam", **changes: float) -> OptimizerConfig:
    arguments = {"steps": 60, "learning_rate": LEARNING_RATES[name]} | changes
    return OptimizerConfig(name=name, **arguments)  # type: ignore[arg-type]


@by_name
def test_the_history_holds_the_objective_before_every_step_and_after_the_last(name: str) -> None:
    trained = train_rotation(distance_to(far_target()), START, settings(name))
    assert len(trained.history) == 61
    assert trained.history[0] == trained.objective_before
    assert trained.objective_before == pytest.approx(float(distance_to(far_target())(START.R1, START.R2)[0]))
    assert trained.objective_after < 0.9 * trained.objective_before
    assert trained.warnings == []


@by_name
def test_the_best_iterate_is_kept_and_not_the_last(name: str) -> None:
    planes = [torch.randn(R.shape, generator=torch.Generator().manual_seed(1)) for R in (START.R1, START.R2)]
    on_the_way, target = (
        Rotation(*(torch.linalg.matrix_exp(angle * (plane - plane.mT)) for plane in planes)) for angle in (0.05, 0.1)
    )

    def objective(R1: Tensor, R2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients lead to the target; the loss is least on the way to it."""
        return distance_to(on_the_way)(R1, R2)[0], *distance_to(target)(R1, R2)[1:]

    trained = train_rotation(objective, START, settings(name))
    assert trained.objective_after < 0.5 * trained.history[-1]
    assert trained.objective_after == pytest.approx(min(trained.history), rel=1e-6)
    found = float(objective(trained.rotation.R1, trained.rotation.R2)[0])
    assert found == pytest.approx(trained.objective_after, rel=1e-5)
    assert trained.rotation.R1.dtype is trained.rotation.R2.dtype is torch.float32
    assert trained.orthogonality == trained.rotation.orthogonality() < ORTHOGONALITY_LIMIT


@by_name
def test_each_step_sees_the_next_batch_and_the_history_what_was_seen_of_all(name: str) -> None:
    targets, seen = (
        [Rotation.random(SIZES, torch.Generator().manual_seed(i)).to(dtype=torch.float32) for i in (0, 1)],
        [],
    )
    objective = distance_to_all(targets, seen)
    trained = train_rotation(objective, START, settings(name, steps=5, batches=2))
    assert seen == [1, 0, 1, 0, 1, 0, 1]
    assert trained.objective_before == pytest.approx(float(objective(START.R1, START.R2)[0]), rel=1e-6)
    first = float(distance_to(targets[0])(START.R1, START.R2)[0])
    of_second = 2 * trained.history[1] - first  # after one step the other batch has been seen again, at its end
    assert of_second < 2 * trained.objective_before - first


@by_name
def test_batches_in_turn_lead_where_the_whole_objective_does(name: str) -> None:
    planes = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    near = [torch.linalg.matrix_exp(angle * (planes - planes.mT)) for angle in (0.04, 0.06)]
    objective = distance_to_all([Rotation(R1, START.R2) for R1 in near], [])
    whole, in_turn = (train_rotation(objective, START, settings(name, steps=200, batches=n)) for n in (1, 2))
    reached = [float(objective(found.rotation.R1, found.rotation.R2)[0]) for found in (whole, in_turn)]
    assert reached[1] < reached[0] + 0.05 * (whole.objective_before - reached[0])
    assert in_turn.objective_after == pytest.approx(reached[1], rel=0.05)


@by_name
def test_no_steps_give_the_start_and_its_objective(name: str) -> None:
    trained = train_rotation(distance_to(far_target()), START, settings(name, steps=0))
    assert torch.equal(trained.rotation.R1, START.R1)
    assert torch.equal(trained.rotation.R2, START.R2)
    assert trained.history == [trained.objective_before] == [trained.objective_after]
    assert trained.orthogonality == 0
    assert trained.warnings == []


@by_name
def test_training_twice_gives_the_same_bits_and_leaves_the_start_alone(name: str) -> None:
    start = Rotation.random(SIZES, torch.Generator().manual_seed(5)).to(dtype=torch.float32)
    before = Rotation(start.R1.clone(), start.R2.clone())
    first, second = (train_rotation(distance_to(far_target()), start, settings(name)) for _ in range(2))
    assert first.history == second.history
    assert torch.equal(first.rotation.R1, second.rotation.R1)
    assert torch.equal(start.R1, before.R1)
    assert torch.equal(start.R2, before.R2)


@by_name
@pytest.mark.parametrize("steps", [0, 1, 60])
def test_coarser_products_still_return_a_rotation_that_is_orthogonal_to_float32(name: str, steps: int) -> None:
    drifted = Rotation(START.R1 + 1e-4, START.R2 + 1e-4)
    trained, exact = (
        train_rotation(distance_to(far_target()), drifted, settings(name, steps=steps), precision=precision)
        for precision in ("high", "highest")
    )
    assert trained.orthogonality == trained.rotation.orthogonality() < 1e-6
    assert trained.rotation.R1.dtype is trained.rotation.R2.dtype is torch.float32
    assert len(trained.history) == steps + 1
    reached = exact.objective_before - exact.objective_after
    assert trained.objective_after == pytest.approx(exact.objective_after, abs=0.01 * reached + 1e-6)
    if steps:
        assert trained.objective_after < trained.objective_before
    elif name != "adam_qr":  # whose start is a QR factor
        assert exact.orthogonality > 1e-4
    assert torch.get_float32_matmul_precision() == "highest"


def test_several_layers_share_r1_and_train_each_its_own_r2() -> None:
    targets = [Rotation.random(SIZES, torch.Generator().manual_seed(seed)).to(dtype=torch.float32) for seed in (0, 1)]
    near = [torch.linalg.matrix_exp(0.1 * (t.R2 - t.R2.mT)) for t in targets]
    objectives = [lambda R1, R2, _, target=target: (R2 - target).square().sum() + 0 * R1.sum() for target in near]
    start = Rotation(START.R1, START.R2.repeat(2, 1, 1))
    trained = train_rotation(with_gradients(objectives), start, settings(steps=200))
    assert trained.rotation.R2.shape == (4, 4, 4)
    torch.testing.assert_close(trained.rotation.R2, torch.cat(near), rtol=0, atol=5e-3)
    torch.testing.assert_close(trained.rotation.R1, START.R1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["riemannian_adam", "spectral"])
def test_an_invertible_map_is_trained_beside_an_orthogonal_r1(name: str) -> None:
    near = torch.linalg.matrix_exp(0.3 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)))
    target = Rotation(START.R1, 2 * near / torch.linalg.matrix_norm(near, keepdim=True))
    start = dataclasses.replace(START, value_map="invertible")
    reached = [train_rotation(distance_to(target), at, settings(name, steps=300)) for at in (START, start)]
    trained = reached[1]
    assert trained.rotation.value_map == "invertible"
    assert trained.orthogonality == trained.rotation.orthogonality() < ORTHOGONALITY_LIMIT
    assert trained.rotation.condition() > 2
    assert trained.warnings == []
    distances = [float((each.rotation.R2 - target.R2).norm()) for each in reached]
    assert distances[1] < 0.1 * distances[0]
    assert reached[0].rotation.value_map == "orthogonal"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@by_name
def test_an_objective_that_is_not_finite_at_the_start_is_an_error(name: str, value: float) -> None:
    broken = with_gradients([lambda R1, R2, _: value * (R1.sum() + R2.sum())])
    with pytest.raises(RuntimeError, match=f"not finite before the first step.*{value}"):
        train_rotation(broken, START, settings(name))


def test_values_that_become_not_finite_leave_the_last_good_rotation_and_a_warning() -> None:
    trained = train_rotation(distance_to(far_target(), nan_away_from_start=True), START, settings(steps=5))
    assert torch.equal(trained.rotation.R1, START.R1)
    assert torch.equal(trained.rotation.R2, START.R2)
    assert trained.objective_after == trained.objective_before
    assert any("not finite at some step" in warning for warning in trained.warnings)


def test_an_objective_that_cannot_fall_is_warned_of() -> None:
    trained = train_rotation(distance_to(START), START, settings(steps=5))
    assert [warning for warning in trained.warnings if "did not fall (0 -> 0)" in warning] == trained.warnings
    assert len(trained.warnings) == 1


@pytest.mark.parametrize(
    ("before", "after", "orthogonality", "history", "words"),
    [
        (2.0, 1.0, 1e-6, [2.0, 1.0], []),
        (2.0, 2.0, 0.0, [2.0], []),
        (2.0, 1.0, 5e-3, [2.0, 1.0], ["reached 0.005, above 0.001"]),
        (2.0, 1.0, math.nan, [2.0, 1.0], ["reached nan"]),
        (2.0, 2.0, 0.0, [2.0, 2.5], ["did not fall (2 -> 2)"]),
        (2.0, 1.0, 0.0, [2.0, math.nan, 1.0], ["not finite at some step"]),
        (2.0, 2.0, 1.0, [2.0, math.inf], ["reached 1,", "did not fall", "not finite at some step"]),
    ],
)
def test_each_thing_that_looks_wrong_is_said_once(
    before: float, after: float, orthogonality: float, history: list[float], words: list[str]
) -> None:
    found = watch(before, after, orthogonality, history)
    assert len(found) == len(words)
    assert all(part in warning for part, warning in zip(words, found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["riemannian_adam", "spectral"])
@pytest.mark.parametrize("salience", ["wanda", "sequential_obs"])
def test_the_training_of_an_invertible_map_is_captured_in_a_cuda_graph(
    name: str, salience: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, cuda = tiny_source(tmp_path, "llama"), torch.device("cuda")
    stream = ActivationStream.start(source, some_tokens(5, 30), 2, cuda)
    layer = source.layer(0, cuda)
    folded = fold_norms(layer, source.spec)
    hessians = collect_hessians(layer, source.spec, stream, 0, tuple(source.spec.inputs))
    sensitivities = collect_sensitivities(layer, source.spec, source.sizes, stream, 0, 0)
    problem = LayerProblem.of_layer(folded, source.spec, source.sizes, hessians, sensitivities)
    sparsity = SparsityConfig(keep=2, group=4)
    objective = build_objective(ObjectiveConfig(), salience, sparsity, problem, 0.01, "invertible")
    start = dataclasses.replace(Rotation.identity(source.sizes, cuda), value_map="invertible")
    caplog.set_level(logging.INFO)
    found, expected = (
        train_rotation(with_gradients([objective]), start, settings(name, steps=20), can_capture=can_capture)
        for can_capture in (True, False)
    )
    assert "without a CUDA graph" not in caplog.text
    assert found.objective_after < 0.95 * found.objective_before
    assert found.objective_after == pytest.approx(expected.objective_after, rel=1e-3)
