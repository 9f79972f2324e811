"""`drotator bench kind=inference`: one decoder layer dense, 2:4, and 2:4 with the matrix between two bases.

A 2:4 weight runs through torch.sparse.to_sparse_semi_structured, whose kernels depend on torch and the GPU: each is
tried first, and compared with the dense product of the same weights.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from drotator import bounds
from drotator.architecture import LAYERS, LayerSpec, ModelSource, hidden_states, linear
from drotator.bounds import Work
from drotator.config import SparsityConfig
from drotator.graphs import captured
from drotator.measurement import Bench, Row, Timing, time_call
from drotator.modeling_rotated import Boundary
from drotator.pruners.masks import apply_mask, grouped_mask, validate
from drotator.shapes import random_weight, write_random_model
from drotator.statistics import ActivationStream

logger = logging.getLogger(__name__)

BACKENDS = {"cuSPARSELt": False, "CUTLASS": True}
"""Name -> torch's switch that forces CUTLASS."""
WRONG = 0.05
"""Relative difference from the dense product from which on a kernel's results are wrong, not rounded."""
TRIED_TOKENS = 64
TWO_OF_FOUR = SparsityConfig(keep=2, group=4)


def check_inference(bench: Bench) -> None:
    """Raises: ValueError if inputs are no groups of four. What the device cannot do is said in a line later."""
    if bench.world.size > 1:
        raise ValueError(f"kind=inference is the work of one process, but {bench.world.size} were started.")
    for inputs, names in bench.source.spec.inputs.items():
        validate(TWO_OF_FOUR, bench.source.sizes.input_size(inputs), f"{LAYERS}.0.{names[0]}")


def run_inference(bench: Bench, run_dir: Path) -> None:
    """Measure prefill and decoding of every variant of a layer."""
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".layer-") as folder:
        source = write_random_model(
            Path(folder) / "model", bench.source, 1, device=bench.device, seed=bench.settings.seed
        )
        calls: list[Call] = [
            *(Prefill.of(bench, source, size) for size in dict.fromkeys((1, bench.settings.bench.batch_size))),
            *(Decode.of(bench, source, size) for size in dict.fromkeys(bench.settings.bench.decode)),
        ]
        layer = source.layer(0, bench.device)
    with torch.no_grad():
        rows = {variant.form: bench_variant(bench, variant, calls) for variant in variants(bench, layer)}
        bench_model(bench, calls, rows)


@dataclass(frozen=True)
class Form:
    """What a layer is made into."""

    name: str
    sparse: bool = False
    boundary: bool = False

    @property
    def counted(self) -> dict[str, bool]:
        return {"sparse": self.sparse, "boundary": self.boundary}


@dataclass(frozen=True)
class Variant:
    """A layer in one of its forms."""

    form: Form
    layer: nn.Module

    @property
    def bytes(self) -> int:
        """Of its weights, as they lie in memory."""
        return sum(part.nbytes for parameter in self.layer.parameters() for part in parts_of(parameter))


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of a compressed one, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


class WithBoundary(nn.Module):
    """A layer and the linear between its basis and the next one's, as modeling_rotated.py joins them."""

    def __init__(self, layer: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        self.layer, self.boundary = layer, boundary

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = self.boundary(hidden_states(self.layer(hidden, **kwargs)))
        return output


def variants(bench: Bench, layer: nn.Module) -> Iterator[Variant]:
    """Yield the layer's forms; without a kernel for 2:4, the dense layer with a boundary matrix stands for them."""
    yield Variant(Form("dense"), layer)
    pruned = prune_2of4(copy.deepcopy(layer), bench.source.spec)
    found = False
    for backend in BACKENDS:
        try:
            sparse = compressed(copy.deepcopy(pruned), bench.source.spec, backend)
            check_products(pruned, sparse, bench)
        except Exception as error:  # noqa: BLE001 - torch, its build and the GPU may each say no in their own way
            bench.note(f"2:4 by {backend} is not supported here: {first_line(error)}")
            continue
        found = True
        yield Variant(Form(f"2:4 {backend}", sparse=True), sparse)
        joined = WithBoundary(sparse, boundary_matrix(bench))
        yield Variant(Form(f"2:4 {backend} + R1", sparse=True, boundary=True), joined)
    if not found:
        yield Variant(Form("dense + R1", boundary=True), WithBoundary(layer, boundary_matrix(bench)))


def boundary_matrix(bench: Bench) -> Boundary:
    """A random matrix between two bases, in the model's dtype."""
    sizes, generator = bench.source.sizes, torch.Generator(bench.device).manual_seed(bench.settings.seed)
    between = Boundary(sizes.hidden_size).to(bench.device, bench.source.dtype).requires_grad_(False)
    between.weight.copy_(random_weight("boundary.weight", between.weight.shape, generator))
    return between


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
    switch._FORCE_CUTLASS = BACKENDS[backend]
    try:
        yield
    finally:
        switch._FORCE_CUTLASS = before


def compressed(layer: nn.Module, spec: LayerSpec, backend: str) -> nn.Module:
    """Replace the linears' weights by torch's compressed ones. Raises: RuntimeError as torch does."""
    with forced_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch calls it a prototype
        for name in spec.linears:
            module = linear(layer, name)
            sparse = torch.sparse.to_sparse_semi_structured(module.weight.data)
            module.weight = nn.Parameter(sparse, requires_grad=False)
    return layer


def check_products(pruned: nn.Module, sparse: nn.Module, bench: Bench) -> None:
    """Compare each linear with the dense product of the same weights. Raises: RuntimeError if one is wrong."""
    generator = torch.Generator(bench.device).manual_seed(bench.settings.seed)
    for name in bench.source.spec.linears:
        dense, module = linear(pruned, name), linear(sparse, name)
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
    modes = ("",)

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


Call = Prefill | Decode
Rows = dict[tuple[str, str], Row]
"""By the name of the call and the mode: "" for plain torch, graph or compiled."""


def bench_variant(bench: Bench, variant: Variant, calls: list[Call]) -> Rows:
    """Measure one form of the layer in every call and every mode, and the boundary matrix alone."""
    rows: Rows = {}
    for call in calls:
        for mode in (*call.modes, *(("compiled",) if bench.settings.bench.compile else ())):
            run = runner(bench, variant, call, mode)
            if run is None:
                continue
            label = f"{call.name}{f', {mode}' if mode else ''}"
            try:
                timing = time_call(run, bench.device)
            except Exception as error:  # noqa: BLE001 - a compiler may raise anything; the other modes go on
                bench.note(f"{label}: {variant.form.name} failed: {first_line(error)}.")
                continue
            if bench.device.type == "cuda":
                timing = Timing(
                    timing.milliseconds, variant.bytes + call.hidden.nbytes + call.cache_bytes + timing.working_bytes
                )
            rows[call.name, mode] = add(bench, label, variant.form, timing, call.work(bench, variant.form))
    for call in calls if variant.form.boundary else ():
        between = variant.layer.get_submodule("boundary")
        num_tokens, d = call.hidden.shape[0] * call.hidden.shape[1], call.hidden.shape[2]
        timing = time_call(lambda: between(call.hidden), bench.device)  # noqa: B023
        add(bench, f"{call.name}, R1 alone", variant.form, timing, bounds.product(num_tokens, d, d))
        if (call.name, "") in rows:
            part = timing.milliseconds / rows[call.name, ""].milliseconds
            bench.note(f"{call.name}: the boundary matrix alone takes {part:.1%} of the time of {variant.form.name}.")
    return rows


def add(bench: Bench, label: str, form: Form, timing: Timing, work: Work) -> Row:
    """Keep a result beside that of the dense form."""
    dense = next((row.milliseconds for row in bench.rows if row.name == f"{label}: dense"), None)
    faster_than = None if dense is None else ("dense", dense)
    return bench.add(f"{label}: {form.name}", timing, work, faster_than=faster_than)


def runner(bench: Bench, variant: Variant, call: Call, mode: str) -> Callable[[], object] | None:
    """What is timed, or None where the device has no such mode."""
    layer: Callable[..., Any] = variant.layer
    if mode == "compiled":
        torch.compiler.reset()
        layer = torch.compile(variant.layer)

    def run() -> None:
        layer(call.hidden, **call.kwargs)

    if mode != "graph":
        return run
    if bench.device.type != "cuda":
        return None
    replay = captured(run, [call.hidden])
    if replay is run:
        bench.note(f"{call.name}: {variant.form.name} cannot be captured in a CUDA graph here.")
        return None
    return replay


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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
