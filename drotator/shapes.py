"""Shapes without weights: configs of the models that configs/model names, and random models of such shapes.

The weights are drawn so that activations stay of order one and are correlated, as real ones are: what is timed then
takes the ways that real weights take. Their quality means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from drotator.architecture import EMBEDDING, HEAD, LAYERS, ModelSource, layer_spec, read_config
from drotator.config import ModelConfig
from drotator.fetch import HUB_ID, hub_error
from drotator.resources import check_disk_space


def _shape(model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int) -> Any:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "embedded": {
        **_shape("llama", 576, 1536, 30, 9, 3, 49152),
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
    "meta-llama/Meta-Llama-3-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Meta-Llama-3-70B": _shape("llama", 8192, 28672, 80, 64, 8, 128256),
    "meta-llama/Llama-3.2-1B": {**_shape("llama", 2048, 8192, 16, 32, 8, 128256), "tie_word_embeddings": True},
    "meta-llama/Llama-2-7b-hf": _shape("llama", 4096, 11008, 32, 32, 32, 32000),
    "meta-llama/Llama-2-13b-hf": _shape("llama", 5120, 13824, 40, 40, 40, 32000),
    "meta-llama/Llama-2-70b-hf": _shape("llama", 8192, 28672, 80, 64, 8, 32000),
    "mistralai/Mistral-7B-v0.3": {**_shape("mistral", 4096, 14336, 32, 32, 8, 32768), "sliding_window": None},
    "Qwen/Qwen2.5-7B": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-14B": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "Qwen/Qwen2.5-32B": _shape("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "Qwen/Qwen2.5-72B": _shape("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "Qwen/Qwen3-8B": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936),
}
"""By model.path, what the models' own config.json say of sizes. Times do not depend on the rest."""

WORDS_PER_CHANNEL = 4
EMBEDDING_RANK = 64


def shapes_of(model: ModelConfig) -> ModelSource:
    """Open a model of which only the shapes are known: from the table, a folder's config.json or the hub's.

    Raises: ValueError if there is no config, or it is of a family that cannot be rotated.
    """
    folder = Path(model.path).expanduser()
    if model.path in SHAPES:
        config: Any = AutoConfig.for_model(**SHAPES[model.path])
    elif folder.is_dir():
        config = read_config(folder)
    elif folder.exists() or not HUB_ID.fullmatch(model.path):
        raise ValueError(f"model.path={model.path} is no folder with a config.json, which is all that bench reads.")
    else:
        try:
            found = hf_hub_download(model.path, "config.json", revision=model.revision)
        except Exception as error:
            raise hub_error(f"model.path={model.path}", model.path, error) from error
        config = read_config(Path(found).parent)
    spec = layer_spec(config.model_type, model.path)
    dtype = (config.dtype or torch.bfloat16) if model.dtype == "auto" else getattr(torch, model.dtype)
    return ModelSource(folder=folder, config=config, dtype=dtype, spec=spec, files={})


def write_random_model(
    folder: Path, shapes: ModelSource, num_layers: int, *, device: torch.device, seed: int
) -> ModelSource:
    """Write a model of some layers of these shapes to a new folder, and open it.

    Its vocabulary is cut to WORDS_PER_CHANNEL * hidden_size words: enough that inputs span all channels.
    """
    folder.mkdir(parents=True)
    changed = shapes.config.to_dict() | {
        "num_hidden_layers": num_layers,
        "vocab_size": min(shapes.config.vocab_size, WORDS_PER_CHANNEL * shapes.sizes.hidden_size),
        "dtype": shapes.dtype_name,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if changed.get("layer_types"):
        changed["layer_types"] = changed["layer_types"][:num_layers]
    config = AutoConfig.for_model(changed.pop("model_type"), **changed)
    config.save_pretrained(folder)
    source = ModelSource(folder=folder, config=config, dtype=shapes.dtype, spec=shapes.spec, files={})
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.skeleton.state_dict().items():
        if name != f"{HEAD}.weight" or not source.is_tied:
            part = name.removeprefix(f"{LAYERS}.").partition(".")[0] if name.startswith(f"{LAYERS}.") else "rest"
            by_file.setdefault(part, {})[name] = tensor
    check_disk_space(folder, sum(tensor.nbytes for part in by_file.values() for tensor in part.values()))
    generator = torch.Generator(device).manual_seed(seed)
    for part, tensors in by_file.items():
        drawn = {name: random_weight(name, tensor.shape, generator) for name, tensor in tensors.items()}
        save_file({n: t.to(source.dtype).cpu() for n, t in drawn.items()}, folder / f"{part}.safetensors")
    return ModelSource.open(folder)


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw a parameter, float32: linears that keep the size of what they read, gains near 1, correlated embeddings."""

    def gaussian(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    if name == f"{EMBEDDING}.weight":
        common = gaussian(shape[0], EMBEDDING_RANK) @ gaussian(EMBEDDING_RANK, shape[1]) * EMBEDDING_RANK**-0.5
        return (common + gaussian(*shape)) * 0.5**0.5
    if len(shape) == 2:
        return gaussian(*shape) * shape[1] ** -0.5
    return (0.0 if name.endswith("bias") else 1.0) + 0.1 * gaussian(*shape)


def random_moments(size: int, generator: torch.Generator) -> Tensor:
    """H of correlated activations x = A z + s e with white z and e: (size, size) float32, positive definite."""
    A = torch.randn(size, min(size, 512), generator=generator, device=generator.device)
    s = torch.rand(size, generator=generator, device=generator.device) + 0.5
    H = A @ A.mT / A.shape[1]
    H.diagonal().add_(s.square())
    return H.mul_(2)
