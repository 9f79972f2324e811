"""Checkpoints in the layout of `save_pretrained`, written shard by shard, and their strict loading.

A checkpoint whose layers share one basis (or have none) is a plain model of its family. One with a basis for each
layer carries boundary matrices: it has a model_type of its own, and modeling_rotated.py in its folder as custom code.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drotator import modeling_rotated
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
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _write_errors(folder):
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
            partial.mkdir(parents=True)
            _copy_files(model_folder, partial)
        if boundaries:
            _add_custom_code(model_folder, partial)
        config["dtype"] = _write_shards(partial, tensors, max_shard_bytes, folder)
        with _write_errors(folder):
            _write_config(partial, config)
            _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def update_metadata(folder: Path, metadata: dict[str, object]) -> None:
    """Add to a checkpoint's metadata, and rewrite its model card: for numbers that are measured on the checkpoint.

    Raises: ValueError or RuntimeError as `write_checkpoint` does.
    """
    config = _read_json(folder / "config.json")
    config["drotator"] = config.get("drotator", {"format_version": FORMAT_VERSION}) | metadata
    with _write_errors(folder):
        _write_config(folder, config)


def check_output_folder(folder: Path, *, overwrite: bool = False, num_bytes: int = 0) -> None:
    """Refuse a place where a checkpoint of `num_bytes` cannot go; cheap, so that it can be asked before hours of work.

    Raises: ValueError if `folder` is a file, is not empty (with `overwrite`: and is no checkpoint), is not writable, or
        has no room.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The checkpoint folder {folder} is a file: give another folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(
                f"The checkpoint folder {folder} is not empty: give another folder, or overwrite=true to replace it."
            )
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"The folder {folder} holds no config.json, so it is no checkpoint to replace: give another folder."
            )
    parent = folder.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"The checkpoint folder {folder} cannot be made: {parent} is not a writable folder.")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"The checkpoint folder {folder} needs {num_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there: "
            "free some or give another folder."
        )


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the "drotator" entry of a checkpoint's config.json, {} if it has none.

    Raises: ValueError if there is no readable config.json, or the entry is of a newer format version.
    """
    entry = _read_json(folder / "config.json").get("drotator", {})
    version = entry.get("format_version", FORMAT_VERSION)
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


def load_checkpoint(folder: Path, *, dtype: str = "auto", device: str | torch.device = "cpu") -> PreTrainedModel:
    """Load a checkpoint, rotated or plain, in eval mode, and refuse it unless every weight is there and has its place.

    Code that lies in the folder is never executed.

    Args:
        folder: holds config.json and safetensors files.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
    Raises: ValueError if the checkpoint is incomplete, damaged, of a newer format, or of an unknown model type.
    """
    register_rotated_classes()
    read_metadata(folder)
    model_type = _read_json(folder / "config.json").get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"The checkpoint {folder} has model_type '{model_type}', which transformers does not know.")
    _check_weight_files(folder)
    with _quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
        )
    model, loading = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(str(name) for name in loading[f"{kind}_keys"]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"The checkpoint {folder} does not fit its config.json: {kind} weight {names[0]}{more}.")
    return model.to(device)


def _checkpoint_config(
    model_folder: Path, *, boundaries: Sequence[int], untie: bool, metadata: dict[str, object]
) -> dict[str, Any]:
    """Derive the checkpoint's config.json from the model's."""
    config = _read_json(model_folder / "config.json")
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


def _copy_files(source: Path, target: Path) -> None:
    for pattern in COPIED_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def _add_custom_code(model_folder: Path, folder: Path) -> None:
    """Add the code of the rotated classes, and name in tokenizer_config.json the class that AutoTokenizer takes.

    For some model types AutoTokenizer overrules that file by the model_type, which a rotated checkpoint changes:
    without the right class there, text could be cut into other tokens than for the model it was made from.
    """
    shutil.copyfile(str(modeling_rotated.__file__), folder / "modeling_rotated.py")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False, local_files_only=True)
        _write_json(path, _read_json(path) | {"tokenizer_class": type(tokenizer).__name__})


def _write_shards(partial: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int, folder: Path) -> str:
    """Write the shards and, if there are several, their index; return the name of the dtype that holds every tensor."""
    shard_of: dict[str, int] = {}
    total_size, num_shards = 0, 0
    dtype: torch.dtype | None = None
    for shard in _shards(tensors, max_shard_bytes):
        assert not shard.keys() & shard_of.keys(), f"given twice: {shard.keys() & shard_of.keys()}"
        with _write_errors(folder):
            path = partial / f"{num_shards}.safetensors"
            save_file(shard, path, metadata={"format": "pt"})
            path.chmod(partial.stat().st_mode & 0o666)  # safetensors 0.8 lets nobody but the owner read it
        for name, tensor in shard.items():
            shard_of[name] = num_shards
            total_size += tensor.nbytes
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
        num_shards += 1
        shard.clear()  # before the next one fills
    files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    if num_shards == 1:
        files = [WEIGHTS_NAME]
    for i, file in enumerate(files):
        os.replace(partial / f"{i}.safetensors", partial / file)
    if num_shards > 1:
        weight_map = {name: files[i] for name, i in shard_of.items()}
        with _write_errors(folder):
            _write_json(partial / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return str(dtype).removeprefix("torch.")


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Gather tensors into shards of at most `max_shard_bytes`, or of one tensor that is larger."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        tensor = tensor.detach().to("cpu")
        if tensor.is_floating_point():
            tensor = tensor + 0.0  # -0.0 becomes +0.0; 2:4 kernels have choked on negative zeros
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def _move_into_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(partial, folder)
        return
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced)


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk says while `folder` is written into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise RuntimeError(f"No room on the disk for the checkpoint {folder}: free some and run again.") from error
        raise ValueError(f"The checkpoint {folder} cannot be written: {error}.") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep its table of missing and unexpected weights off the terminal: one line says it."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _check_weight_files(folder: Path) -> None:
    """Open every shard, which checks that its header is whole and its size what the header says."""
    names = {WEIGHTS_NAME}
    if (folder / INDEX_NAME).is_file():
        names = set(_read_json(folder / INDEX_NAME).get("weight_map", {}).values())
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"The checkpoint {folder} is incomplete: {name} is missing.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy or make the checkpoint again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no {path}: give a folder with a model in it.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and the model card that follows from it."""
    _write_json(folder / "config.json", config)
    has_custom_code = config["model_type"].startswith(MODEL_TYPE_PREFIX)
    metadata = {name: value for name, value in config["drotator"].items() if name != "format_version"}
    _write_text(folder / "README.md", model_card(metadata, has_custom_code=has_custom_code))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
