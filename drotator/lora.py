"""LoRA on the pruned linears of a model, with an update that keeps the mask: W + mask * (alpha / rank) B A.

The mask is what the checkpoint says it is: W != 0. The adapters, their initialisation and the dense forward pass are
peft's; what is peculiar to a pruned model is here.

W: (d_out, d_in) in the model's dtype, frozen; A: (rank, d_in), B: (d_out, rank), float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from drotator.config import RecoverConfig

ADAPTER = "default"


class MaskedLinear(Linear):
    """peft's linear with an adapter, only that the update reaches no weight that has been pruned."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., d_in) in the model's dtype. Returns: x W^T + dropout(x) (mask * update)^T, (..., d_out)."""
        base: Any = self.get_base_layer()
        update = torch.where(base.weight != 0, self.get_delta_weight(ADAPTER), 0)  # (d_out, d_in) float32
        output: Tensor = base(x) + functional.linear(self.lora_dropout[ADAPTER](x), update.to(x.dtype))
        return output


def add_adapters(model: PreTrainedModel, weights: Sequence[str], settings: RecoverConfig) -> dict[str, Linear]:
    """Freeze the model and give these linears adapters that do nothing yet; the seed of torch decides their A.

    Args:
        weights: names of the linears' weights, model.layers.0.mlp.down_proj.weight.
    Returns: name of the weight -> its linear with the adapter, whose A and B are all that is trained.
    """
    names = [name.removesuffix(".weight") for name in weights]
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names, bias="none"
    )
    inject_adapter_in_model(config, model, ADAPTER)
    adapters: dict[str, Linear] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        module.lora_A.float()
        module.lora_B.float()
        if settings.masked:
            module.__class__ = MaskedLinear
        adapters[f"{name}.weight"] = module
    return adapters


@torch.no_grad()
def merged_weight(module: Linear) -> Tensor:
    """Return W + mask * update, summed in float64 and rounded once: +0.0 where W is zero, and nowhere else.

    A weight that would become zero by chance or underflow gets the smallest normal number, as zeros are the mask.
    """
    W, A, B = (part.weight for part in (module.get_base_layer(), module.lora_A[ADAPTER], module.lora_B[ADAPTER]))
    assert isinstance(W, Tensor) and isinstance(A, Tensor) and isinstance(B, Tensor)
    merged = (W.double() + module.scaling[ADAPTER] * (B.double() @ A.double())).to(W.dtype)
    merged = torch.where(merged == 0, torch.finfo(W.dtype).smallest_normal, merged)
    return torch.where(W != 0, merged, 0)
