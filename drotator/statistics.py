"""Calibration activations on their way through the model, and the second moments that pruning needs.

d = hidden_size, T = seqlen, N = calibration tokens. H = 2/N X X^T over the N inputs x of a linear, float32, undamped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drotator.architecture import LayerCalls, LayerSpec, ModelSource, embed, hidden_states


@dataclass
class ActivationStream:
    """Hidden states entering the current layer, in the basis of the dense model.

    hidden: batches (b, T, d) in the model's dtype. A layer that has been rotated by R1 is fed x R1, and its output is
    turned back by R1^T, so that every layer's statistics start from the dense model's basis.
    """

    hidden: list[Tensor]
    calls: LayerCalls
    device: torch.device

    @classmethod
    def start(cls, source: ModelSource, windows: Tensor, batch_size: int, device: torch.device) -> ActivationStream:
        """Embed the calibration windows, (num_samples, T) int64."""
        hidden, calls = embed(source, windows, batch_size, device)
        return cls(hidden=hidden, calls=calls, device=device)

    def batches(self, index: int, R1: Tensor | None) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the inputs of layer `index`, and the keyword arguments it is called with."""
        for hidden in self.hidden:
            kwargs = self.calls[len(hidden)].per_layer[index]
            hidden = hidden.to(self.device)
            yield (hidden if R1 is None else hidden @ R1.to(hidden.dtype)), kwargs

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int, R1: Tensor | None) -> None:
        """Replace the hidden states by the layer's outputs.

        Raises: RuntimeError that names the layer if a value is not finite.
        """
        is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        for position, (inputs, kwargs) in enumerate(self.batches(index, R1)):
            output = hidden_states(layer(inputs, **kwargs))
            is_finite &= output.isfinite().all()
            self.hidden[position] = output if R1 is None else output @ R1.mT.to(output.dtype)
        if not is_finite:
            raise RuntimeError(f"Layer {index}: its output is not finite on the calibration text.")


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

    Args:
        wanted: keys of `spec.inputs`. The forward pass stops at the last of them.
        R1: (d, d), given when R1 is merged in the layer; H is then in the rotated basis.
    Returns: input -> (d_in, d_in) float32.
    Raises: RuntimeError that names layer and input if H is not finite.
    """
    last = [inputs for inputs in spec.inputs if inputs in wanted][-1]
    sums: dict[str, Tensor] = {}
    num_tokens = dict.fromkeys(wanted, 0)

    def accumulate(inputs: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            if inputs not in sums:
                sums[inputs] = x.new_zeros(x.shape[-1], x.shape[-1])
            sums[inputs].addmm_(x.mT, x)
            num_tokens[inputs] += len(x)
            if inputs == last:
                raise _CollectedError

        return hook

    handles = [
        layer.get_submodule(spec.inputs[inputs][0]).register_forward_pre_hook(accumulate(inputs)) for inputs in wanted
    ]
    try:
        for hidden, kwargs in stream.batches(index, R1):
            try:
                layer(hidden, **kwargs)
            except _CollectedError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    for inputs, total in sums.items():
        total.mul_(2.0 / num_tokens[inputs])
        if not total.isfinite().all():
            raise RuntimeError(f"Layer {index}: the second moments of the inputs of {inputs} are not finite.")
    return sums
