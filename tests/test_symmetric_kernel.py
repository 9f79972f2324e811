from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from drotator import symmetric_kernel
from drotator.optimizers import matrix_sign, retract, skew
from drotator.resources import float32_products
from drotator.symmetric_kernel import TILE, add_product, is_available, multiply

IS_INTERPRETED = bool(find_spec("triton")) and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1 to run on a CPU")
BFLOAT16 = 2.0**-8
"""Relative error of a rounded number, at most."""
# The interpreter cannot multiply bfloat16, and multiplies float32 as it is.
kinds = pytest.mark.parametrize(
    ("device", "dtype", "rounding"),
    [
        pytest.param("cuda", torch.bfloat16, BFLOAT16, marks=pytest.mark.gpu),
        pytest.param("cpu", torch.float32, 1e-6, marks=needs_interpreter),
    ],
)
SIZES = [1, 2, 8, 9, 17]  # in tiles: groups of rows that are full, that end early, that are the only one


@pytest.fixture
def small_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make tiles small enough for the interpreter."""
    tile = TILE if device == "cuda" else 32
    monkeypatch.setattr(symmetric_kernel, "TILE", tile)
    monkeypatch.setattr(symmetric_kernel, "DEPTH", min(symmetric_kernel.DEPTH, tile))
    return tile


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) / n**0.5


def error(found: Tensor, expected: Tensor) -> float:
    """Of the largest that is wrong, as a part of the largest that there is."""
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


@kinds
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_follows_products_in_float64_and_is_symmetric_or_skew_to_the_bit(
    small_tiles: int, size: int, device: str, dtype: torch.dtype, rounding: float
) -> None:
    n = size * small_tiles
    X = skew(noise(n)).to(device, dtype)
    exact = X.cpu().double()
    gram = multiply(X, X.mT, None, 1, 1.0, 1.0)
    assert gram.dtype == dtype and torch.equal(gram, gram.mT)
    assert error(gram, exact @ exact.mT) < 2 * rounding
    exact_gram = gram.cpu().double()
    for B in (gram, gram.mT):
        found = multiply(gram, B, gram, 1, 0.5, -2.0)
        assert torch.equal(found, found.mT)
        assert error(found, 0.5 * exact_gram - 2 * exact_gram @ exact_gram) < 4 * rounding
    found = multiply(gram, X, X, -1, 3.0, 1.0)
    assert torch.equal(found, -found.mT) and not found.diagonal().any()
    assert error(found, 3 * exact + exact_gram @ exact) < 2 * rounding


@kinds
def test_of_what_only_rounding_makes_asymmetric_the_lower_triangle_counts(
    small_tiles: int, device: str, dtype: torch.dtype, rounding: float
) -> None:
    n = 3 * small_tiles
    A, eye = noise(n).to(device, dtype), torch.eye(n, device=device, dtype=dtype)
    found = multiply(A, eye, None, -1, 1.0, 1.0)
    assert torch.equal(found, -found.mT)
    below = torch.ones(3, 3).tril(-1).repeat_interleave(small_tiles, 0).repeat_interleave(small_tiles, 1).bool()
    assert error(found.cpu()[below], A.cpu().double()[below]) < 2 * rounding


@pytest.fixture
def as_if_available(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, ...]]]:
    """Send matrices on a CPU to the kernel, which is replaced by a product: the list of what it was asked for."""
    calls: list[tuple[object, ...]] = []

    def record(A: Tensor, B: Tensor, D: Tensor | None, symmetry: int, beta: float, alpha: float) -> Tensor:
        calls.append((D is not None, symmetry, beta, alpha))
        return alpha * (A @ B) + (0 if D is None else beta * D)

    monkeypatch.setattr(symmetric_kernel, "is_available", lambda A: A.ndim == 2)
    monkeypatch.setattr(symmetric_kernel, "_runs_on", lambda _: True)
    monkeypatch.setattr(symmetric_kernel, "multiply", record)
    yield calls
    torch.compiler.reset()


def as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def traced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("prepare", [as_it_is, traced])
def test_the_sign_of_a_skew_matrix_takes_the_kernel_for_every_product(
    as_if_available: list[tuple[object, ...]], prepare: Callable[..., Callable[..., Tensor]]
) -> None:
    A = skew(noise(12))
    found = prepare(matrix_sign)(A, -1)
    symmetries = [symmetry for _, symmetry, _, _ in as_if_available]
    assert symmetries == [1, 1, -1, 1, 1, -1, 1, 1, -1]
    torch.testing.assert_close(found, matrix_sign(A.double()).float(), rtol=0, atol=1e-4)
    as_if_available.clear()
    found = prepare(matrix_sign)(noise(12))
    assert [symmetry for _, symmetry, _, _ in as_if_available] == [1] * 6
    torch.testing.assert_close(found, matrix_sign(noise(12).double()).float(), rtol=0, atol=1e-4)


def test_matrices_on_the_cpu_and_what_is_not_symmetric_never_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric_kernel, "_half_product", None)
    monkeypatch.setattr(symmetric_kernel, "SMALLEST", 4)
    A, batch = skew(noise(TILE)), skew(torch.ones(3, 5, 5).cumsum(1))
    assert torch.equal(add_product(A, A, 1), A @ A)
    assert torch.equal(add_product(A, A, 1, A, beta=2.0, alpha=3.0), torch.addmm(A, A, A, beta=2.0, alpha=3.0))
    assert torch.equal(add_product(batch, batch, 1, batch, 2.0), torch.baddbmm(batch, batch, batch, beta=2.0))
    monkeypatch.setattr(symmetric_kernel, "is_available", lambda _: True)
    assert torch.equal(add_product(A, A), A @ A)


@pytest.mark.gpu
def test_the_kernel_is_for_large_matrices_of_whole_tiles_on_a_gpu() -> None:
    def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    n = symmetric_kernel.SMALLEST
    assert is_available(matrix(n, n)) and not is_available(matrix(n, n, dtype=torch.float32))
    assert is_available(matrix(n + TILE, n + TILE))
    assert not is_available(matrix(n + 8, n + 8))
    assert not is_available(matrix(n - TILE, n - TILE))
    assert not is_available(matrix(1, n, n))
    assert not is_available(matrix(n, n).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2048, 2056, 2176])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_sign_of_a_large_skew_matrix_is_that_of_the_cpu(n: int, is_compiled: bool) -> None:
    A = skew(noise(n)).cuda().bfloat16()
    sign = torch.compile(matrix_sign, dynamic=False) if is_compiled else matrix_sign
    found = sign(A, -1)
    expected = matrix_sign(A.double())
    assert float((found - expected).norm() / expected.norm()) < 0.03
    if is_available(A):
        assert torch.equal(found, -found.mT)
        again = sign(A, -1)
        assert torch.equal(again, found)
    torch.compiler.reset()


@pytest.mark.gpu
def test_a_large_retraction_in_tf32_is_near_that_in_float64() -> None:
    n = 2048
    R = torch.linalg.qr(noise(n).cuda().double()).Q
    U = 0.05 * matrix_sign(skew(noise(n, 1)).cuda().double())
    expected = retract(R, U, 0.06)
    with float32_products("high"):
        found = retract(R.float(), U.float(), 0.06, torch.bfloat16)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    with float32_products("highest"):
        exact = retract(R.float(), U.float(), 0.06)
    torch.testing.assert_close(exact.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_kernel_is_replayed_in_a_cuda_graph_and_never_waits_for_the_gpu() -> None:
    A = skew(noise(2048)).cuda().bfloat16()
    expected = matrix_sign(A, -1)  # compiles, which may wait
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            found = matrix_sign(A, -1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    A.neg_()
    graph.replay()
    assert torch.equal(found, -expected)
