"""Folders of a checkpoint on disk: whole or not there, and one line for whatever the disk says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

SAMPLES = 64
SAMPLE_BYTES = 4096


def check_output_folder(
    folder: Path, *, overwrite: bool = False, num_bytes: int = 0, holds: str = "config.json"
) -> None:
    """Refuse a place where a checkpoint of `num_bytes` cannot go; cheap, so that it can be asked before hours of work.

    Args:
        holds: the file by which a checkpoint that may be overwritten is known.
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
        if not (folder / holds).is_file():
            raise ValueError(
                f"The folder {folder} holds no {holds}, so it is no checkpoint to replace: give another folder."
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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder` that takes its place at the end; if the body fails, nothing is left of it.

    Raises: ValueError or RuntimeError of one line for what the disk says.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with write_errors(folder):
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
            partial.mkdir(parents=True)
        yield partial
        with write_errors(folder):
            _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
def write_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk says while `folder` is written into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise RuntimeError(f"No room on the disk for the checkpoint {folder}: free some and run again.") from error
        raise ValueError(f"The checkpoint {folder} cannot be written: {error}.") from error


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder whose names match a pattern."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file, which checks that its header is whole and its size what the header says.

    Raises: ValueError if it is missing or damaged, or what the body reads is not in it.
    """
    if not path.is_file():
        raise ValueError(f"The checkpoint {path.parent} is incomplete: {path.name} is missing.")
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or make the checkpoint again.") from error


def fingerprint(path: Path) -> str:
    """Size of a file, and a hash of samples from all over it: tells weights apart without reading 100 GB."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(size * index // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:12]}"


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises: ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"There is no {path}: give a folder with a model in it.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
