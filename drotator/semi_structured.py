"""2:4 linears as torch's kernels run them: torch's own compressed weights, and cuSPARSELt with a searched algorithm.

torch.sparse.to_sparse_semi_structured takes cuSPARSELt's algorithm 0 whatever the shape, and where torch does not have
the kernel write the transposed result (2.13 does), y lies column by column, which later steps have to copy.
`SearchedLinear` asks cuSPARSELt which algorithm is the fastest for a shape, and has y written row by row.

d_in, d_out = sizes of a linear, N = tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from drotator.architecture import LayerSpec, linear
from drotator.config import SparsityConfig
from drotator.pruners.masks import apply_mask, grouped_mask

CUSPARSELT, CUTLASS = "cuSPARSELt", "CUTLASS"
WRONG = 0.05
"""Relative difference between two results of a product from which on one is wrong, not rounded."""
TWO_OF_FOUR = SparsityConfig(keep=2, group=4)
ROWS = 8
"""cuSPARSELt takes tokens in such groups, in 16 bits."""


def prune_2of4(layer: nn.Module, spec: LayerSpec) -> nn.Module:
    """Keep the two largest of every four inputs of each linear, in place."""
    for name in spec.linears:
        weight = linear(layer, name).weight
        weight.data = apply_mask(weight, grouped_mask(weight.float().abs(), TWO_OF_FOUR.keep, TWO_OF_FOUR.group))
    return layer


@contextmanager
def forced_backend(backend: str) -> Iterator[None]:
    switch = torch.sparse.SparseSemiStructuredTensor
    before = switch._FORCE_CUTLASS
    switch._FORCE_CUTLASS = backend == CUTLASS
    try:
        yield
    finally:
        switch._FORCE_CUTLASS = before


def torch_linear(module: nn.Linear, backend: str) -> nn.Linear:
    """Replace the weight by torch's compressed one, in place. Raises: RuntimeError as torch does."""
    with forced_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch calls it a prototype
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.data)
    module.weight = nn.Parameter(sparse, requires_grad=False)
    return module


@dataclass(frozen=True)
class Algorithm:
    """Which of cuSPARSELt's algorithms, and into how many parts, and how, it splits the sum over d_in."""

    number: int = 0
    split_k: int = 1
    split_k_mode: int = -1

    def __str__(self) -> str:
        return f"{self.number}" if self.split_k <= 1 else f"{self.number} in {self.split_k} parts"


DEFAULT = Algorithm()


class Product(nn.Module):
    """W B by cuSPARSELt, W being 2:4, with the algorithm that was found for each number of columns of B.

    packed: W compressed. transposes: the result is (N, d_out), in the same kernel.
    algorithms: number of columns -> what `search` has found; others take cuSPARSELt's default.
    """

    def __init__(self, packed: Tensor, bias: Tensor | None = None, *, transposes: bool) -> None:
        super().__init__()
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = bias
        self.transposes = transposes
        self.algorithms: dict[int, Algorithm] = {}

    def forward(self, B: Tensor) -> Tensor:
        """Multiply.

        Args:
            B: (d_in, N) contiguous, or the transposed view of a contiguous (N, d_in): cuSPARSELt reads both in place.
        Returns: (d_out, N), or (N, d_out) if `transposes`; contiguous.
        """
        return self.multiply(B, self.algorithms.get(B.shape[1], DEFAULT))

    def multiply(self, B: Tensor, algorithm: Algorithm) -> Tensor:
        return torch._cslt_sparse_mm(
            self.packed,
            B,
            bias=self.bias,
            transpose_result=self.transposes,
            alg_id=algorithm.number,
            split_k=algorithm.split_k,
            split_k_mode=algorithm.split_k_mode,
        )

    def search(self, B: Tensor) -> None:
        """Find the fastest algorithm for such a B, once. Raises: RuntimeError if the default has other results."""
        if B.shape[1] in self.algorithms:
            return
        found = fastest_algorithm(self.packed, B, self.bias, transposes=self.transposes)
        y, expected = self.multiply(B, found), self.multiply(B, DEFAULT)
        size, error = (torch.linalg.vector_norm(t, dtype=torch.float32) for t in (expected, y - expected))
        if not error < WRONG * size:
            raise RuntimeError(f"algorithm {found} differs from the default by {float(error / size):.2g} of its size")
        self.algorithms[B.shape[1]] = found


def fastest_algorithm(packed: Tensor, B: Tensor, bias: Tensor | None, *, transposes: bool) -> Algorithm:
    """Have cuSPARSELt time its algorithms on these operands.

    The operator returns no more than the number of the algorithm, though the search splits sums too: the binding that
    torch.backends.cusparselt reads its version from returns both, where torch was built with cuSPARSELt.
    """
    binding = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if binding is None:
        return Algorithm(torch._cslt_sparse_mm_search(packed, B, bias=bias, transpose_result=transposes))
    number, split_k, split_k_mode, _ = binding(packed, B, bias, None, None, transposes)
    return Algorithm(number, split_k, int(split_k_mode))


class SearchedLinear(nn.Module):
    """A 2:4 linear by cuSPARSELt that copies nothing: x is read as W's columns, and y is written as rows."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.product = Product(torch._cslt_compress(dense.weight.data.contiguous()), dense.bias, transposes=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in). Returns: (..., d_out). Tokens are filled up to a multiple of ROWS."""
        rows = x.reshape(-1, self.in_features).contiguous()
        missing = -len(rows) % ROWS
        padded = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        y: Tensor = self.product(padded.t())
        return y[: len(rows)].view(*x.shape[:-1], self.out_features)


KERNELS: Mapping[str, Callable[[nn.Linear], nn.Module]] = {
    CUSPARSELT: partial(torch_linear, backend=CUSPARSELT),
    f"{CUSPARSELT}, searched": SearchedLinear,
    CUTLASS: partial(torch_linear, backend=CUTLASS),
}
"""Name -> a 2:4 linear, which it may change, as that kernel runs it."""


def compressed(layer: nn.Module, spec: LayerSpec, kernel: str) -> nn.Module:
    """Replace the linears, in place. Raises: RuntimeError as torch does."""
    for name in spec.linears:
        layer.set_submodule(name, KERNELS[kernel](linear(layer, name)))
    return layer


def search(layer: nn.Module, run: Callable[[], object]) -> dict[str, Algorithm]:
    """Find the fastest algorithm for each product of a layer, on what it is given in `run`.

    Returns: name of the product -> its algorithm, of those that were not found before; empty without such products.
    """
    products = {name: module for name, module in layer.named_modules() if isinstance(module, Product)}
    before = {name: set(product.algorithms) for name, product in products.items()}
    handles = [product.register_forward_pre_hook(lambda own, args: own.search(*args)) for product in products.values()]
    try:
        if handles:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: algorithm
        for name, product in products.items()
        for size, algorithm in product.algorithms.items()
        if size not in before[name]
    }
