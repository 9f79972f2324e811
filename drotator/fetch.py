"""Bring models and data into the local caches: folders, GGUF files, the hub, and two wheels that hold data.

What drotator makes lies in cache_dir(): models dequantised from GGUF, data unpacked from wheels, token windows. What
comes from the hub stays in the hub's own cache (HF_HOME). Wheels are unpacked, never imported or installed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from drotator.config import FetchConfig
from drotator.quiet import silent_libraries
from drotator.wheels import DATA_PACKAGE, MODEL_PACKAGE, unpack

log = logging.getLogger(__name__)

GIB = 2**30
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_DUPLICATES = ["consolidated*", "original/*", "onnx/*"]  # second copies of the weights in other formats


def cache_dir() -> Path:
    """Folder of drotator's own cache: $DROTATOR_CACHE, else $XDG_CACHE_HOME/drotator, else ~/.cache/drotator."""
    if folder := os.environ.get("DROTATOR_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drotator"


def resolve_model(path: str, revision: str = "main") -> Path:
    """Find or make the folder with config.json, *.safetensors and tokenizer files that `path` stands for.

    Args:
        path: "embedded" (SmolLM2-135M-Instruct from the package index), a folder, a .gguf file or a hub id.
        revision: branch, tag or commit, for hub ids only.
    Raises: ValueError if there is no such model, or if it is incomplete, damaged or out of reach.
    """
    if path == "embedded":
        return _embedded_model()
    local = Path(path).expanduser()
    if local.is_dir():
        return _checked(local, path)
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"model.path={path} is a file that is no .gguf. Give the folder it lies in.")
        return _gguf_model(local)
    if path.endswith(".gguf") or not HUB_ID.fullmatch(path):
        raise ValueError(f"model.path={path} does not exist (looked for {local.absolute()}). Check the path.")
    try:
        with nullcontext() if sys.stderr.isatty() else silent_libraries():  # a download of many GB shows how far it is
            folder = snapshot_download(
                path, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_DUPLICATES
            )
    except Exception as error:
        raise hub_error(f"model.path={path}", path, error) from error
    return _checked(Path(folder), path)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; a ValueError names the folder if there is none that can be read."""
    try:
        with silent_libraries():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder} holds no tokenizer that can be read ({_first_line(error)}).") from error
    return tokenizer


def embedded_data() -> Path:
    """Folder with DATA_PACKAGE.files: evaluation splits of five tasks, BoolQ, and SQuAD prompts.

    Raises: ValueError if the wheel cannot be had or is not the one we know.
    """
    target = cache_dir() / "data" / f"{DATA_PACKAGE.name}-{DATA_PACKAGE.version}"
    return _publish(target, lambda folder: unpack(DATA_PACKAGE, folder), DATA_PACKAGE.gib)


def fetch_all(settings: FetchConfig) -> None:
    """Bring the model, the calibration text and everything that is evaluated on into the caches (`drotator fetch`)."""
    from drotator import calibration, evaluation  # they stand on this module

    folder = resolve_model(settings.model.path, settings.model.revision)
    log.info("model %s: %s in %s", settings.model.name, _size(folder), folder)
    tokenizer = load_tokenizer(folder)
    windows = calibration.calibration_windows(settings.calibration, tokenizer)
    log.info("calibration text %s: %d windows of %d tokens", settings.calibration.dataset, *windows.shape)
    evaluation.prepare(settings.eval, tokenizer)
    for name, tokens in evaluation.perplexity_windows(settings.eval, tokenizer).items():
        log.info("evaluation text %s: %d windows of %d tokens", name, *tokens.shape)
    if settings.eval.tasks:
        log.info("evaluation tasks, from %s: %s", settings.eval.source, ", ".join(settings.eval.tasks))
    log.info("caches: %s (%s) and the hub's %s", cache_dir(), _size(cache_dir()), constants.HF_HOME)


def hub_error(what: str, repo: str, error: Exception) -> ValueError:
    """Say in one line why `repo` could not be had from the hub, and what to do. what: the setting that asked for it."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return ValueError(
            f"{what}: cannot write to the hub's cache {constants.HF_HOME} ({error.strerror}). Set HF_HOME."
        )
    if isinstance(error, GatedRepoError):
        return ValueError(f"{what}: {repo} is gated. Accept its licence on its page, then log in with `hf auth login`.")
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{what}: {repo} has no such revision. Check model.revision.")
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"{what}: {repo} is neither a folder here nor on the hub ({constants.ENDPOINT}). "
            "Check the spelling; if it is private, log in with `hf auth login`."
        )
    if constants.HF_HUB_OFFLINE:
        return ValueError(
            f"{what}: {repo} is not in the hub's cache {constants.HF_HOME}, and HF_HUB_OFFLINE is set. "
            "Run `drotator fetch` with the same options where there is a network, or point HF_HOME to a filled cache."
        )
    if isinstance(error, OSError):
        return ValueError(
            f"{what}: cannot get {repo} from the hub ({constants.ENDPOINT}): {_first_line(error)}. "
            "Check the network; for use without one, run `drotator fetch` beforehand and set HF_HUB_OFFLINE=1."
        )
    return ValueError(f"{what}: cannot read {repo} from the hub ({constants.ENDPOINT}): {_first_line(error)}.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def _size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e6:.0f} MB"


def _embedded_model() -> Path:
    target = cache_dir() / "models" / f"smollm2-135m-instruct-{MODEL_PACKAGE.sha256[:12]}"

    def fill(folder: Path) -> None:
        (name,) = MODEL_PACKAGE.files.values()
        unpack(MODEL_PACKAGE, folder)
        _dequantise(folder / name, folder)
        (folder / name).unlink()

    return _publish(target, fill, MODEL_PACKAGE.gib)


def _gguf_model(file: Path) -> Path:
    """Dequantise a user's GGUF file once. Keyed by path, size and time: hashing a file of 40 GB takes minutes."""
    stat = file.stat()
    source = {"file": str(file.resolve()), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()

    def fill(folder: Path) -> None:
        _dequantise(file, folder)
        (folder / "source.json").write_text(json.dumps(source, indent=2))

    target = cache_dir() / "models" / f"{file.stem}-{key[:12]}"
    return target if target.is_dir() else _publish(target, fill, _gguf_parameters(file) * 4 / GIB)


def _gguf_parameters(file: Path) -> int:
    """Number of weights that the GGUF file announces and holds."""
    from gguf import GGUFReader  # only where there is a GGUF file

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except Exception as error:  # the reader trusts what it reads: a damaged file may raise anything
        raise ValueError(f"{file} is no GGUF file, or damaged ({_first_line(error)}). Download it again.") from error


def _special_tokens(file: Path) -> dict[str, int]:
    """What the GGUF file says of the tokens that end and pad a text; neither enters a text that is read."""
    from gguf import GGUFReader

    keys = {"eos_token": "tokenizer.ggml.eos_token_id", "pad_token": "tokenizer.ggml.padding_token_id"}
    fields = GGUFReader(file).fields
    return {name: int(fields[key].parts[-1][0]) for name, key in keys.items() if key in fields}


def _dequantise(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain float32 model into `folder`, with its tokenizer."""
    try:
        with silent_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            for name, index in _special_tokens(file).items():  # transformers 5.17 takes others
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"transformers cannot load {file}: {_first_line(error)}.") from error
    model, loading = loaded
    if loading["missing_keys"]:
        raise ValueError(f"{file} lacks weights of its model: {', '.join(sorted(loading['missing_keys'])[:3])}, ...")
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        vars(holder).pop(name, None)  # with them, save_pretrained refuses: it takes the model for a quantised one
    with silent_libraries():
        model.save_pretrained(folder, max_shard_size="5GB")
        tokenizer.save_pretrained(folder)


def _checked(folder: Path, path: str) -> Path:
    """Refuse a model folder that is incomplete or damaged before anything is computed. path: what the user gave."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model.path={path} has no config.json, so it is no model folder of transformers.")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is damaged: it is no JSON ({_first_line(error)}).") from error
    for file in _weight_files(folder, path):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is damaged or incomplete ({_first_line(error)}). Download or write it again."
            ) from error
    return folder


def _weight_files(folder: Path, path: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: it names no weight files.") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"model.path={path} lacks {missing[0]}, one of {len(missing)} missing of {len(names)} files."
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("*.gguf")):
        raise ValueError(f"model.path={path} holds a GGUF file: give its path, not the folder's.")
    raise ValueError(
        f"model.path={path} has no *.safetensors. Pickled weights (*.bin, *.pt) are not read: convert them to "
        "safetensors by loading the model with transformers and writing it with save_pretrained."
    )


def _publish(target: Path, fill: Callable[[Path], None], gib: float) -> Path:
    """Return the cached folder `target`; make it with fill(folder) if it is not there, so that it is whole or absent.

    Two processes may do this at once: the first to finish wins, and both use what it made.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free / GIB
        if free < gib:
            raise ValueError(
                f"{target.parent} needs {gib:.1f} GiB free, but has {free:.1f}. Free some, or set DROTATOR_CACHE."
            )
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            fill(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the file system
            raise
        raise ValueError(
            f"cannot write to the cache {target.parent} ({error.strerror}). Set DROTATOR_CACHE to another folder."
        ) from error
    return target
