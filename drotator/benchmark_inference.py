"""`drotator bench kind=inference`: one decoder layer dense, 2:4, and 2:4 with the matrix between two bases.

Kernels for 2:4 weights (semi_structured.py) depend on torch and the GPU: each is tried first, and compared with the
dense product of the same weights.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from drotator import bounds
from drotator.architecture import LAYERS, ModelSource, hidden_states, linear
from drotator.benchmark_forms import Call, Form, Variant, add, first_line, prepare, timed
from drotator.benchmark_products import bench_products
from drotator.bounds import Work
from drotator.measurement import Bench, Row, Timing, time_call
from drotator.modeling_rotated import Boundary
from drotator.pruners.masks import validate
from drotator.semi_structured import KERNELS, TWO_OF_FOUR, WRONG, compressed, prune_2of4
from drotator.shapes import random_weight, write_random_model
from drotator.statistics import ActivationStream

logger = logging.getLogger(__name__)

TRIED_TOKENS = 64


def check_inference(bench: Bench) -> None:
    """Raises: ValueError if inputs are no groups of four. What the device cannot do is said in a line later."""
    if bench.world.size > 1:
        raise ValueError(f"kind=inference is the work of one process, but {bench.world.size} were started.")
    for inputs, names in bench.source.spec.inputs.items():
        validate(TWO_OF_FOUR, bench.source.sizes.input_size(inputs), f"{LAYERS}.0.{names[0]}")


def run_inference(bench: Bench, run_dir: Path) -> None:
    """Measure prefill and decoding of every variant of a layer, and the linears alone in the largest of both."""
    options = bench.settings.bench
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".layer-") as folder:
        source = write_random_model(
            Path(folder) / "model", bench.source, 1, device=bench.device, seed=bench.settings.seed
        )
        prefills = [Prefill.of(bench, source, size) for size in dict.fromkeys((1, options.batch_size))]
        decodes = [Decode.of(bench, source, size) for size in dict.fromkeys(options.decode)]
        layer = source.layer(0, bench.device)
    calls: list[Call] = [*prefills, *decodes]
    with torch.no_grad():
        sparse = sparse_layers(bench, layer)
        rows = {variant.form: bench_variant(bench, variant, calls) for variant in variants(bench, layer, sparse)}
        bench_model(bench, calls, rows)
        if sparse:
            largest = max(decodes, key=lambda call: len(call.hidden), default=None)
            bench_products(bench, layer, sparse, [prefills[-1], *([largest] if largest else [])])


class WithBoundary(nn.Module):
    """A layer and the linear between its basis and the next one's, as modeling_rotated.py joins them."""

    def __init__(self, layer: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        self.layer, self.boundary = layer, boundary

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = self.boundary(hidden_states(self.layer(hidden, **kwargs)))
        return output


def sparse_layers(bench: Bench, layer: nn.Module) -> dict[str, nn.Module]:
    """Kernel -> the layer with 2:4 linears, of the kernels that run here; a note says why others do not."""
    spec = bench.source.spec
    pruned = prune_2of4(copy.deepcopy(layer), spec)
    found = {}
    for kernel in KERNELS:
        try:
            sparse = compressed(copy.deepcopy(pruned), spec, kernel)
            check_products(pruned, sparse, bench)
        except Exception as error:  # noqa: BLE001 - torch, its build and the GPU may each say no in their own way
            bench.note(f"2:4 by {kernel} is not supported here: {first_line(error)}")
            continue
        found[kernel] = sparse
    return found


def variants(bench: Bench, layer: nn.Module, sparse: dict[str, nn.Module]) -> list[Variant]:
    """The layer's forms; without a kernel for 2:4, the dense layer with a boundary matrix stands for them."""
    between = boundary_matrix(bench)
    found = [Variant(Form("dense"), layer)]
    for kernel, whole in sparse.items():
        found.append(Variant(Form(f"2:4 {kernel}", sparse=True), whole))
        joined = WithBoundary(whole, between)
        found.append(Variant(Form(f"2:4 {kernel} + R1", sparse=True, boundary=True), joined))
    if not sparse:
        found.append(Variant(Form("dense + R1", boundary=True), WithBoundary(layer, between)))
    return found


def boundary_matrix(bench: Bench) -> Boundary:
    """A random matrix between two bases, in the model's dtype."""
    sizes, generator = bench.source.sizes, torch.Generator(bench.device).manual_seed(bench.settings.seed)
    between = Boundary(sizes.hidden_size).to(bench.device, bench.source.dtype).requires_grad_(False)
    between.weight.copy_(random_weight("boundary.weight", between.weight.shape, generator))
    return between


def check_products(pruned: nn.Module, sparse: nn.Module, bench: Bench) -> None:
    """Compare each linear with the dense product of the same weights. Raises: RuntimeError if one is wrong."""
    generator = torch.Generator(bench.device).manual_seed(bench.settings.seed)
    for name in bench.source.spec.linears:
        dense, module = linear(pruned, name), sparse.get_submodule(name)
        x = torch.randn(TRIED_TOKENS, dense.in_features, generator=generator, device=bench.device).to(
            bench.source.dtype
        )
        with torch.no_grad():
            y, found = dense(x).float(), module(x).float()
        error = float((found - y).norm() / y.norm())
        if not error < WRONG:
            raise RuntimeError(f"{name} differs from the dense product by {error:.2g} of its size")


@dataclass(frozen=True)
class Prefill:
    """Whole windows through a layer. hidden: (batch_size, seqlen, d)."""

    name: str
    hidden: Tensor
    kwargs: dict[str, Any] = field(repr=False)
    modes = ("", "graph")

    @classmethod
    def of(cls, bench: Bench, source: ModelSource, batch_size: int) -> Prefill:
        seqlen = bench.settings.bench.seqlen
        windows = torch.randint(source.config.vocab_size, (batch_size, seqlen))
        stream = ActivationStream.start(source, windows, batch_size, bench.device)
        hidden = stream.hidden[0].to(bench.device)
        return cls(f"prefill {batch_size} x {seqlen}", hidden, stream.arguments(hidden, 0))

    @property
    def cache_bytes(self) -> int:
        return 0

    def work(self, bench: Bench, form: Form) -> Work:
        batch_size, seqlen, _ = self.hidden.shape
        return bounds.forward(bench.source.sizes, batch_size, seqlen, **form.counted)


class FixedCache:
    """Keys and values of seqlen tokens, the last of which is written anew at every call: it can be captured."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key)
        self.values[:, :, -1:].copy_(value)
        return self.keys, self.values


@dataclass(frozen=True)
class Decode:
    """One token of each of a batch through a layer, at the end of seqlen cached ones. hidden: (batch_size, 1, d)."""

    name: str
    hidden: Tensor
    kwargs: dict[str, Any] = field(repr=False)
    modes = ("", "graph")

    @classmethod
    def of(cls, bench: Bench, source: ModelSource, batch_size: int) -> Decode:
        sizes, seqlen = bench.source.sizes, bench.settings.bench.seqlen
        windows = torch.randint(source.config.vocab_size, (1, seqlen))
        stream = ActivationStream.start(source, windows, 1, bench.device)
        asked = stream.arguments(stream.hidden[0], 0)
        cos, sin = asked["position_embeddings"]
        shape = (batch_size, sizes.num_key_value_heads, seqlen, sizes.head_dim)
        keys, values = (torch.randn(shape, device=bench.device).to(bench.source.dtype) for _ in range(2))
        last = {
            "attention_mask": None,
            "position_embeddings": (cos[..., -1:, :].contiguous(), sin[..., -1:, :].contiguous()),
            "past_key_values": FixedCache(keys, values),
            "use_cache": True,
        }
        if asked.get("position_ids") is not None:
            last["position_ids"] = asked["position_ids"][..., -1:]
        hidden = stream.hidden[0].to(bench.device)[:, -1:].repeat(batch_size, 1, 1)
        return cls(f"decode {batch_size} after {seqlen}", hidden, {**asked, **last})

    @property
    def cache_bytes(self) -> int:
        cache: FixedCache = self.kwargs["past_key_values"]
        return cache.keys.nbytes + cache.values.nbytes

    def work(self, bench: Bench, form: Form) -> Work:
        return bounds.decode(bench.source.sizes, len(self.hidden), bench.settings.bench.seqlen, **form.counted)


Rows = dict[tuple[str, str], Row]
"""By the name of the call and the mode: "" for plain torch, graph or compiled."""


def bench_variant(bench: Bench, variant: Variant, calls: list[Call]) -> Rows:
    """Measure one form of the layer in every call and every mode, and the boundary matrix alone."""
    rows: Rows = {}
    for call in calls:
        found = prepare(bench, variant, call)
        if found is None:
            continue
        if found:
            chosen = ", ".join(f"{name.removesuffix('.product')} {algorithm}" for name, algorithm in found.items())
            bench.note(f"{call.name}: algorithms of {variant.form.name}: {chosen}.")
        for mode in (*call.modes, *(("compiled",) if bench.settings.bench.compile else ())):
            row = timed(bench, variant, call, mode)
            if row is not None:
                rows[call.name, mode] = row
    for call in calls if variant.form.boundary else ():
        between = variant.layer.get_submodule("boundary")
        num_tokens, d = call.hidden.shape[0] * call.hidden.shape[1], call.hidden.shape[2]
        timing = time_call(lambda: between(call.hidden), bench.device)  # noqa: B023
        add(bench, f"{call.name}, R1 alone", variant.form, timing, bounds.product(num_tokens, d, d))
        if (call.name, "") in rows:
            part = timing.milliseconds / rows[call.name, ""].milliseconds
            bench.note(f"{call.name}: the boundary matrix alone takes {part:.1%} of the time of {variant.form.name}.")
    return rows


def bench_model(bench: Bench, calls: list[Call], rows: dict[Form, Rows]) -> None:
    """What the layers come to for the whole model, in their fastest mode, with the head on the last tokens."""
    source, device = bench.source, bench.device
    num_layers, d, vocab_size = source.num_layers, source.sizes.hidden_size, source.config.vocab_size
    generator = torch.Generator(device).manual_seed(bench.settings.seed)
    weight = random_weight("lm_head.weight", torch.Size((vocab_size, d)), generator).to(source.dtype)
    for form in rows:
        bench.note(f"Weights of the model, {form.name}: {model_bytes(bench, form) / 2**30:.2f} GiB in 16 bits.")
    for call in calls:
        batch_size = len(call.hidden)
        x = torch.randn(batch_size, d, generator=generator, device=device).to(source.dtype)
        head = time_call(lambda: functional.linear(x, weight), device)  # noqa: B023
        for form, found in rows.items():
            modes = {mode: row for (name, mode), row in found.items() if name == call.name}
            if not modes:
                continue
            mode, row = min(modes.items(), key=lambda item: item[1].milliseconds)
            peak = row.peak_bytes
            if device.type == "cuda":
                own = bounds.layer_bytes(source.sizes, **form.counted)
                peak += int(model_bytes(bench, form) - own + (num_layers - 1) * call.cache_bytes)
            timing = Timing(num_layers * row.milliseconds + head.milliseconds, peak)
            work = call.work(bench, form) * num_layers + bounds.product(batch_size, d, vocab_size)
            add(bench, f"model, {call.name}", form, timing, work)
            if mode:
                bench.note(f"model, {call.name}: {form.name} counts its layers in the mode '{mode}'.")
    bench.note(f"Rows of the model: {num_layers} times the layer, and the head on the last tokens; not run as a whole.")


def model_bytes(bench: Bench, form: Form) -> int:
    """Bytes of all linears, embeddings and boundary matrices in 16 bits."""
    source = bench.source
    embeddings = 2.0 * source.config.vocab_size * source.sizes.hidden_size * (1 if source.is_tied else 2)
    return int(source.num_layers * bounds.layer_bytes(source.sizes, **form.counted) + embeddings)
