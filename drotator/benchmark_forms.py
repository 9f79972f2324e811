"""What `drotator bench kind=inference` times: a layer, or one of its linears, in one of its forms, in one mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drotator.bounds import Work
from drotator.graphs import captured
from drotator.measurement import Bench, Row, Timing, time_call
from drotator.semi_structured import Algorithm, search


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
    """A layer, or a part of one, in one of its forms."""

    form: Form
    layer: nn.Module

    @property
    def bytes(self) -> int:
        """Of its weights, as they lie in memory."""
        return sum(part.nbytes for parameter in self.layer.parameters() for part in parts_of(parameter))


class Call(Protocol):
    """What a variant is given: layer(hidden, **kwargs). modes: "" is plain torch, then graph or compiled."""

    @property
    def name(self) -> str: ...

    @property
    def hidden(self) -> Tensor: ...

    @property
    def kwargs(self) -> dict[str, Any]: ...

    @property
    def modes(self) -> tuple[str, ...]: ...

    @property
    def cache_bytes(self) -> int: ...

    def work(self, bench: Bench, form: Form) -> Work: ...


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of a compressed one, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def prepare(bench: Bench, variant: Variant, call: Call) -> dict[str, Algorithm] | None:
    """Search the algorithms of the variant's products for this call.

    Returns: what was found, empty if nothing is to be; None, and a note, if that fails.
    """
    try:
        return search(variant.layer, lambda: variant.layer(call.hidden, **call.kwargs))
    except Exception as error:  # noqa: BLE001 - torch, its build and the GPU may each say no in their own way
        bench.note(f"{call.name}: the search for {variant.form.name} failed: {first_line(error)}.")
        return None


def timed(bench: Bench, variant: Variant, call: Call, mode: str) -> Row | None:
    """Measure a call in a mode and keep the row; None where the device has no such mode, or a note where it fails."""
    label = f"{call.name}{f', {mode}' if mode else ''}"
    try:
        run = runner(bench, variant, call, mode)
        if run is None:
            return None
        timing = time_call(run, bench.device)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything; the other modes go on
        bench.note(f"{label}: {variant.form.name} failed: {first_line(error)}.")
        return None
    if bench.device.type == "cuda":
        timing = Timing(
            timing.milliseconds, variant.bytes + call.hidden.nbytes + call.cache_bytes + timing.working_bytes
        )
    return add(bench, label, variant.form, timing, call.work(bench, variant.form))


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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
