"""The linears of a layer alone, part of `drotator bench kind=inference`: does a 2:4 kernel cost the time, or a copy?

cuSPARSELt computes W B. In a linear B is x^T and the result is wanted as y, not y^T: it can read and write either, at
speeds of their own. Every distinct shape of a layer is timed dense, by each kernel that runs here, and as cuSPARSELt's
product alone on operands that already lie as it takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from drotator import bounds
from drotator.architecture import LayerSpec, linear
from drotator.benchmark_forms import Call, Form, Variant, prepare, timed
from drotator.bounds import Work
from drotator.measurement import Bench, Row
from drotator.semi_structured import Product, SearchedLinear

DENSE = Form("dense")
ALONE = "product alone"


@dataclass(frozen=True)
class LinearCall:
    """What a linear of weights (d_out, d_in) is given, or a product of the same work.

    hidden: (N, d_in), or (d_in, N) for a product. shape: (N, d_in, d_out).
    """

    name: str
    hidden: Tensor
    modes: tuple[str, ...]
    shape: tuple[int, int, int]
    kwargs: dict[str, Any] = field(default_factory=dict)
    cache_bytes = 0

    def work(self, bench: Bench, form: Form) -> Work:
        return bounds.product(*self.shape, sparse=form.sparse)


class RowMajor(nn.Module):
    """A linear whose result lies row by row, as the layer's next step wants it: some kernels leave that to a copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y.contiguous()


def distinct_linears(layer: nn.Module, spec: LayerSpec) -> list[str]:
    """The first linear of every shape, as the layer calls them."""
    shapes = {tuple(linear(layer, name).weight.shape): name for name in reversed(spec.linears)}
    return [name for name in spec.linears if name in shapes.values()]


def bench_products(bench: Bench, layer: nn.Module, sparse: dict[str, nn.Module], calls: Sequence[Call]) -> None:
    """Measure the linears in each call.

    Args:
        layer: dense. sparse: kernel -> the 2:4 layer. calls: of the layer; decoding is timed as a CUDA graph.
    """
    for call in calls:
        num_tokens = call.hidden.shape[0] * call.hidden.shape[1]
        mode = call.modes[-1] if bench.device.type == "cuda" else ""
        ratios = []
        for name in distinct_linears(layer, bench.source.spec):
            dense = linear(layer, name)
            d_out, d_in = dense.weight.shape
            label = f"{name.rpartition('.')[2]} ({d_out} x {d_in})"
            x = torch.randn(num_tokens, d_in, device=bench.device).to(bench.source.dtype)
            given = LinearCall(f"{label}, {call.name}", x, (mode,), (num_tokens, d_in, d_out))
            kernels = {kernel: whole.get_submodule(name) for kernel, whole in sparse.items()}
            ratios.append(f"{label} {bench_linear(bench, given, dense, kernels)}")
        bench.note(
            f"{call.name}: how much faster than dense the fastest 2:4 form of each linear is, and in brackets "
            f"cuSPARSELt's fastest product alone: {', '.join(ratios)}."
        )


def bench_linear(bench: Bench, call: LinearCall, dense: nn.Linear, kernels: dict[str, nn.Module]) -> str:
    """Measure one linear. Returns: the two ratios in words."""
    mode = call.modes[0]
    timed(bench, Variant(DENSE, dense), call, mode)
    whole: list[Row | None] = []
    alone: list[Row | None] = []
    for kernel, module in kernels.items():
        variant = Variant(Form(f"2:4 {kernel}", sparse=True), RowMajor(module))
        row = None if prepare(bench, variant, call) is None else timed(bench, variant, call, mode)
        whole.append(row)
        if isinstance(module, SearchedLinear):  # nothing but its product
            alone += [row, *bench_layouts(bench, call, module.product)]
    return f"{most_times(whole)} ({most_times(alone)})"


def bench_layouts(bench: Bench, call: LinearCall, product: Product) -> list[Row | None]:
    """Measure cuSPARSELt's product alone: x as it lies by the default algorithm, and x^T row by row by what is found.

    The result is y or y^T, row by row. The searched linear itself is x to y by what is found.
    """
    found = []
    for B, read, is_searched in ((call.hidden.t(), "x", False), (call.hidden.t().contiguous(), "x^T", True)):
        given = LinearCall(call.name, B, call.modes, call.shape)
        for transposes, written in ((True, "y"), (False, "y^T")):
            form = Form(f"{ALONE}, {read} to {written}, {'searched' if is_searched else 'default'}", sparse=True)
            variant = Variant(form, Product(product.packed.data, transposes=transposes))
            if not is_searched or prepare(bench, variant, given) is not None:
                found.append(timed(bench, variant, given, call.modes[0]))
    return found


def most_times(rows: list[Row | None]) -> str:
    """How much faster than dense the fastest is."""
    times = [row.times for row in rows if row is not None and row.times is not None]
    return f"{max(times):.3g}x" if times else "not measured"
