"""What the tool knows of transformers' models: one table of families, and weights read layer by layer.

d = hidden_size, m = intermediate_size, h = head_dim. A linear's weight is (d_out, d_in), as torch stores it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How R1 and R2 pass through one decoder layer of a family: names of its modules, relative to the layer.

    inputs: what the pruned linears read, in the order of the forward pass; linears of one entry share their input.
    attention: the module that holds query to output and returns (what output makes of its input, anything).
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"

    @property
    def inputs(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "attention": (self.query, self.key, self.value),
            "output": (self.output,),
            "mlp": (self.gate, self.up),
            "down": (self.down,),
        }

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for names in self.inputs.values() for name in names)

    @property
    def norms(self) -> Mapping[str, tuple[str, ...]]:
        """Norm -> the linears that its gain is folded into."""
        return {self.attention_norm: self.inputs["attention"], self.mlp_norm: self.inputs["mlp"]}


PRE_NORM = LayerSpec()

FAMILIES: Mapping[str, LayerSpec] = {"llama": PRE_NORM, "mistral": PRE_NORM, "qwen2": PRE_NORM, "qwen3": PRE_NORM}
"""Pre-norm RMSNorm families with separate projections. Key: transformers' model_type."""

REFUSED: Mapping[str, str] = {
    "gemma": "its RMSNorm scales by 1 + weight, which the folding of gains does not cover yet",
    **dict.fromkeys(
        ("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "glm4"),
        "it normalises after attention and MLP, and such a norm's gain does not commute with R1",
    ),
    **dict.fromkeys(("cohere", "cohere2"), "its LayerNorm subtracts the mean, which does not commute with R1"),
    **dict.fromkeys(
        ("gpt2", "opt", "gpt_neox", "bloom", "falcon", "phi", "mpt", "stablelm", "starcoder2"),
        "its LayerNorm subtracts the mean, which does not commute with R1",
    ),
    **dict.fromkeys(("phi3", "glm"), "its projections are fused in one matrix and would have to be split first"),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe"),
        "its MLP is a mixture of experts, and R1 would have to pass through each of them",
    ),
    **dict.fromkeys(
        tuple(f"drotator_{family}" for family in FAMILIES),
        "it has been rotated by drotator already; prune the dense model instead",
    ),
}

EMBEDDING, LAYERS, FINAL_NORM, HEAD = "model.embed_tokens", "model.layers", "model.norm", "lm_head"


def layer_spec(model_type: str, where: object) -> LayerSpec:
    """Return the family's table entry.

    Raises: ValueError that names the structural reason when the family is not supported.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSED.get(model_type, "no entry of the family table says how R1 and R2 pass through its layers")
    raise ValueError(
        f"Model type '{model_type}' ({where}) cannot be rotated: {reason}. Supported: {', '.join(FAMILIES)}."
    )


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Sizes that the rotation needs, read from the config, never guessed from ratios of weights."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    def input_size(self, inputs: str) -> int:
        """d_in of the linears that read `inputs`."""
        sizes = {"output": self.num_attention_heads * self.head_dim, "down": self.intermediate_size}
        return sizes.get(inputs, self.hidden_size)


@dataclass
class ModelSource:
    """A folder of safetensors read on demand: nothing is in memory but what was asked for."""

    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    spec: LayerSpec
    files: Mapping[str, Path] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, dtype: str = "auto") -> ModelSource:
        """Read config and index, and refuse what cannot be rotated or pruned.

        Raises: ValueError for an unsupported family, a quantised checkpoint or a damaged file.
        """
        config = read_config(folder)
        spec = layer_spec(config.model_type, folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{folder} holds quantised weights; give the float checkpoint.")
        files = _tensor_files(folder)
        chosen = getattr(torch, dtype) if dtype != "auto" else (config.dtype or _stored_dtype(files))
        return cls(folder=folder, config=config, dtype=chosen, spec=spec, files=files)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def dtype_name(self) -> str:
        """The dtype as settings name it: float32, bfloat16, float16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    @property
    def sizes(self) -> LayerSizes:
        config = self.config
        return LayerSizes(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The whole model on the meta device: structure without weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor in the model's dtype. Raises: ValueError if it is missing or its file is damaged."""
        if name not in self.files:
            raise ValueError(f"{self.folder} holds no tensor '{name}'; its checkpoint is not complete.")
        try:
            with safe_open(self.files[name], framework="pt") as stored:
                return stored.get_tensor(name).to(device=device, dtype=self.dtype)
        except SafetensorError as error:
            raise ValueError(f"{self.files[name]} is damaged ({error}); fetch it again.") from error

    def layer(self, index: int, device: torch.device | str = "cpu") -> nn.Module:
        """Build decoder layer `index` with its dense weights on `device`."""
        layer = copy.deepcopy(self.skeleton.get_submodule(f"{LAYERS}.{index}"))
        state = {name: self.tensor(f"{LAYERS}.{index}.{name}", device) for name in layer.state_dict()}
        layer.load_state_dict(state, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    def head_weight(self) -> Tensor:
        """The language-model head, (vocab_size, d); the embedding where they are tied."""
        return self.tensor(f"{EMBEDDING if self.is_tied else HEAD}.weight")


@dataclass(frozen=True)
class LayerCall:
    """Keyword arguments that the model passes to each of its layers for one batch shape."""

    per_layer: tuple[dict[str, Any], ...]


LayerCalls = dict[int, LayerCall]
"""By batch size."""


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps the keyword arguments it is called with and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden_states


@torch.no_grad()
def embed(
    source: ModelSource, batches: Sequence[Tensor], device: torch.device, keep: Callable[[Tensor], object]
) -> LayerCalls:
    """Run the model's own forward with its layers replaced by recorders.

    Masks and rotary embeddings then come from transformers' code for every layer, whatever the family does.

    Args:
        batches: (b, T) int64 token ids each.
        keep: is given the hidden states, (b, T, d) on `device`, batch by batch.
    Returns: the layers' keyword arguments by batch size, that of a single window too.
    """
    model = copy.deepcopy(source.skeleton)
    recorders = [_Recorder() for _ in range(source.num_layers)]
    model.set_submodule(LAYERS, nn.ModuleList(recorders))
    model.set_submodule(FINAL_NORM, nn.Identity())
    embedding = source.tensor(f"{EMBEDDING}.weight", device)
    model.get_submodule(EMBEDDING).load_state_dict({"weight": embedding}, assign=True)
    decoder = model.base_model
    rotary = type(decoder.rotary_emb)(source.config)
    decoder.rotary_emb = rotary.to(device)
    calls: LayerCalls = {}
    for number, batch in enumerate((*(batch[:1] for batch in batches[:1]), *batches)):
        output = decoder(input_ids=batch.to(device), use_cache=False)
        calls.setdefault(len(batch), LayerCall(tuple(recorder.kwargs for recorder in recorders)))
        if number > 0:
            keep(output.last_hidden_state)
    return calls


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """The layer's linear of that name. Raises: AssertionError if the family table names something else."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is {type(module).__name__}, not Linear"
    return module


def hidden_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A decoder layer returns its hidden states, alone or first of a tuple, as the version of transformers has it."""
    return output if isinstance(output, Tensor) else output[0]


def read_config(folder: Path) -> Any:
    """Read the folder's config.json, a PretrainedConfig.

    Raises: ValueError if it is damaged, or of a family that cannot be rotated.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        layer_spec(_declared_model_type(folder), folder)
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error


def _declared_model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type", "unknown"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the headers of all safetensors files of the folder."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as stored:
                files.update(dict.fromkeys(stored.keys(), path))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch it again.") from error
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file.")
    return files


def _stored_dtype(files: Mapping[str, Path]) -> torch.dtype:
    name, path = next(iter(files.items()))
    with safe_open(path, framework="pt") as stored:
        return stored.get_tensor(name).dtype
