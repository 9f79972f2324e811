"""Checkpoints in the layout of `save_pretrained`, written shard by shard, and their strict loading.

A checkpoint whose layers share one basis (or have none) is a plain model of its family. One with a basis for each
layer carries boundary matrices: it has a model_type of its own, and modeling_rotated.py in its folder as custom code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drotator import modeling_rotated
from drotator.folders import (
    check_output_folder,
    copy_files,
    new_folder,
    open_shard,
    read_json,
    write_errors,
    write_json,
    write_text,
)
from drotator.model_card import model_card
from drotator.modeling_rotated import ROTATED_FAMILIES

FORMAT_VERSION = 1
MODEL_TYPE_PREFIX = "drotator_"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "*.model",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)


def write_checkpoint(
    folder: Path,
    *,
    model_folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    boundaries: Sequence[int],
    untie: bool,
    metadata: dict[str, object],
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint that `from_pretrained` loads, holding at most one shard of it in memory.

    It is written to a hidden folder beside `folder` and renamed at the end: `folder` is whole or not there.

    Args:
        folder: where the checkpoint goes; with `overwrite` a checkpoint that stands there is replaced as a whole.
        model_folder: the model it was made from: its config.json, tokenizer and generation settings are taken over.
        tensors: (name in the state dict, tensor on any device); drawn one by one; stored in their dtype, -0.0 as +0.0.
        boundaries: layers i for which the tensors hold `model.layers.{i}.boundary.weight`; none: a plain model.
        untie: lm_head.weight is a tensor of its own, whatever the model's config.json says.
        metadata: what was done, in JSON types; kept in config.json under "drotator" and told by the model card.
    Raises:
        ValueError: `folder` is not empty, or cannot be written to, or the model's family has no rotated classes.
        RuntimeError: no room on the disk.
    """
    folder = folder.resolve()
    check_output_folder(folder, overwrite=overwrite)
    config = _checkpoint_config(model_folder, boundaries=boundaries, untie=untie, metadata=metadata)
    with new_folder(folder) as partial:
        with write_errors(folder):
            copy_files(model_folder, partial, COPIED_FILES)
        if boundaries:
            _add_custom_code(model_folder, partial)
        shards = write_shards(
            partial, _with_positive_zeros(tensors), "model", {"format": "pt"}, folder, max_shard_bytes=max_shard_bytes
        )
        config["dtype"] = shards.dtype
        with write_errors(folder):
            if len(shards.files) == 1:
                os.replace(partial / shards.files[0], partial / WEIGHTS_NAME)
            else:
                index = {"metadata": {"total_size": shards.total_size}, "weight_map": shards.weight_map}
                write_json(partial / INDEX_NAME, index)
            _write_config(partial, config)


def update_metadata(folder: Path, metadata: dict[str, object]) -> None:
    """Add to a checkpoint's metadata, and rewrite its model card: for numbers that are measured on the checkpoint.

    Raises: ValueError or RuntimeError as `write_checkpoint` does.
    """
    config = read_json(folder / "config.json")
    config["drotator"] = config.get("drotator", {"format_version": FORMAT_VERSION}) | metadata
    with write_errors(folder):
        _write_config(folder, config)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the "drotator" entry of a checkpoint's config.json, {} if it has none.

    Raises: ValueError if there is no readable config.json, or the entry is damaged or of a newer format version.
    """
    entry = read_json(folder / "config.json").get("drotator", {})
    version = entry.get("format_version", FORMAT_VERSION) if isinstance(entry, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{folder / 'config.json'} is damaged: its entry drotator has no format_version.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint {folder} has format version {version}, but this drotator reads up to {FORMAT_VERSION}: "
            "install a newer drotator."
        )
    return dict(entry)


def register_rotated_classes() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM load rotated checkpoints without trust_remote_code."""
    for family in ROTATED_FAMILIES.values():
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.model, exist_ok=True)
        AutoModelForCausalLM.register(family.config, family.causal_lm, exist_ok=True)


def check_checkpoint(folder: Path) -> list[Path]:
    """Refuse what config.json and the headers of the shards tell is wrong, before anything long starts.

    Returns: the shards.
    Raises: ValueError if the checkpoint is of a newer format or an unknown model type, or a shard or a boundary matrix
        is missing or damaged.
    """
    config = _checked_config(folder)
    files = weight_files(folder)
    if config["model_type"].startswith(MODEL_TYPE_PREFIX):
        layers = config.get("boundary_layers")
        layers = range(config["num_hidden_layers"] - 1) if layers is None else layers
        missing = {f"model.layers.{index}.boundary.weight" for index in layers}
        for path in files:
            with open_shard(path) as stored:
                missing.difference_update(stored.keys())
        _refuse_misfits("missing", missing, folder)
    return files


def load_checkpoint(folder: Path, *, dtype: str = "auto", device: str | torch.device = "cpu") -> PreTrainedModel:
    """Load a checkpoint, rotated or plain, in eval mode, and refuse it unless every weight is there and has its place.

    Code that lies in the folder is never executed.

    Args:
        folder: holds config.json and safetensors files.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
    Raises: ValueError if the checkpoint is incomplete, damaged, of a newer format, or of an unknown model type.
    """
    check_checkpoint(folder)
    with _quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, local_files_only=True, **REPORTED
        )
    model: Any = _complete_model(loaded, folder)
    return model.to(device)


def model_with_weights(folder: Path, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Load as `load_checkpoint` does, but with these weights: of the folder only the configs are read.

    Args:
        weights: name in the state dict -> tensor, stored in the dtype that config.json names.
    Raises: ValueError if a weight is missing, misshapen or has no place, or the model type is unknown.
    """
    _checked_config(folder)
    with _quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        loaded = family.from_pretrained(None, config=config, state_dict=weights, dtype="auto", **REPORTED)
        model = _complete_model(loaded, folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


REPORTED = {
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # they are reported, and refused by _complete_model
}


def _checked_config(folder: Path) -> dict[str, Any]:
    register_rotated_classes()
    read_metadata(folder)
    config = read_json(folder / "config.json")
    model_type = config.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"The checkpoint {folder} has model_type '{model_type}', which transformers does not know.")
    return config


def _complete_model(loaded: tuple[PreTrainedModel, dict[str, Any]], folder: Path) -> PreTrainedModel:
    """Return the model of (model, loading info), unless weights are missing, unexpected or of another shape."""
    model, loading = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        _refuse_misfits(kind, loading[f"{kind}_keys"], folder)
    return model


def _refuse_misfits(kind: str, found: Collection[object], folder: Path) -> None:
    if names := sorted(str(name) for name in found):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"The checkpoint {folder} does not fit its config.json: {kind} weight {names[0]}{more}.")


def _checkpoint_config(
    model_folder: Path, *, boundaries: Sequence[int], untie: bool, metadata: dict[str, object]
) -> dict[str, Any]:
    """Derive the checkpoint's config.json from the model's."""
    config = read_json(model_folder / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)  # the name of "dtype" before transformers 5
    if untie:
        config["tie_word_embeddings"] = False
    if boundaries:
        name = str(config.get("model_type", "")).removeprefix(MODEL_TYPE_PREFIX)
        if name not in ROTATED_FAMILIES:
            raise ValueError(
                f"{model_folder} has model_type '{name}', which cannot carry boundary matrices: "
                f"choose from {', '.join(ROTATED_FAMILIES)}."
            )
        family, module = ROTATED_FAMILIES[name], modeling_rotated.__name__.rpartition(".")[2]
        config["model_type"] = family.config.model_type
        config["architectures"] = [family.causal_lm.__name__]
        config["boundary_layers"] = list(boundaries)
        config["auto_map"] = {
            "AutoConfig": f"{module}.{family.config.__name__}",
            "AutoModel": f"{module}.{family.model.__name__}",  # vLLM asks for the base model
            "AutoModelForCausalLM": f"{module}.{family.causal_lm.__name__}",
        }
    config["drotator"] = {"format_version": FORMAT_VERSION, **metadata}
    return config


def _add_custom_code(model_folder: Path, folder: Path) -> None:
    """Add the code of the rotated classes, and name in tokenizer_config.json the class that AutoTokenizer takes.

    For some model types AutoTokenizer overrules that file by the model_type, which a rotated checkpoint changes:
    without the right class there, text could be cut into other tokens than for the model it was made from.
    """
    shutil.copyfile(str(modeling_rotated.__file__), folder / "modeling_rotated.py")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False, local_files_only=True)
        write_json(path, read_json(path) | {"tokenizer_class": type(tokenizer).__name__})


@dataclass(frozen=True)
class Shards:
    """Files that were written. dtype: the name of one that holds every tensor. weight_map: tensor -> file."""

    files: list[str]
    weight_map: dict[str, str]
    total_size: int
    dtype: str


def write_shards(
    partial: Path,
    tensors: Iterable[tuple[str, Tensor]],
    stem: str,
    metadata: dict[str, str],
    folder: Path,
    *,
    max_shard_bytes: int,
) -> Shards:
    """Write partial/STEM-0000i-of-0000N.safetensors, with at most one shard in memory; `folder`: where they will be.

    Args:
        tensors: (name, tensor on any device), drawn one by one; stored bit by bit as they are.
        metadata: goes in the header of each file.
    Raises: ValueError or RuntimeError of one line for what the disk says.
    """
    shard_of: dict[str, int] = {}
    total_size, num_shards = 0, 0
    dtype: torch.dtype | None = None
    for shard in _shards(tensors, max_shard_bytes):
        assert not shard.keys() & shard_of.keys(), f"given twice: {shard.keys() & shard_of.keys()}"
        with write_errors(folder):
            path = partial / f"{num_shards}.safetensors"
            save_file(shard, path, metadata=metadata)
            path.chmod(partial.stat().st_mode & 0o666)  # safetensors 0.8 lets nobody but the owner read it
        for name, tensor in shard.items():
            shard_of[name] = num_shards
            total_size += tensor.nbytes
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
        num_shards += 1
        shard.clear()  # before the next one fills
    files = [f"{stem}-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    for i, file in enumerate(files):
        os.replace(partial / f"{i}.safetensors", partial / file)
    weight_map = {name: files[i] for name, i in shard_of.items()}
    return Shards(files, weight_map, total_size, str(dtype).removeprefix("torch."))


def _with_positive_zeros(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """-0.0 becomes +0.0; 2:4 kernels have choked on negative zeros."""
    for name, tensor in tensors:
        yield name, tensor.detach() + 0.0 if tensor.is_floating_point() else tensor


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Gather tensors into shards of at most `max_shard_bytes`, or of one tensor that is larger."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
    yield shard


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep its table of missing and unexpected weights off the terminal: one line says it."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def weight_files(folder: Path) -> list[Path]:
    """Return the shards of a checkpoint, all of them whole. Raises: ValueError if one is missing or damaged."""
    names = {WEIGHTS_NAME}
    if (folder / INDEX_NAME).is_file():
        names = set(read_json(folder / INDEX_NAME).get("weight_map", {}).values())
    paths = [folder / name for name in sorted(names)]
    for path in paths:
        with open_shard(path):
            pass
    return paths


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and the model card that follows from it."""
    write_json(folder / "config.json", config)
    has_custom_code = config["model_type"].startswith(MODEL_TYPE_PREFIX)
    metadata = {name: value for name, value in config["drotator"].items() if name != "format_version"}
    write_text(folder / "README.md", model_card(metadata, has_custom_code=has_custom_code))
