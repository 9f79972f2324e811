"""Calibration activations on their way through the model, and the second moments that pruning needs.

d = hidden_size, T = seqlen, N = calibration tokens. H = 2/N X X^T over the N inputs x of a linear, float32, undamped.
Sums are float32, and so are products: those of bfloat16 or float16 values are exact in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from drotator.architecture import LayerCalls, LayerSizes, LayerSpec, ModelSource, embed, hidden_states, linear
from drotator.distributed import ALONE, World
from drotator.offload import ON_DEVICE, Batches, Offload
from drotator.resources import float32_products, product

SENSITIVITY_BATCHES = 2
MOMENT_TOKENS = 4096
"""Tokens of one product: the tensor cores' sums stay short, and so does a float32 copy of them."""
MOMENT_ROWS, MOMENT_ROWS_OF_CPU = 2048, 256
"""Rows of H that one product adds to, on a GPU for 16-bit inputs."""


@dataclass
class KeptAttention:
    """Stands in for a layer's attention while query, key, value and what they read stay as they are.

    contexts: what attention hands to its output projection, (b, T, num_attention_heads h).
    """

    spec: LayerSpec
    contexts: Batches

    @contextmanager
    def of_batch(self, layer: nn.Module, position: int) -> Iterator[None]:
        """Let the layer's forward pass find what its output projection makes of the context that was kept."""
        attention, output = (layer.get_submodule(name) for name in (self.spec.attention, self.spec.output))
        attention.forward = lambda *args, **kwargs: (output(self.contexts[position]), None)
        try:
            yield
        finally:
            del attention.forward


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

    hidden: (b, T, d) in the model's dtype. A layer that has been rotated by R1 is fed x R1, and its output is
    turned back by R1^T, so that every layer's statistics start from the dense model's basis.
    dense: the same batches on their way through the dense model, if anything asks for them.
    attention: what stands in for the current layer's attention, if it was kept.
    parts: what part of which batch each of `hidden` is, where a batch is split. counts: windows of all batches.
    """

    hidden: Batches
    calls: LayerCalls
    device: torch.device
    dense: Batches | None = None
    attention: KeptAttention | None = None
    parts: list[Part] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    world: World = ALONE

    @classmethod
    def start(
        cls,
        source: ModelSource,
        windows: Tensor,
        batch_size: int,
        device: torch.device,
        offload: Offload = ON_DEVICE,
        world: World = ALONE,
    ) -> ActivationStream:
        """Embed this process's part of the calibration windows, (num_samples, T) int64."""
        batches = windows.split(batch_size)
        parts = [Part(index, world.part(len(batch))) for index, batch in enumerate(batches)]
        parts = [part for part in parts if part.num_windows]
        hidden = Batches(device, offload)
        calls = embed(source, [batches[part.index][part.own] for part in parts], device, hidden.append)
        return cls(hidden, calls, device, parts=parts, counts=[len(batch) for batch in batches], world=world)

    def fork(self) -> ActivationStream:
        """A stream that starts here and goes its own way."""
        return replace(self, hidden=self.hidden.copy(), dense=None, attention=None)

    def position(self, batch: int) -> int | None:
        """Where in `hidden` this process's part of a batch of the whole set is, if it has one."""
        return next((position for position, part in enumerate(self.parts) if part.index == batch), None)

    def share(self, position: int) -> float:
        """What part of a whole batch is in `hidden`."""
        return self.parts[position].num_windows / self.counts[self.parts[position].index]

    def run(self, layer: nn.Module, index: int, position: int, R1: Tensor | None) -> Tensor:
        """What the layer puts out for a batch, (b, T, d), in the basis of R1. Attention that is kept is not run."""
        hidden = self.hidden[position]
        kept = self.attention.of_batch(layer, position) if self.attention else nullcontext()
        with kept, float32_products("high"):
            return hidden_states(layer(rotated(hidden, R1), **self.arguments(hidden, index)))

    def arguments(self, hidden: Tensor, index: int) -> dict[str, Any]:
        """Keyword arguments with which the model calls layer `index` for this batch."""
        return self.calls[len(hidden)].per_layer[index]

    @torch.no_grad()
    def advance_dense(self, layer: nn.Module, index: int, inputs: Batches) -> None:
        """Put into `dense` what the dense layer, in the dense model's basis, makes of inputs."""
        self.dense = self.dense or inputs.copy()
        for position, hidden in enumerate(inputs):
            with float32_products("high"):
                self.dense[position] = hidden_states(layer(hidden, **self.arguments(hidden, index)))

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int, R1: Tensor | None) -> None:
        """Replace the hidden states by the layer's outputs.

        Raises: RuntimeError that names the layer if a value is not finite.
        """
        is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        for position in range(len(self.hidden)):
            output = self.run(layer, index, position, R1)
            is_finite &= output.isfinite().all()
            self.hidden[position] = output if R1 is None else output @ R1.mT.to(output.dtype)
        self.attention = None
        if not is_finite:
            raise RuntimeError(f"Layer {index}: its output is not finite on the calibration text.")


def rotated(hidden: Tensor, R1: Tensor | None) -> Tensor:
    """hidden @ R1 in the dtype of hidden; hidden itself without R1."""
    return hidden if R1 is None else hidden @ R1.to(hidden.dtype)


class _CollectedError(Exception):
    """Ends a layer's forward pass where the last input that is wanted has been seen."""


def add_moments(H: Tensor, x: Tensor) -> None:
    """Add x^T x to H, (n, n) float32; x: (tokens, n).

    A GPU multiplies 16-bit inputs on its tensor cores. There, and on a CPU, half the work is enough: only the blocks
    from the diagonal on are added to, and `mirror` fills in the others at the end.
    """
    step = moment_rows(H)
    for tokens in x.split(MOMENT_TOKENS):
        if x.is_cuda and x.dtype == torch.float32:
            H.addmm_(tokens.mT, tokens)
            continue
        for start in range(0, len(H), step):
            rows = slice(start, start + step)
            if x.dtype == torch.float32:
                H[rows, start:].addmm_(tokens[:, rows].mT, tokens[:, start:])
            else:
                H[rows, start:].add_(product(tokens[:, rows], tokens[:, start:]))


def moment_rows(H: Tensor) -> int:
    return MOMENT_ROWS if H.is_cuda else MOMENT_ROWS_OF_CPU


def mirror(H: Tensor) -> None:
    """Copy what `add_moments` left out from the other side of the diagonal."""
    step = moment_rows(H)
    for start in range(step, len(H), step):
        H[start:, start - step : start] = H[start - step : start, start:].mT


@torch.no_grad()
def collect_hessians(
    layer: nn.Module,
    spec: LayerSpec,
    stream: ActivationStream,
    index: int,
    wanted: Collection[str],
    R1: Tensor | None = None,
    *,
    keep_attention: bool = False,
) -> dict[str, Tensor]:
    """Run the layer over the calibration set and return H = 2/N X X^T for each of the wanted inputs.

    Sums are taken over the windows of all processes.

    Args:
        wanted: keys of `spec.inputs`. The forward pass stops at the last of them.
        R1: (d, d), given when R1 is merged in the layer; H is then in the rotated basis.
        keep_attention: from now on `stream` does not run the layer's attention again; see `KeptAttention`.
    Returns: input -> (d_in, d_in) float32.
    Raises: RuntimeError that names layer and input if H is not finite.
    """
    ordered = [inputs for inputs in spec.inputs if inputs in wanted]
    sizes = {inputs: linear(layer, spec.inputs[inputs][0]).in_features for inputs in ordered}
    sums = {inputs: torch.zeros(size, size, device=stream.device) for inputs, size in sizes.items()}
    kept = KeptAttention(spec, stream.hidden.empty())
    num_tokens = 0

    def accumulate(inputs: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal num_tokens
            x = args[0].flatten(0, -2)
            with float32_products("highest"):
                add_moments(sums[inputs], x)
            if keep_attention and inputs == "output":
                kept.contexts.append(args[0])
            if inputs == ordered[-1]:
                num_tokens += len(x)
                raise _CollectedError

        return hook

    handles = [
        layer.get_submodule(spec.inputs[inputs][0]).register_forward_pre_hook(accumulate(inputs)) for inputs in wanted
    ]
    try:
        for position in range(len(stream.hidden)):
            with suppress(_CollectedError):
                stream.run(layer, index, position, R1)
    finally:
        for handle in handles:
            handle.remove()
    if keep_attention:
        stream.attention = kept
    num_tokens = int(stream.world.all_reduce_(torch.tensor(num_tokens, device=stream.device)))
    for inputs, total in sums.items():
        mirror(stream.world.all_reduce_(total))
        total.mul_(2.0 / num_tokens)
        if not total.diagonal().isfinite().all():  # an input that is not finite shows there
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
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name in spec.linears
    ]
    num_tokens = 0
    try:
        for noise, hidden in zip(white_noise(stream, seed), stream.hidden, strict=False):
            for window, u in zip(hidden.split(1), noise.split(1), strict=True):  # the graph of one at a time
                x = window.detach().requires_grad_()
                with torch.enable_grad(), float32_products("high"):
                    y = hidden_states(layer(x, **stream.arguments(window, index)))
                    gradients = torch.autograd.grad(y, list(outputs.values()), u)
                names = list(outputs)
                outputs.clear()
                for name, gradient in zip(names, gradients, strict=True):
                    for g in gradient.flatten(0, -2).split(MOMENT_TOKENS):
                        moments[name] += gradient_moments(g, name, spec, sizes)
            num_tokens += hidden.shape[0] * hidden.shape[1]
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
    like = stream.hidden[0]
    for index, count in enumerate(stream.counts[:SENSITIVITY_BATCHES]):
        noise = torch.randn((count, *like.shape[1:]), generator=generator, device=stream.device, dtype=like.dtype)
        if index in own:
            yield noise[own[index]]


def gradient_moments(g: Tensor, name: str, spec: LayerSpec, sizes: LayerSizes) -> Tensor:
    """What `collect_sensitivities` adds up of the gradients of a linear's outputs; g: (tokens, d_out)."""
    if name == spec.value:
        heads = g.unflatten(1, (sizes.num_key_value_heads, sizes.head_dim)).transpose(0, 1)  # (k, tokens, h)
        return product(heads, heads)
    energy = g.float().square()
    return energy.mean(1).sum() if name in (spec.output, spec.down) else energy.sum(0)
