"""Models of the supported families with one linear map between consecutive decoder layers.

When layers are rotated into different bases, the residual stream changes basis between layer l and layer l+1: a row
vector h becomes h @ B with B = R1_l^T R1_{l+1}. The module `boundary` of layer l holds weight = B^T, so that
linear(h) = h @ B. config.boundary_layers lists the layers that have one; by default all but the last. Each forward pass
is the family's own, called through `super()`.

This file is copied into checkpoints as their custom code, hence it imports torch and transformers only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    initialization,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class Boundary(nn.Linear):
    """Carry the residual stream from one layer's basis to the next one's; the identity until weights are loaded.

    weight: (hidden_size, hidden_size), the transpose of B = R1_l^T R1_{l+1}.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        initialization.eye_(self.weight)


class _BoundaryLayer(nn.Module):
    """Goes before a family's decoder layer in the order of bases."""

    boundary: Boundary

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_states: torch.Tensor = self.boundary(super().forward(*args, **kwargs))
        return hidden_states  # (batch, tokens, hidden_size), in the next layer's basis


class _RotatedModel(PreTrainedModel):
    """Goes before a family's base model in the order of bases."""

    _layer_class: type[nn.Module]
    layers: nn.ModuleList

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        # The family's constructor names its own layer class. Its layers are given the subclass in place, as layers made
        # anew would exist twice for a moment.
        indices = config.boundary_layers
        for layer in self.layers[:-1] if indices is None else [self.layers[index] for index in indices]:
            layer.__class__ = self._layer_class
            layer.boundary = Boundary(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Boundary):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class _RotatedForCausalLM(PreTrainedModel):
    """Goes before a family's causal language model in the order of bases.

    The constructor does what the family's does, with the rotated base model in the place of the plain one.
    """

    _model_class: type[_RotatedModel]

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self._model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class RotatedFamily(NamedTuple):
    """The rotated classes of one family."""

    config: type[PreTrainedConfig]
    layer: type[nn.Module]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


def _rotate(
    config: type[PreTrainedConfig],
    layer: type[nn.Module],
    model: type[PreTrainedModel],
    causal_lm: type[PreTrainedModel],
) -> RotatedFamily:
    """Derive the rotated classes: RotatedLlamaModel from LlamaModel, model_type drotator_llama from llama."""

    def subclass(base: type, *mixins: type, **attributes: object) -> Any:
        # The name is right from the start, as transformers inspects a class while it is being made.
        return type(f"Rotated{base.__name__}", (*mixins, base), {"__module__": __name__, **attributes})

    # _auto_class makes save_pretrained copy this file, so that what it saves loads like what was loaded.
    rotated_config = subclass(
        config,
        model_type=f"drotator_{config.model_type}",
        boundary_layers=None,
        __annotations__={"boundary_layers": list[int] | None},  # transformers makes a field of it
        _auto_class="AutoConfig",
    )
    rotated_layer = subclass(layer, _BoundaryLayer)
    shared = {"config_class": rotated_config, "_no_split_modules": [rotated_layer.__name__, layer.__name__]}
    rotated_model = subclass(model, _RotatedModel, _layer_class=rotated_layer, _auto_class="AutoModel", **shared)
    rotated_causal_lm = subclass(
        causal_lm, _RotatedForCausalLM, _model_class=rotated_model, _auto_class="AutoModelForCausalLM", **shared
    )
    return RotatedFamily(rotated_config, rotated_layer, rotated_model, rotated_causal_lm)


ROTATED_FAMILIES = {
    "llama": _rotate(LlamaConfig, LlamaDecoderLayer, LlamaModel, LlamaForCausalLM),
    "mistral": _rotate(MistralConfig, MistralDecoderLayer, MistralModel, MistralForCausalLM),
    "qwen2": _rotate(Qwen2Config, Qwen2DecoderLayer, Qwen2Model, Qwen2ForCausalLM),
    "qwen3": _rotate(Qwen3Config, Qwen3DecoderLayer, Qwen3Model, Qwen3ForCausalLM),
}

# Loaders look the classes up by name: RotatedLlamaForCausalLM and so on become attributes of this module.
globals().update({cls.__name__: cls for family in ROTATED_FAMILIES.values() for cls in family})
