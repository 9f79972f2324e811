from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.pruners import sweep_kernel
from drotator.pruners.masks import num_removed
from drotator.pruners.sparsegpt import _sweep_block, inverse_factor, prune_sparsegpt, sweep

IS_INTERPRETED = bool(find_spec("triton")) and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1 to run on a CPU")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=needs_interpreter)]
)


def grouped(keep: int, group: int) -> SparsityConfig:
    return SparsityConfig(keep=keep, group=group)


# d_out, d_in, sparsity, block_size: tiles and blocks that end early, groups and widths that are no powers of two.
CASES = [
    (40, 96, grouped(2, 4), 128),
    (33, 72, grouped(2, 4), 64),
    (20, 64, grouped(4, 8), 128),
    (35, 42, grouped(1, 3), 16),
    (9, 66, grouped(4, 6), 48),
    (9, 35, grouped(5, 7), 128),
    (5, 64, grouped(16, 32), 32),
    (4, 80, grouped(30, 40), 128),
    (6, 28, grouped(1, 2), 1),
    (40, 96, SparsityConfig(ratio=0.5), 64),
    (33, 51, SparsityConfig(ratio=0.7), 20),
    (3, 23, SparsityConfig(ratio=0.333), 1),
    (1, 1, SparsityConfig(ratio=0.6), 128),
]
by_case = pytest.mark.parametrize(
    ("d_out", "d_in", "sparsity", "block_size"), CASES, ids=lambda value: getattr(value, "label", str(value))
)


@pytest.fixture
def kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name the device on which `sweep` now takes the kernel."""
    if device == "cpu":
        monkeypatch.setattr(sweep_kernel, "is_available", lambda columns, _: columns.dtype == torch.float32)
    assert sweep_kernel.is_available(torch.ones(2, 2, device=device), 128)
    return device


def problem(d_out: int, d_in: int, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Make W, U and the gain, all float64 and on the CPU, of inputs that are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(1000 * d_out + d_in)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d_in)
    X = mix @ torch.randn(d_in, 4 * d_in, generator=generator, dtype=torch.float64)
    X[list(dead)] = 0
    U, _ = inverse_factor(2 / X.shape[1] * X @ X.T, 0.01)
    gain = U.diagonal().pow(-2)
    gain[list(dead)] = 0
    return torch.randn(d_out, d_in, generator=generator, dtype=torch.float64), U, gain


def single(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device, torch.float32) for tensor in tensors)


@devices
@by_case
def test_the_kernel_follows_the_plain_sweep_in_float64(
    kernel: str, d_out: int, d_in: int, sparsity: SparsityConfig, block_size: int
) -> None:
    W, U, gain = problem(d_out, d_in, dead=(d_in // 2,) if d_in > 2 else ())
    of_kernel, *rest = single(kernel, W, U, gain)
    weight, mask = sweep(of_kernel.split(-(-d_out // 2)), *rest, sparsity, block_size)
    expected_weight, expected_mask = sweep(W.split(-(-d_out // 2)), U, gain, sparsity, block_size)
    assert weight.device.type == kernel and weight.dtype == torch.float32 and mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), expected_mask)
    torch.testing.assert_close(weight.cpu().double(), expected_weight, rtol=1e-4, atol=1e-5)


@devices
@by_case
def test_the_kernel_leaves_positive_zeros_in_exact_numbers(
    kernel: str, d_out: int, d_in: int, sparsity: SparsityConfig, block_size: int
) -> None:
    W, U, gain = single(kernel, *problem(d_out, d_in))
    weight, mask = sweep([-W.abs()], U, gain, sparsity, block_size)
    assert int((~mask).sum()) == num_removed(sparsity, d_out, d_in)
    assert torch.equal(weight != 0, mask) and not weight[~mask].signbit().any()


@devices
def test_of_equal_importances_in_the_kernel_the_first_survive(kernel: str) -> None:
    W, U, gain = torch.ones(5, 24, device=kernel), torch.eye(24, device=kernel), torch.ones(24, device=kernel)
    for keep, group in ((2, 4), (1, 3), (5, 8)):
        weight, mask = sweep([W], U, gain, grouped(keep, group), 128)
        assert torch.equal(mask.cpu(), (torch.arange(24) % group < keep).expand(5, 24))
        assert torch.equal(weight, mask.float())
        _, mask = sweep([W], U, torch.zeros_like(gain), grouped(keep, group), 128)
        assert torch.equal(mask.cpu(), (torch.arange(24) % group < keep).expand(5, 24))


@devices
@pytest.mark.parametrize("sparsity", [grouped(2, 4), SparsityConfig(ratio=0.5)], ids=lambda sparsity: sparsity.label)
def test_a_block_of_the_kernel_equals_a_block_of_torch(kernel: str, sparsity: SparsityConfig) -> None:
    W, U, gain = problem(11, 24)
    mask = torch.rand(24, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    expected, expected_mask = W.T.contiguous(), mask.clone()
    expected_errors = _sweep_block(expected, expected_mask, U, gain, sparsity)
    below = torch.full_like(U, math.nan).tril(-1)  # what is not read may be anything
    block, factor, gain = single(kernel, W.T.contiguous(), U + below, gain)
    mask = mask.to(kernel)
    errors = sweep_kernel.sweep_block(block, mask, factor.T.contiguous().T, gain, sparsity)
    assert torch.equal(mask.cpu(), expected_mask)
    torch.testing.assert_close(block.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors.cpu().double(), expected_errors, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("sparsity", [grouped(2, 4), SparsityConfig(ratio=0.5)], ids=lambda sparsity: sparsity.label)
def test_the_kernel_never_waits_for_the_gpu(sparsity: SparsityConfig) -> None:
    W, *rest = single("cuda", *problem(70, 192))
    expected = sweep([W], *rest, sparsity, 128)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        weight, mask = sweep([W], *rest, sparsity, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(weight, expected[0]) and torch.equal(mask, expected[1])


@pytest.mark.gpu
def test_sparsegpt_in_float32_on_a_gpu_launches_the_kernel_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []

    def counted(*arguments: Any) -> Tensor:
        blocks.append(arguments[0].shape)
        return sweep_block(*arguments)

    sweep_block = sweep_kernel.sweep_block
    monkeypatch.setattr(sweep_kernel, "sweep_block", counted)
    W, H = torch.randn(64, 320, device="cuda"), torch.eye(320, device="cuda")
    for dtype, expected in ((torch.float64, []), (torch.float32, [(128, 64), (128, 64), (64, 64)])):
        prune_sparsegpt([W.to(dtype)], H.to(dtype), grouped(2, 4), PrunerConfig())
        assert [shape for shape in blocks if shape != (1, 1)] == expected


def test_the_kernel_is_only_for_float32_on_a_gpu_and_blocks_that_registers_hold() -> None:
    assert not sweep_kernel.is_available(torch.ones(4, 4), 4)
    if torch.cuda.is_available():
        assert not sweep_kernel.is_available(torch.ones(4, 4, device="cuda", dtype=torch.float64), 4)
        assert not sweep_kernel.is_available(torch.ones(4, 4, device="cuda"), 512)
