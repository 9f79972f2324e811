from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners import PRUNERS, relative_error, sparsity_of
from drotator.pruners.admm import FIRST_PENALTY, LAST_PENALTY, keep_largest, penalties, proximal, prune_admm, search
from drotator.pruners.masks import num_removed
from drotator.pruners.solve import solve_on_mask

SPARSITIES = [
    SparsityConfig(keep=2, group=4),
    SparsityConfig(keep=4, group=8),
    SparsityConfig(keep=1, group=4),
    SparsityConfig(ratio=0.5),
    SparsityConfig(ratio=0.625),
]
by_label = pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda sparsity: sparsity.label)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def problem(
    d_out: int, d_in: int, *, seed: int = 0, decay: float = 1.0, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Make a float64 weight and the Hessian of inputs of a decaying spectrum, whose sizes differ by orders."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spectrum = torch.arange(1, d_in + 1, dtype=torch.float64) ** (-decay / 2)
    size = normal(d_in, 1).exp()
    X = size * ((torch.linalg.qr(normal(d_in, d_in)).Q * spectrum) @ normal(d_in, 4 * d_in))
    X[list(dead)] = 0
    return normal(d_out, d_in) / size.T.sqrt(), 2 / X.shape[1] * X @ X.T


def admm(W: Tensor, H: Tensor, sparsity: SparsityConfig, **settings: float) -> tuple[Tensor, Tensor, float]:
    return prune_admm([W], H, sparsity, PrunerConfig(name="admm", **settings))[0]  # type: ignore[arg-type]


def with_damping(H: Tensor, damping: float) -> Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def row_errors(W: Tensor, V: Tensor, H: Tensor, damping: float) -> Tensor:
    return (((W - V) @ with_damping(H, damping)) * (W - V)).sum(dim=1)


def least_squares(W: Tensor, mask: Tensor, H: Tensor, damping: float) -> Tensor:
    """Solve for every row alone, on its kept columns."""
    damped, V = with_damping(H, damping), torch.zeros_like(W)
    for i, keep in enumerate(mask):
        V[i, keep] = torch.linalg.solve(damped[keep][:, keep], damped[keep] @ W[i])
    return V


def random_mask(d_out: int, d_in: int) -> Tensor:
    return torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(7)) < 0.5


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_solving_on_a_mask_reaches_the_least_squares_of_every_row(damping: float) -> None:
    W, H = problem(9, 24)
    mask = random_mask(9, 24)
    mask[3], mask[4] = False, True
    expected = least_squares(W, mask, H, damping)
    solved = solve_on_mask(W, torch.where(mask, W, 0), mask, H, damping=damping, steps=200)
    torch.testing.assert_close(solved, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(solved[3], torch.zeros(24, dtype=torch.float64)) and torch.equal(solved[4], W[4])


def test_as_many_steps_as_kept_weights_solve_a_row() -> None:
    W, H = problem(5, 8, decay=0.5)
    mask = torch.arange(8).expand(5, 8) % 2 == 0
    solved = solve_on_mask(W, torch.zeros_like(W), mask, H, damping=0.01, steps=4)
    torch.testing.assert_close(solved, least_squares(W, mask, H, 0.01))


@by_dtype
def test_no_row_gets_worse_with_any_number_of_steps_from_any_start(dtype: torch.dtype) -> None:
    W, H = (tensor.to(dtype) for tensor in problem(12, 32, decay=2.0))
    mask = random_mask(12, 32)
    noise = torch.randn(12, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    best = least_squares(W.double(), mask, H.double(), 0.01).to(dtype)
    for start in (torch.where(mask, W, 0), torch.where(mask, noise, 0), torch.zeros_like(W), best):
        errors = [
            row_errors(W, solve_on_mask(W, start, mask, H, damping=0.01, steps=steps), H, 0.01)
            for steps in (0, 1, 2, 3, 5, 8, 13, 100)
        ]
        for before, after in itertools.pairwise(errors):
            assert (after <= before * (1 + 1e-4)).all()
        assert all((error <= errors[0] * (1 + 4 * torch.finfo(dtype).eps)).all() for error in errors)


@by_dtype
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rows_that_have_arrived_stay_finite(dtype: torch.dtype, scale: float) -> None:
    W, H = (tensor.to(dtype) for tensor in problem(8, 16))
    mask = random_mask(8, 16)
    mask[0], mask[1] = False, True
    W[2] = 0
    solved = solve_on_mask(scale * W, torch.where(mask, scale * W, 0), mask, scale * H, damping=0.01, steps=300)
    expected = least_squares(W.double(), mask, H.double(), 0.01)
    torch.testing.assert_close(solved.double() / scale, expected, rtol=1e-3, atol=1e-4)


def test_solving_in_float32_follows_float64() -> None:
    W, H = problem(32, 96)
    mask = random_mask(32, 96)
    start = torch.where(mask, W, 0)
    exact = solve_on_mask(W, start, mask, H, damping=0.01, steps=20)
    single = solve_on_mask(W.float(), start.float(), mask, H.float(), damping=0.01, steps=20)
    torch.testing.assert_close(
        row_errors(W, single.double(), H, 0.01), row_errors(W, exact, H, 0.01), rtol=1e-3, atol=1e-9
    )


def test_solving_keeps_its_inputs_dead_weights_and_positive_zeros() -> None:
    W, H = problem(6, 16, dead=(2, 9))
    H = (H + H.T) / 2  # to the last bit, which not every CPU's product is
    mask = random_mask(6, 16)
    start = torch.where(mask, -W.abs(), -0.0)
    start[:, [2, 9]] = torch.where(mask, W, 0)[:, [2, 9]]
    inputs = (W, start, mask, H)
    before = [tensor.clone() for tensor in inputs]
    for damping in (0.0, 0.01):
        solved = solve_on_mask(*inputs, damping=damping, steps=30)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))
        assert torch.equal(solved[:, [2, 9]], torch.where(mask, W, 0)[:, [2, 9]])
        assert not solved[~mask].any() and not solved[~mask].signbit().any()
        assert row_errors(W, solved, H, damping).sum() < 0.5 * row_errors(W, start, H, damping).sum()
        strided = solve_on_mask(W.T.contiguous().T, start, mask, H.T, damping=damping, steps=30)
        assert torch.equal(strided, solved)
    assert torch.equal(solve_on_mask(W, start, mask, torch.zeros_like(H), damping=0.01, steps=5), start)


def test_solving_follows_sparsegpt_and_wanda_with_less_error() -> None:
    W, H = problem(16, 48)
    for name in ("sparsegpt", "wanda", "magnitude"):
        (pruned,) = PRUNERS[name]([W], H, SparsityConfig(keep=2, group=4), PrunerConfig(name=name))
        solved = solve_on_mask(W, pruned.weight, pruned.mask, H, damping=0.01, steps=10)
        assert relative_error(W, solved, H) < 0.95 * relative_error(W, pruned.weight, H)


def test_solving_refuses_a_hessian_that_is_not_finite() -> None:
    W, H = problem(4, 8)
    H[1, 1] = math.nan
    with pytest.raises(RuntimeError, match=r"Hessian H \(8 x 8\) is not finite in 1 of its 64 values"):
        solve_on_mask(W, W, torch.ones_like(W, dtype=torch.bool), H, damping=0.01, steps=1)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8)])
def test_the_projection_is_the_nearest_matrix_of_the_pattern(keep: int, group: int) -> None:
    T = torch.randn(5, 2 * group, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = keep_largest(T, SparsityConfig(keep=keep, group=group), [len(T)])
    for row, kept in zip(T.view(-1, group), mask.view(-1, group), strict=True):
        distances = {
            survivors: sum(float(row[j]) ** 2 for j in range(group) if j not in survivors)
            for survivors in itertools.combinations(range(group), keep)
        }
        assert tuple(kept.nonzero()[:, 0].tolist()) == min(distances, key=lambda survivors: distances[survivors])


def test_the_unstructured_projection_is_the_nearest_of_all_of_its_count() -> None:
    T = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = T.flatten().tolist()
    best = min(
        itertools.combinations(range(12), 5),
        key=lambda survivors: sum(value**2 for j, value in enumerate(values) if j not in survivors),
    )
    mask = keep_largest(T, SparsityConfig(ratio=7 / 12), [len(T)])
    assert tuple(mask.flatten().nonzero()[:, 0].tolist()) == best


@pytest.mark.parametrize("rho", [0.3, 3.0])
def test_the_proximal_matrix_solves_the_step_of_admm(rho: float) -> None:
    W, H = problem(5, 12)
    target = torch.randn(5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    V = W - (W - target) @ proximal(H, rho)
    gradient = (V - W) @ H + rho * (V - target)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    torch.testing.assert_close(proximal(H.float(), rho).double(), proximal(H, rho), rtol=1e-4, atol=1e-6)


def test_the_proximal_matrix_of_a_large_norm_has_its_digits_in_float32() -> None:
    G = 1e6 * torch.ones(64, 64) + torch.eye(64)
    expected = torch.linalg.inv(G.double() + torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(proximal(G, 1.0).double(), expected, rtol=0, atol=1e-6)


def plain_admm(A: Tensor, G: Tensor, sparsity: SparsityConfig, iterations: int) -> tuple[Tensor, Tensor]:
    """The three steps as papers write them: W, D and the unscaled multiplier, a linear solve in each."""
    D = torch.where(keep_largest(A, sparsity, [len(A)]), A, 0)
    multiplier = torch.zeros_like(A)
    for rho, length in penalties(iterations):
        for _ in range(length):
            V = torch.linalg.solve(G + rho * torch.eye(len(G), dtype=G.dtype), (A @ G + rho * D - multiplier).T).T
            target = V + multiplier / rho
            mask = keep_largest(target, sparsity, [len(target)])
            D = torch.where(mask, target, 0)
            multiplier = multiplier + rho * (V - D)
    return D, mask


@by_label
@pytest.mark.parametrize("iterations", [1, 7, 25])
def test_the_search_is_admm_as_written_out(sparsity: SparsityConfig, iterations: int) -> None:
    A, G = problem(6, 24, decay=0.5)
    T, mask = search(A, G, sparsity, iterations, [len(A)])
    D, expected = plain_admm(A, G, sparsity, iterations)
    assert torch.equal(mask, expected)
    torch.testing.assert_close(torch.where(mask, T, 0), D)


@pytest.mark.parametrize("iterations", [1, 2, 9, 10, 11, 99, 100, 1000])
def test_penalties_rise_to_the_last_and_share_out_all_iterations(iterations: int) -> None:
    rhos, lengths = zip(*penalties(iterations), strict=True)
    assert sum(lengths) == iterations and max(lengths) - min(lengths) <= 1
    assert list(rhos) == sorted(rhos) and rhos[0] == FIRST_PENALTY
    assert rhos[-1] == pytest.approx(LAST_PENALTY if iterations > 1 else FIRST_PENALTY)


def test_uncorrelated_inputs_leave_the_mask_where_it_is_best() -> None:
    W, _ = problem(8, 32)
    H = torch.diag(torch.logspace(0, -3, 32, dtype=torch.float64))
    for sparsity in SPARSITIES:
        weight, mask, _ = admm(W, H, sparsity)
        assert torch.equal(
            mask, keep_largest(W * (H + 0.01 * H.diagonal().mean()).diagonal().sqrt(), sparsity, [len(W)])
        )
        torch.testing.assert_close(weight, torch.where(mask, W, 0))


def test_the_best_of_all_masks_of_a_small_row_is_found_or_nearly() -> None:
    sparsity = SparsityConfig(keep=2, group=4)
    pairs = list(itertools.combinations(range(4), 2))
    ratios = []
    for seed in range(20):
        W, H = problem(1, 8, seed=seed)
        H = with_damping(H, 0.01)
        best = math.inf
        for first, second in itertools.product(pairs, pairs):
            mask = torch.zeros(1, 8, dtype=torch.bool)
            mask[0, [*first, *(4 + j for j in second)]] = True
            best = min(best, float(relative_error(W, least_squares(W, mask, H, 0.0), H)))
        ratios.append(float(relative_error(W, admm(W, H, sparsity, damping=1e-9)[0], H)) / best)
    assert min(ratios) > 1 - 1e-6
    assert sum(ratio < 1.001 for ratio in ratios) >= 14 and sum(ratios) / len(ratios) < 1.2


@by_label
@by_dtype
@pytest.mark.parametrize("iterations", [1, 30])
def test_counts_are_exact_and_removed_weights_positive_zeros(
    sparsity: SparsityConfig, dtype: torch.dtype, iterations: int
) -> None:
    W, H = (tensor.to(dtype) for tensor in problem(7, 24))
    weight, mask, damping = admm(-W.abs(), H, sparsity, iterations=iterations)
    removed = num_removed(sparsity, 7, 24)
    assert weight.dtype == dtype and damping == 0.01
    assert int((weight == 0).sum()) == int((~mask).sum()) == removed
    assert sparsity_of(weight) == pytest.approx(sparsity.fraction)
    assert not weight[~mask].signbit().any()
    if sparsity.is_grouped:
        assert (mask.view(7, -1, sparsity.group).sum(dim=2) == sparsity.keep).all()


@by_label
def test_weights_of_dead_inputs_go_first_and_stay_as_they_are_where_they_must(sparsity: SparsityConfig) -> None:
    W, H = problem(6, 16, dead=(2, 9))
    W[:, [2, 9]] *= 100
    weight, mask, _ = admm(W, H, sparsity)
    assert not mask[:, [2, 9]].any() and not weight[:, [2, 9]].any()
    W, H = problem(6, 16, dead=tuple(range(2, 16)))
    weight, mask, _ = admm(W, H, sparsity)
    assert int((weight == 0).sum()) == num_removed(sparsity, 6, 16)
    assert torch.equal(weight[:, 2:], torch.where(mask, W, 0)[:, 2:])


@by_label
def test_inputs_are_not_modified_and_strides_do_not_matter(sparsity: SparsityConfig) -> None:
    W, H = problem(6, 16, dead=(1,))
    before = W.clone(), H.clone()
    result = admm(W, H, sparsity)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])
    again = admm(W.T.contiguous().T, H, sparsity)
    assert torch.equal(again[0], result[0]) and torch.equal(again[1], result[1])


@by_label
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_admm_loses_clearly_less_than_sparsegpt(sparsity: SparsityConfig, decay: float) -> None:
    for seed in range(3):
        W, H = (tensor.float() for tensor in problem(48, 128, seed=seed, decay=decay))
        (sparsegpt,) = PRUNERS["sparsegpt"]([W], H, sparsity, PrunerConfig())
        best = relative_error(W, admm(W, H, sparsity)[0], H)
        assert 0 < best < 0.9 * relative_error(W, sparsegpt.weight, H)
        assert best < relative_error(W, admm(W, H, sparsity, iterations=3)[0], H)
        solved = solve_on_mask(W, sparsegpt.weight, sparsegpt.mask, H, damping=0.01, steps=50)
        assert best < 0.97 * relative_error(W, solved, H)


@by_label
def test_admm_in_float32_follows_float64(sparsity: SparsityConfig) -> None:
    W, H = problem(32, 96)
    exact, exact_mask, _ = admm(W, H, sparsity)
    single, single_mask, _ = admm(W.float(), H.float(), sparsity)
    # A search over masks may part ways at two that are as good as each other; what it finds must be as good.
    assert (single_mask == exact_mask).double().mean() > 0.97
    errors = [float(relative_error(W, weight.double(), H)) for weight in (single, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_float32_stands_a_hessian_of_few_samples(caplog: pytest.LogCaptureFixture) -> None:
    W, _ = problem(16, 256)
    X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = 1e4 * X @ X.T
    for sparsity in SPARSITIES:
        weight, mask, damping = admm(W.float(), H.float(), sparsity)
        assert damping == 0.01 and not caplog.records
        assert torch.isfinite(weight).all()
        assert relative_error(W, weight.double(), H) < 0.05 * relative_error(W, torch.where(mask, W, 0), H)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_name(value: float) -> None:
    W, H = problem(4, 8)
    broken_W, broken_H = W.clone(), H.clone()
    broken_W[1, 2] = broken_H[0, 5] = value
    with pytest.raises(RuntimeError, match=r"weight W \(4 x 8\) is not finite in 1 of its 32 values"):
        admm(broken_W, H, SPARSITIES[0])
    with pytest.raises(RuntimeError, match=r"Hessian H \(8 x 8\) is not finite in 1 of its 64 values"):
        admm(W, broken_H, SPARSITIES[0])


def test_damping_that_was_raised_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    W, _ = problem(4, 16)
    v = torch.ones(16, dtype=torch.float64) / 4
    H = torch.eye(16, dtype=torch.float64) - 1.05 * torch.outer(v, v)
    with caplog.at_level(logging.WARNING):
        weight, mask, damping = admm(W, H, SparsityConfig(ratio=0.5))
    assert damping == 0.1 and len(caplog.records) == 1
    assert torch.isfinite(weight).all() and int((~mask).sum()) == 32


@by_label
def test_the_loops_read_no_value_back_to_the_host(sparsity: SparsityConfig) -> None:
    A, G = problem(8, 32)
    mask = keep_largest(A, sparsity, [len(A)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        search(A, G, sparsity, 20, [len(A)])
    operations = {event.key for event in profile.key_averages()}
    waits = {"item", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
    assert "aten::addmm" in operations and operations.isdisjoint(f"aten::{name}" for name in waits)
    counts = []
    for steps in (1, 5):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            solve_on_mask(A, torch.where(mask, A, 0), mask, G, damping=0.01, steps=steps)
        events = [event for event in profile.key_averages() if event.key == "aten::_local_scalar_dense"]
        counts.append(sum(event.count for event in events))
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@by_label
def test_the_search_never_waits_for_the_gpu(sparsity: SparsityConfig) -> None:
    A, G = (tensor.cuda() for tensor in problem(8, 32))
    expected = search(A, G, sparsity, 20, [len(A)])  # sets the libraries up, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        T, mask = search(A, G, sparsity, 20, [len(A)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(T, expected[0]) and torch.equal(mask, expected[1])
