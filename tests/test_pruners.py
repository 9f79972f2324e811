from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners import PRUNERS, PrunedLinear, relative_error, sparsegpt, sparsity_of, validate
from drotator.pruners.masks import grouped_mask, matrix_mask, num_removed, row_mask
from drotator.pruners.sparsegpt import inverse_factor, sweep

RATIOS = (0.5, 0.6, 0.7, 0.333)
GROUPS = ((2, 4), (4, 8), (1, 2), (3, 4), (5, 7))
SPARSITIES = [SparsityConfig(ratio=ratio) for ratio in RATIOS] + [
    SparsityConfig(keep=keep, group=group) for keep, group in GROUPS
]
by_label = pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda sparsity: sparsity.label)
by_pruner = pytest.mark.parametrize("name", PRUNERS)


def problem(
    d_out: int, d_in: int, *, dtype: torch.dtype = torch.float64, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Make a weight and the Hessian of inputs that are correlated, of unequal size, and some of them never active."""
    generator = torch.Generator().manual_seed(1000 * d_out + d_in)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d_in)
    mix *= torch.rand(d_in, 1, generator=generator, dtype=torch.float64) + 0.1
    X = mix @ torch.randn(d_in, 4 * d_in, generator=generator, dtype=torch.float64)
    X[list(dead)] = 0
    W = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return W.to(dtype), (2 / X.shape[1] * X @ X.T).to(dtype)


def prune(name: str, W: Tensor, H: Tensor, sparsity: SparsityConfig, **settings: float) -> PrunedLinear:
    return PRUNERS[name]([W], H, sparsity, PrunerConfig(name=name, **settings))[0]  # type: ignore[arg-type]


def smallest(scores: dict[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
    """Name the places of the smallest scores; of equal ones the later are taken."""
    later_first = list(scores)[::-1]
    return sorted(later_first, key=lambda place: scores[place])[:count]


def obs_reference(W: Tensor, H: Tensor, sparsity: SparsityConfig, damping: float, block: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, one column at a time, with the inverse of the remaining Hessian formed anew at each."""
    (d_out, d_in), W, H = W.shape, W.clone(), H.clone()
    shift = damping * H.diagonal().sum() / d_in
    dead = [j for j in range(d_in) if H[j, j] == 0]
    for j in range(d_in):
        H[j, j] += shift + (1 if j in dead else 0)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(d_in)]

    def scores(columns: range) -> dict[tuple[int, int], float]:
        cost = [0.0 if j in dead else 1 / float(inverses[j][0, 0]) for j in range(d_in)]
        return {(i, j): float(W[i, j]) ** 2 * cost[j] for j in columns for i in range(d_out)}

    mask = torch.ones(d_out, d_in, dtype=torch.bool)
    total = round(sparsity.ratio * (d_out * d_in))
    for j in range(d_in):
        if sparsity.is_grouped and j % sparsity.group == 0:
            everything = scores(range(j, j + sparsity.group))
            for i in range(d_out):
                row = {place: score for place, score in everything.items() if place[0] == i}
                for place in smallest(row, sparsity.group - sparsity.keep):
                    mask[place] = False
        if not sparsity.is_grouped and j % block == 0:
            stop = min(j + block, d_in)
            for place in smallest(scores(range(j, stop)), total * stop // d_in - total * j // d_in):
                mask[place] = False
        for i in range(d_out):
            if not mask[i, j]:
                W[i, j:] -= W[i, j] / inverses[j][0, 0] * inverses[j][0]
                W[i, j] = 0
    return W, mask


@by_pruner
@by_label
def test_every_pruner_removes_exactly_the_share_asked_for(name: str, sparsity: SparsityConfig) -> None:
    for d_out, units in ((1, 1), (3, 5), (7, 3), (10, 9)):
        d_in = units * max(sparsity.group, 1) if sparsity.is_grouped else 2 * units + 1
        W, H = problem(d_out, d_in, dtype=torch.float32)
        weight, mask, _ = prune(name, W, H, sparsity, block_size=4)
        expected = round(sparsity.fraction * d_out * d_in)
        assert int((~mask).sum()) == expected
        assert int((weight == 0).sum()) == expected
        assert sparsity_of(weight) == pytest.approx(expected / (d_out * d_in), abs=1e-12)
        assert torch.equal(weight != 0, mask)


@by_pruner
@pytest.mark.parametrize(("keep", "group"), GROUPS)
def test_every_group_keeps_its_number_of_weights(name: str, keep: int, group: int) -> None:
    W, H = problem(9, 6 * group)
    mask = prune(name, W, H, SparsityConfig(keep=keep, group=group), block_size=3).mask
    for row in mask.tolist():
        for start in range(0, len(row), group):
            assert sum(row[start : start + group]) == keep


@by_pruner
@by_label
def test_pruners_keep_dtype_and_leave_their_inputs_as_they_were(name: str, sparsity: SparsityConfig) -> None:
    for dtype in (torch.float32, torch.float64):
        W, H = problem(6, 56, dtype=dtype, dead=(1,))
        W_before, H_before = W.clone(), H.clone()
        result = prune(name, torch.nn.Parameter(W), H, sparsity, block_size=5)
        assert torch.equal(W, W_before) and torch.equal(H, H_before)
        assert result.weight.dtype == dtype and not result.weight.requires_grad
        assert result.mask.dtype == torch.bool and result.mask.shape == result.weight.shape == W.shape
        again = prune(name, W.T.contiguous().T, H, sparsity, block_size=5)
        assert torch.equal(again.weight, result.weight) and torch.equal(again.mask, result.mask)


@by_pruner
@by_label
def test_removed_weights_are_positive_zeros(name: str, sparsity: SparsityConfig) -> None:
    W, H = problem(8, 56)
    weight, mask, _ = prune(name, -W.abs(), H, sparsity)
    assert not weight[~mask].signbit().any()


@by_pruner
def test_equal_weights_are_removed_in_exact_numbers_and_always_the_same(name: str) -> None:
    W, H = torch.ones(5, 16), torch.eye(16)
    for sparsity in (SparsityConfig(ratio=0.6), SparsityConfig(keep=2, group=4)):
        results = [prune(name, W, H, sparsity, block_size=8) for _ in range(3)]
        assert int((~results[0].mask).sum()) == num_removed(sparsity, 5, 16)
        assert all(torch.equal(result.mask, results[0].mask) for result in results)
    assert results[0].mask.tolist() == [[True, True, False, False] * 4] * 5


@by_pruner
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str) -> None:
    W, H = problem(4, 8)
    W[1, 2] = math.nan
    with pytest.raises(RuntimeError, match=r"weight W \(4 x 8\) is not finite in 1 of its 32 values"):
        prune(name, W, H, SparsityConfig(ratio=0.5))


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "magnitude"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    W, H = problem(4, 8)
    H[3, 3] = value
    with pytest.raises(RuntimeError, match=r"Hessian H .* is not finite in 1 of its"):
        prune(name, W, H, SparsityConfig(ratio=0.5))


@by_pruner
def test_a_group_that_does_not_divide_the_inputs_is_refused(name: str) -> None:
    W, H = problem(4, 18)
    with pytest.raises(ValueError, match="sparsity=2of4 needs d_in divisible by 4, but the weight has d_in=18"):
        prune(name, W, H, SparsityConfig(keep=2, group=4))


def test_validate_names_the_linear_and_says_what_to_do() -> None:
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match="divisible") as error:
        validate(SparsityConfig(keep=2, group=4), 18, name)
    assert str(error.value) == (
        "sparsity=2of4 needs d_in divisible by 4, but model.layers.0.mlp.down_proj has d_in=18. "
        "Choose a group that divides it, or sparsity=50."
    )
    validate(SparsityConfig(keep=2, group=4), 20, name)
    validate(SparsityConfig(ratio=0.5), 17, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_mask_keeps_the_largest_of_every_group(dtype: torch.dtype) -> None:
    importance = torch.rand(6, 21, generator=torch.Generator().manual_seed(0), dtype=dtype)
    mask = grouped_mask(importance, 3, 7)
    for i in range(6):
        for start in range(0, 21, 7):
            values = importance[i, start : start + 7].tolist()
            assert mask[i, start : start + 7].tolist() == [value in sorted(values)[-3:] for value in values]


@pytest.mark.parametrize("removed", [0, 1, 17, 38, 76, 77])
def test_row_mask_takes_the_smallest_of_each_row_and_spreads_the_remainder(removed: int) -> None:
    importance = torch.rand(7, 11, generator=torch.Generator().manual_seed(0))
    mask = row_mask(importance, removed)
    for i, row in enumerate(importance.tolist()):
        count = (i + 1) * removed // 7 - i * removed // 7
        assert mask[i].tolist() == [value not in sorted(row)[:count] for value in row]
    assert int((~mask).sum()) == removed


@pytest.mark.parametrize("removed", [0, 1, 38, 77])
def test_matrix_mask_takes_the_smallest_of_all(removed: int) -> None:
    importance = torch.rand(7, 11, generator=torch.Generator().manual_seed(0))
    gone = sorted(importance.flatten().tolist())[:removed]
    expected = [[value not in gone for value in row] for row in importance.tolist()]
    assert matrix_mask(importance, removed).tolist() == expected


def test_of_equal_importances_the_first_survive() -> None:
    importance = torch.ones(30, 40)
    assert torch.equal(matrix_mask(importance, 500), torch.arange(1200).reshape(30, 40) < 700)
    assert torch.equal(row_mask(importance, 30 * 25), (torch.arange(40) < 15).expand(30, 40))
    assert torch.equal(grouped_mask(importance, 3, 8), (torch.arange(40) % 8 < 3).expand(30, 40))


def test_magnitude_ranks_by_absolute_value_over_the_whole_matrix() -> None:
    W, H = problem(5, 12)
    weight, mask, damping = prune("magnitude", W, H, SparsityConfig(ratio=0.7))
    scores = {(i, j): abs(float(W[i, j])) for i in range(5) for j in range(12)}
    for place in smallest(scores, 42):
        W[place] = 0
    assert torch.equal(weight, W) and torch.equal(mask, W != 0) and damping == 0


@pytest.mark.parametrize("sparsity", [SparsityConfig(ratio=0.5), SparsityConfig(keep=2, group=4)])
def test_wanda_ranks_by_magnitude_times_input_norm_within_a_row(sparsity: SparsityConfig) -> None:
    W, H = problem(5, 12)
    weight, mask, damping = prune("wanda", W, H, sparsity)
    width = sparsity.group or 12
    for i in range(5):
        for start in range(0, 12, width):
            scores = {(i, j): abs(float(W[i, j])) * math.sqrt(float(H[j, j])) for j in range(start, start + width)}
            for place in smallest(scores, width // 2):
                W[place] = 0
    assert torch.equal(weight, W) and torch.equal(mask, W != 0) and damping == 0


@by_label
@pytest.mark.parametrize("block_size", [1, 3, 8, 128])
def test_sparsegpt_equals_the_plain_column_recursion(sparsity: SparsityConfig, block_size: int) -> None:
    d_in = 3 * sparsity.group if sparsity.is_grouped else 19
    W, H = problem(5, d_in, dead=(4,))
    weight, mask, damping = prune("sparsegpt", W, H, sparsity, block_size=block_size, damping=0.02)
    expected_weight, expected_mask = obs_reference(W, H, sparsity, 0.02, block_size)
    assert damping == 0.02
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-6, atol=1e-9)


@by_label
@pytest.mark.parametrize("span", [1, 8, 20])
def test_what_is_owed_to_later_columns_may_be_paid_at_any_time(
    sparsity: SparsityConfig, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, H = problem(5, 56, dead=(4,))
    at_once = prune("sparsegpt", W, H, sparsity, block_size=8)
    monkeypatch.setattr(sparsegpt, "SPAN", span)
    found = prune("sparsegpt", W, H, sparsity, block_size=8)
    assert torch.equal(found.mask, at_once.mask)
    torch.testing.assert_close(found.weight, at_once.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("keep", "group"), [(5, 6), (5, 12), (9, 16), (20, 40)])
def test_groups_wider_than_a_panel_or_no_multiple_of_it_equal_the_plain_column_recursion(keep: int, group: int) -> None:
    sparsity = SparsityConfig(keep=keep, group=group)
    W, H = problem(5, 2 * group, dead=(4,))
    weight, mask, _ = prune("sparsegpt", W, H, sparsity)
    expected_weight, expected_mask = obs_reference(W, H, sparsity, 0.01, 128)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("keep", "group"), [*GROUPS, (1, 3), (16, 32), (30, 40)])
def test_groups_of_the_sweep_are_chosen_as_by_grouped_mask_ties_too(keep: int, group: int) -> None:
    importance = torch.randint(3, (group, 500), generator=torch.Generator().manual_seed(0)).float()
    gone = torch.empty_like(importance)
    sparsegpt._choose(importance, keep, sparsegpt._pairs(group, importance), gone)
    assert torch.equal(gone.T, (~grouped_mask(importance.T, keep, group)).float())


@by_pruner
@by_label
def test_linears_pruned_together_are_as_each_alone(name: str, sparsity: SparsityConfig) -> None:
    W, H = problem(23, 56, dead=(3,))
    weights = [size * rows for size, rows in zip((1, 10, 0.1), W.split((12, 4, 7)), strict=True)]
    together = PRUNERS[name](weights, H, sparsity, PrunerConfig(name=name, block_size=20))
    for each, found in zip(weights, together, strict=True):
        weight, mask, damping = prune(name, each, H, sparsity, block_size=20)
        assert torch.equal(found.mask, mask) and found.damping == damping
        assert int((~mask).sum()) == num_removed(sparsity, *each.shape)
        torch.testing.assert_close(found.weight, weight, rtol=1e-9, atol=1e-12)


def test_sparsegpt_in_float32_follows_float64() -> None:
    W, H = problem(16, 64)
    sparsity = SparsityConfig(keep=2, group=4)
    exact = prune("sparsegpt", W, H, sparsity, block_size=16)
    single = prune("sparsegpt", W.float(), H.float(), sparsity, block_size=16)
    assert torch.equal(single.mask, exact.mask)
    torch.testing.assert_close(single.weight.double(), exact.weight, rtol=1e-3, atol=1e-3)


@by_label
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(sparsity: SparsityConfig) -> None:
    W, H = problem(32, 56)
    magnitude, wanda, sparsegpt = (
        float(relative_error(W, prune(name, W, H, sparsity).weight, H)) for name in ("magnitude", "wanda", "sparsegpt")
    )
    assert 0 < sparsegpt < 0.8 * wanda < 0.8 * magnitude


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "magnitude"])
def test_dead_inputs_lose_their_weights_first(name: str) -> None:
    W, H = problem(6, 16, dead=(2, 9, 10))
    W[:, [2, 9, 10]] *= 100
    for sparsity in (SparsityConfig(ratio=0.5), SparsityConfig(keep=2, group=4)):
        weight, mask, _ = prune(name, W, H, sparsity, block_size=8)
        assert not mask[:, [2, 9, 10]].any() and not weight[:, [2, 9, 10]].any()


@by_pruner
def test_more_dead_inputs_than_removals_leave_counts_exact(name: str) -> None:
    W, H = problem(6, 16, dead=tuple(range(4, 15)))
    for sparsity in (SparsityConfig(ratio=0.5), SparsityConfig(keep=3, group=4)):
        weight, mask, _ = prune(name, W, H, sparsity, block_size=4)
        assert int((weight == 0).sum()) == num_removed(sparsity, 6, 16)
        assert torch.equal(weight[:, 4:15], torch.where(mask, W, 0)[:, 4:15])


@by_pruner
def test_a_hessian_of_zeros_prunes_without_complaint(name: str, caplog: pytest.LogCaptureFixture) -> None:
    W, _ = problem(4, 8)
    weight, mask, _ = prune(name, W, torch.zeros(8, 8, dtype=torch.float64), SparsityConfig(ratio=0.5))
    assert torch.equal(weight, torch.where(mask, W, 0)) and not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_hessian_needs_no_more_than_its_damping(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    W, _ = problem(8, 24, dtype=dtype)
    X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    H = X @ X.T
    weight, mask, damping = prune("sparsegpt", W, H, SparsityConfig(keep=2, group=4))
    assert damping == 0.01 and not caplog.records
    uncorrected = relative_error(W, torch.where(mask, W, 0), H)
    assert 0 < relative_error(W, weight, H) < 0.5 * uncorrected


def test_a_hessian_that_float32_cannot_factor_is_factored_in_float64(caplog: pytest.LogCaptureFixture) -> None:
    H = torch.ones(32, 32)
    assert int(torch.linalg.cholesky_ex(H + 1e-9 * torch.eye(32)).info) != 0
    U, damping = inverse_factor(H, 1e-9)
    assert torch.equal(U, inverse_factor(H.double(), 1e-9)[0].float())
    assert damping == 1e-9 and not caplog.records


@pytest.mark.parametrize("block_rows", [8192, 20, 7, 1])
def test_the_inverse_factor_is_upper_and_squares_to_the_inverse(
    block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK_ROWS", block_rows)
    _, H = problem(1, 20)
    H[:, 7] = H[7] = 0
    U, _ = inverse_factor(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    damped[7, 7] += 1
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped))


def indefinite(lowest: float) -> Tensor:
    """Make a Hessian with mean diagonal one and one eigenvalue below zero."""
    v = torch.ones(16, dtype=torch.float64) / 4
    H = torch.eye(16, dtype=torch.float64) - (1 - lowest) * torch.outer(v, v)
    return H / H.diagonal().mean()


def test_damping_is_raised_by_tens_with_a_warning_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    W, _ = problem(4, 16)
    with caplog.at_level(logging.WARNING, logger="drotator.pruners.sparsegpt"):
        result = prune("sparsegpt", W, indefinite(-0.5), SparsityConfig(ratio=0.5))
    assert result.damping == 1.0 and torch.isfinite(result.weight).all()
    assert [record.getMessage() for record in caplog.records] == [
        f"Hessian (16 x 16): not positive definite, damping raised to {damping}." for damping in ("0.1", "1")
    ]


def test_a_hessian_that_no_damping_mends_stops_with_advice(caplog: pytest.LogCaptureFixture) -> None:
    W, _ = problem(4, 16)
    H = indefinite(-11.0)
    H_before = H.clone()
    with pytest.raises(RuntimeError, match=r"even with damping 10 of its mean.*calibration.num_samples.*pruner=wanda"):
        prune("sparsegpt", W, H, SparsityConfig(ratio=0.5))
    assert len(caplog.records) == 3 and torch.equal(H, H_before)


def sweep_of(W: Tensor, H: Tensor, sparsity: SparsityConfig) -> Callable[[], tuple[Tensor, Tensor]]:
    U, _ = inverse_factor(H, 0.01)
    gain = U.diagonal().pow(-2)
    return lambda: sweep([W], U, gain, sparsity, block_size=16)


@by_label
def test_the_column_sweep_reads_no_value_back_to_the_host(sparsity: SparsityConfig) -> None:
    run = sweep_of(*problem(8, 56), sparsity)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    operations = {event.key for event in profile.key_averages()}
    assert "aten::addmm_" in operations
    waits = {"item", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
    assert operations.isdisjoint(f"aten::{name}" for name in waits)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@by_label
def test_the_column_sweep_never_waits_for_the_gpu(sparsity: SparsityConfig) -> None:
    W, H = problem(8, 56)
    run = sweep_of(W.cuda(), H.cuda(), sparsity)
    expected = run()  # sets the libraries up, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        weight, mask = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(weight, expected[0]) and torch.equal(mask, expected[1])


@pytest.mark.gpu
@by_pruner
@by_label
def test_pruners_give_on_the_gpu_what_they_give_on_the_cpu(name: str, sparsity: SparsityConfig) -> None:
    W, H = problem(24, 56, dead=(3,))
    cpu = prune(name, W, H, sparsity, block_size=16)
    gpu = prune(name, W.cuda(), H.cuda(), sparsity, block_size=16)
    assert gpu.weight.is_cuda and torch.equal(gpu.mask.cpu(), cpu.mask)
    torch.testing.assert_close(gpu.weight.cpu(), cpu.weight)


@by_pruner
def test_relative_error_is_the_share_of_output_energy_that_changed(name: str) -> None:
    W, _ = problem(5, 12)
    X = torch.randn(12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = prune(name, W, 2 / 40 * X @ X.T, SparsityConfig(ratio=0.5)).weight
    expected = float((W @ X - weight @ X).square().sum() / (W @ X).square().sum())
    assert float(relative_error(W, weight, 2 / 40 * X @ X.T)) == pytest.approx(expected, rel=1e-12)


def test_relative_error_is_zero_for_no_change_and_one_for_removing_everything() -> None:
    W, H = problem(5, 12)
    assert relative_error(W, W, H) == 0
    assert relative_error(W, torch.zeros_like(W), H) == 1
    assert relative_error(W, torch.zeros_like(W), torch.zeros_like(H)) == 0
