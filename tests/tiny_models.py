"""Random models of every supported family, small enough for a test, every parameter of which matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from drotator.architecture import FAMILIES, ModelSource
from drotator.rotation import Rotation
from drotator.statistics import ActivationStream, rotated

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.4,
}
BIASED = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}

families = pytest.mark.parametrize("family", FAMILIES)


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Three layers, two query heads a key/value head, head_dim not d / heads, biases where the config has them."""
    return AutoConfig.for_model(family, **(SIZES | BIASED.get(family, {}) | changes))


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Build a random model of `tiny_config`, with gains around 1 and biases around 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.copy_(("norm" in name) + 0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tiny_source(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> ModelSource:
    """Save `tiny_model` as safetensors and open the folder."""
    tiny_model(family, dtype, **changes).save_pretrained(folder)
    return ModelSource.open(folder)


def some_tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


class Float64Norm(nn.Module):
    """The families' RMSNorm, which computes in float32 whatever the dtype, without that rounding."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.epsilon)


def without_float32(model: Any) -> Any:
    """Replace the norms of a float64 model by norms that compute in float64."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child.__class__.__name__.endswith("RMSNorm"):
                setattr(module, name, Float64Norm(child))
    return model


def calls_of(stream: ActivationStream, index: int, R1: Tensor | None) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Inputs of layer `index`, batch by batch, in the basis of R1, and the keyword arguments it is called with."""
    for hidden in stream.hidden:
        yield rotated(hidden, R1), stream.arguments(hidden, index)


def stretched(rotation: Rotation, condition: float = 20) -> Rotation:
    """A rotation with an invertible map between v and o in the place of R2: general, of the given condition number."""
    scales = torch.logspace(0, -1, rotation.R2.shape[-1], base=condition, dtype=rotation.R2.dtype)
    M = rotation.R2 * scales @ rotation.R2.flip(1).mT
    return dataclasses.replace(rotation, R2=1.5 * M, value_map="invertible")
