"""Calibration activations on their way through the model, and the second moments that pruning needs.

d = hidden_size, T = seqlen, N = calibration tokens. H = 2/N X X^T over the N inputs x of a linear, float32, undamped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from drotator.architecture import LayerCalls, LayerSizes, LayerSpec, ModelSource, embed, hidden_states, linear
from drotator.distributed import ALONE, World
from drotator.resources import float32_products

SENSITIVITY_BATCHES = 2


@dataclass(frozen=True)
class Part:
    """The windows of batch `index` of the calibration set that this process has: those of `own`.

    Every batch is split over all processes, so that what is done batch by batch is the same for any number of them.
    """

    index: int
    own: slice

    @property
    def num_windows(self) -> int:
        return int(self.own.stop - self.own.start)


@dataclass
class ActivationStream:
    """Hidden states entering the current layer, in the basis of the dense model.

    hidden: batches (b, T, d) in the model's dtype. A layer that has been rotated by R1 is fed x R1, and its output is
    turned back by R1^T, so that every layer's statistics start from the dense model's basis.
    dense: the same batches on their way through the dense model, if anything asks for them; else empty.
    parts: what part of which batch each of `hidden` is, where a batch is split. counts: windows of all batches.
    """

    hidden: list[Tensor]
    calls: LayerCalls
    device: torch.device
    dense: list[Tensor] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    world: World = ALONE

    @classmethod
    def start(
        cls, source: ModelSource, windows: Tensor, batch_size: int, device: torch.device, world: World = ALONE
    ) -> ActivationStream:
        """Embed this process's part of the calibration windows, (num_samples, T) int64."""
        batches = windows.split(batch_size)
        parts = [Part(index, world.part(len(batch))) for index, batch in enumerate(batches)]
        parts = [part for part in parts if part.num_windows]
        own = torch.cat([windows[:0], *(batches[part.index][part.own] for part in parts)])
        hidden, calls = embed(source, own, [part.num_windows for part in parts], device)
        return cls(hidden, calls, device, parts=parts, counts=[len(batch) for batch in batches], world=world)

    def fork(self) -> ActivationStream:
        """A stream that starts here and goes its own way."""
        return replace(self, hidden=list(self.hidden), dense=[])

    def position(self, batch: int) -> int | None:
        """Where in `hidden` this process's part of a batch of the whole set is, if it has one."""
        return next((position for position, part in enumerate(self.parts) if part.index == batch), None)

    def share(self, position: int) -> float:
        """What part of a whole batch is in `hidden`."""
        return self.parts[position].num_windows / self.counts[self.parts[position].index]

    def batches(self, index: int, R1: Tensor | None) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the inputs of layer `index`, and the keyword arguments it is called with."""
        for hidden in self.hidden:
            yield rotated(hidden.to(self.device), R1), self.arguments(hidden, index)

    def arguments(self, hidden: Tensor, index: int) -> dict[str, Any]:
        """Keyword arguments with which the model calls layer `index` for this batch."""
        return self.calls[len(hidden)].per_layer[index]

    @torch.no_grad()
    def advance_dense(self, layer: nn.Module, index: int, inputs: list[Tensor]) -> None:
        """Put into `dense` what the dense layer, in the dense model's basis, makes of inputs."""
        with float32_products("high"):
            self.dense = [
                hidden_states(layer(hidden.to(self.device), **self.arguments(hidden, index))) for hidden in inputs
            ]

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int, R1: Tensor | None) -> None:
        """Replace the hidden states by the layer's outputs.

        Raises: RuntimeError that names the layer if a value is not finite.
        """
        is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        for position, (inputs, kwargs) in enumerate(self.batches(index, R1)):
            with float32_products("high"):
                output = hidden_states(layer(inputs, **kwargs))
            is_finite &= output.isfinite().all()
            self.hidden[position] = output if R1 is None else output @ R1.mT.to(output.dtype)
        if not is_finite:
            raise RuntimeError(f"Layer {index}: its output is not finite on the calibration text.")


def rotated(hidden: Tensor, R1: Tensor | None) -> Tensor:
    """hidden @ R1 in the dtype of hidden; hidden itself without R1."""
    return hidden if R1 is None else hidden @ R1.to(hidden.dtype)


class _CollectedError(Exception):
    """Ends a layer's forward pass where the last input that is wanted has been seen."""


@torch.no_grad()
def collect_hessians(
    layer: nn.Module,
    spec: LayerSpec,
    stream: ActivationStream,
    index: int,
    wanted: Collection[str],
    R1: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run the layer over the calibration set and return H = 2/N X X^T for each of the wanted inputs.

    Sums are taken over the windows of all processes.

    Args:
        wanted: keys of `spec.inputs`. The forward pass stops at the last of them.
        R1: (d, d), given when R1 is merged in the layer; H is then in the rotated basis.
    Returns: input -> (d_in, d_in) float32.
    Raises: RuntimeError that names layer and input if H is not finite.
    """
    ordered = [inputs for inputs in spec.inputs if inputs in wanted]
    sizes = {inputs: linear(layer, spec.inputs[inputs][0]).in_features for inputs in ordered}
    sums = {inputs: torch.zeros(size, size, device=stream.device) for inputs, size in sizes.items()}
    num_tokens = 0

    def accumulate(inputs: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            with float32_products("highest"):
                sums[inputs].addmm_(x.mT, x)
            if inputs == ordered[-1]:
                raise _CollectedError

        return hook

    handles = [
        layer.get_submodule(spec.inputs[inputs][0]).register_forward_pre_hook(accumulate(inputs)) for inputs in wanted
    ]
    try:
        for hidden, kwargs in stream.batches(index, R1):
            num_tokens += hidden.shape[0] * hidden.shape[1]
            try:
                with float32_products("high"):
                    layer(hidden, **kwargs)
            except _CollectedError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    num_tokens = int(stream.world.all_reduce_(torch.tensor(num_tokens, device=stream.device)))
    for inputs, total in sums.items():
        stream.world.all_reduce_(total).mul_(2.0 / num_tokens)
        if not total.isfinite().all():
            raise RuntimeError(f"Layer {index}: the second moments of the inputs of {inputs} are not finite.")
    return sums


def collect_sensitivities(
    layer: nn.Module, spec: LayerSpec, sizes: LayerSizes, stream: ActivationStream, index: int, seed: int
) -> dict[str, Tensor]:
    """Measure what an error in each output of a linear does to the layer's output: E |dy|^2 = g_i E dz_i^2.

    With J = dy/dz and white noise u, E (J^T u)(J^T u)^T = J^T J: one backward pass for each batch estimates it. The
    first batches of the set and their noise are the same however the set is split over processes.

    Returns: module name -> float32: query, key, gate, up (d_out,); value (k, h, h), moments within each head, as R2
        mixes its outputs; output and down (): in the residual stream every direction counts alike.
    """
    moments = {name: torch.zeros(linear(layer, name).out_features, device=stream.device) for name in spec.linears}
    moments |= {name: torch.zeros((), device=stream.device) for name in (spec.output, spec.down)}
    k, h = sizes.num_key_value_heads, sizes.head_dim
    moments[spec.value] = torch.zeros(k, h, h, device=stream.device)
    noises = white_noise(stream, seed)
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name in spec.linears
    ]
    num_tokens = 0
    try:
        for noise, (hidden, kwargs) in zip(noises, stream.batches(index, None), strict=False):
            with torch.enable_grad(), float32_products("high"):
                y = hidden_states(layer(hidden.detach().requires_grad_(), **kwargs))
                gradients = torch.autograd.grad(y, list(outputs.values()), noise)
            num_tokens += y.shape[0] * y.shape[1]
            for name, gradient in zip(outputs, gradients, strict=True):
                g = gradient.flatten(0, -2).float()
                if name == spec.value:
                    heads = g.unflatten(1, (k, h)).transpose(0, 1)  # (k, T, h)
                    found = heads.mT @ heads
                elif name in (spec.output, spec.down):
                    found = g.square().mean(1).sum()
                else:
                    found = g.square().sum(0)
                moments[name] += found
            outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    num_tokens = int(stream.world.all_reduce_(torch.tensor(num_tokens, device=stream.device)))
    return {name: stream.world.all_reduce_(moment) / num_tokens for name, moment in moments.items()}


def white_noise(stream: ActivationStream, seed: int) -> Iterator[Tensor]:
    """Draw noise for the first batches of the whole set in their order, and yield that of this process's windows."""
    if not stream.hidden:
        return
    generator = torch.Generator(stream.device).manual_seed(seed)
    own = {part.index: part.own for part in stream.parts}
    _, seqlen, hidden_size = stream.hidden[0].shape
    for index, count in enumerate(stream.counts[:SENSITIVITY_BATCHES]):
        size, dtype = (count, seqlen, hidden_size), stream.hidden[0].dtype
        noise = torch.randn(size, generator=generator, device=stream.device, dtype=dtype)
        if index in own:
            yield noise[own[index]]
