"""`drotator export format=sparse24`: a 2:4 checkpoint in compressed files, and their loading, bit by bit.

Of every group of four inputs a linear keeps two weights. A file holds those (values) and two bits for the place of each
(metadata): 9/16 of the size of 16-bit weights, 17/32 of 32-bit ones. A weight is zero if all its bits are: -0.0 and nan
count as weights that are kept, so that unpacking gives exactly what was packed.

Layout of metadata: group g of a row has the nibble first + 4 * second, first < second being the places (0 to 3) of its
two values; byte b holds group 2 b in its low and group 2 b + 1 in its high nibble. A group with fewer than two weights
keeps zeros too: the first places that are free.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drotator.architecture import LAYERS, layer_spec
from drotator.checkpoint import COPIED_FILES, MODEL_TYPE_PREFIX, check_checkpoint, model_with_weights, write_shards
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
from drotator.model_card import sparse24_card

FORMAT = "drotator-sparse24"
FORMAT_VERSION = 1
INDEX_NAME = "sparse24.json"
VALUES, METADATA = ".values", ".metadata"
KEEP, GROUP = 2, 4
GROUPS_PER_BYTE = 2
BITS = {2: torch.int16, 4: torch.int32}
"""Bytes of a weight -> the integer of that size."""


def _kept_places() -> Tensor:
    """The two places that are kept, by the set of non-zeros: (16, 2) int64; bit p of the row's number: p is one."""
    table = torch.zeros(16, KEEP, dtype=torch.int64)
    for pattern in range(16):
        non_zeros = [place for place in range(GROUP) if pattern >> place & 1]
        zeros = [place for place in range(GROUP) if not pattern >> place & 1]
        table[pattern] = torch.tensor(sorted((non_zeros + zeros)[:KEEP]))
    return table


PLACES = _kept_places()
NIBBLES = [first + 4 * second for first, second in itertools.combinations(range(GROUP), KEEP)]
"""The six that a group can have."""


def pack(weight: Tensor, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """Compress a 2:4 weight.

    Args:
        weight: (d_out, d_in) float of 16 or 32 bits, d_in divisible by 8, not modified.
        name: what a refusal calls it.
    Returns: values (d_out, d_in / 2) in the weight's dtype, in the order of the inputs; metadata (d_out, d_in / 8)
        uint8, see the top of this file.
    Raises: ValueError if the dtype or d_in is another, or a group of four inputs holds more than two weights.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.element_size() not in BITS:
        raise ValueError(
            f"{name} is {weight.dtype} of shape {tuple(weight.shape)}: sparse24 packs matrices of 16- or 32-bit floats."
        )
    d_out, d_in = weight.shape
    if d_in % (GROUP * GROUPS_PER_BYTE):
        raise ValueError(f"{name} has d_in={d_in}, but sparse24 needs one that is divisible by 8.")
    bits = weight.contiguous().view(BITS[weight.element_size()]).view(d_out, d_in // GROUP, GROUP)
    non_zero = bits != 0  # (d_out, d_in / 4, 4)
    _check_groups(non_zero, name)
    pattern = (non_zero.to(torch.uint8) << torch.arange(GROUP, dtype=torch.uint8)).sum(-1)  # (d_out, d_in / 4) int64
    places = PLACES[pattern]  # (d_out, d_in / 4, 2)
    values = bits.gather(-1, places).view(d_out, d_in // 2).view(weight.dtype)
    nibbles = (places[..., 0] + GROUP * places[..., 1]).to(torch.uint8)  # (d_out, d_in / 4)
    return values, nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def _check_groups(non_zero: Tensor, name: str) -> None:
    """Refuse more than two of four. non_zero: (d_out, d_in / 4, 4) bool."""
    wrong = non_zero.sum(-1) > KEEP
    if wrong.any():
        row, group = (int(index) for index in wrong.nonzero()[0])
        raise ValueError(
            f"{name} is not 2:4: inputs {GROUP * group} to {GROUP * group + 3} of row {row} hold "
            f"{int(non_zero[row, group].sum())} weights, not {KEEP} or fewer. Prune with sparsity=2of4."
        )


def unpack(values: Tensor, metadata: Tensor) -> Tensor:
    """Undo `pack`, bit by bit.

    Args:
        values: (d_out, d_in / 2) float of 16 or 32 bits.
        metadata: (d_out, d_in / 8) uint8.
    Returns: (d_out, d_in) in the dtype of values.
    Raises: ValueError if they do not fit each other, or a nibble of metadata is none of the six.
    """
    if metadata.dtype != torch.uint8 or not values.is_floating_point() or values.element_size() not in BITS:
        raise ValueError(f"values are {values.dtype}, metadata {metadata.dtype}, not floats of 16 or 32 bits and uint8")
    d_out, num_bytes = metadata.shape if metadata.ndim == 2 else (0, 0)
    if metadata.ndim != 2 or values.shape != (d_out, KEEP * GROUPS_PER_BYTE * num_bytes):
        shapes = f"{tuple(values.shape)} and {tuple(metadata.shape)}"
        raise ValueError(f"the shapes of values and metadata, {shapes}, do not fit each other")
    num_groups = GROUPS_PER_BYTE * num_bytes
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).view(d_out, num_groups)
    if not torch.isin(nibbles, torch.tensor(NIBBLES, dtype=torch.uint8)).all():
        raise ValueError("metadata names places that no group of four can have")
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()  # (d_out, d_in / 4, 2)
    bits = values.contiguous().view(BITS[values.element_size()]).view(d_out, num_groups, KEEP)
    weight = torch.zeros(d_out, num_groups, GROUP, dtype=bits.dtype)
    return weight.scatter_(-1, places, bits).view(d_out, GROUP * num_groups).view(values.dtype)


@dataclass
class Sizes:
    """Bytes of the tensors, before and after: of the pruned linears, and of all other tensors, which stay the same."""

    linears_before: int = 0
    linears_after: int = 0
    others: int = 0

    @property
    def ratio(self) -> float:
        return self.linears_after / self.linears_before

    def __str__(self) -> str:
        before, after = self.linears_before + self.others, self.linears_after + self.others
        return (
            f"linears {_megabytes(self.linears_before)} -> {_megabytes(self.linears_after)} ({self.ratio:.4f}), "
            f"all weights {_megabytes(before)} -> {_megabytes(after)} ({after / before:.4f})"
        )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB"


def export_sparse24(
    checkpoint: Path, output: Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000
) -> Sizes:
    """Write a 2:4 checkpoint in compressed files, tensor by tensor, with at most one shard in memory.

    It is written to a hidden folder beside `output` and renamed at the end: `output` is whole or not there.

    Args:
        checkpoint: folder with config.json and safetensors files, plain or rotated.
        output: new or empty; with `overwrite` an export that stands there is replaced as a whole.
    Raises:
        ValueError: a projection of a decoder layer is missing or not 2:4, the checkpoint is damaged, or `output` cannot
            be written to, or is the checkpoint.
        RuntimeError: no room on the disk.
    """
    checkpoint, output = checkpoint.resolve(), output.resolve()
    if output == checkpoint or output in checkpoint.parents:
        raise ValueError(f"output={output} holds the checkpoint that is exported: give another folder.")
    check_output_folder(output, overwrite=overwrite, holds=INDEX_NAME)
    config = read_json(checkpoint / "config.json")
    linears = _pruned_linears(config, checkpoint)
    files = check_checkpoint(checkpoint)
    sizes = Sizes()
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    with new_folder(output) as partial:
        with write_errors(output):
            copy_files(checkpoint, partial, ("config.json", "modeling_rotated.py", "README.md", *COPIED_FILES))
            card = partial / "README.md"
            write_text(card, sparse24_card(card.read_text(encoding="utf-8") if card.is_file() else ""))
        tensors = _packed_tensors(files, linears, sizes)
        shards = write_shards(partial, tensors, "sparse24", header, output, max_shard_bytes=max_shard_bytes)
        packed = [name for name in linears if name + VALUES in shards.weight_map]
        if len(packed) < len(linears):
            missing = next(name for name in linears if name not in packed)
            raise ValueError(f"The checkpoint {checkpoint} is incomplete: {missing} is missing.")
        index = {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": shards.dtype}
        with write_errors(output):
            write_json(partial / INDEX_NAME, {**index, "packed": packed, "weight_map": shards.weight_map})
    return sizes


def _pruned_linears(config: dict[str, Any], folder: Path) -> list[str]:
    """Name the weights that pruning has gone through: every projection of every decoder layer."""
    spec = layer_spec(str(config.get("model_type", "")).removeprefix(MODEL_TYPE_PREFIX), folder)
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int):
        raise ValueError(f"{folder / 'config.json'} has no num_hidden_layers.")
    return [f"{LAYERS}.{index}.{name}.weight" for index in range(num_layers) for name in spec.linears]


def _packed_tensors(files: list[Path], linears: list[str], sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors, each pruned linear as its values and metadata; count their bytes in `sizes`."""
    to_pack = set(linears)
    for file in files:
        with open_shard(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - a safetensors file is no dict
                tensor = stored.get_tensor(name)
                if name not in to_pack:
                    sizes.others += tensor.nbytes
                    yield name, tensor
                    continue
                values, metadata = pack(tensor, name)
                sizes.linears_before += tensor.nbytes
                sizes.linears_after += values.nbytes + metadata.nbytes
                yield name + VALUES, values
                yield name + METADATA, metadata


def load_sparse24(folder: Path | str) -> PreTrainedModel:
    """Load an export: the model of the checkpoint it was made from, weights the same bit by bit, dense, in eval mode.

    Code that lies in the folder is never executed.

    Raises: ValueError if the export is incomplete, damaged, of a newer format, or does not fit its config.json.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ValueError(f"There is no {path}: give a folder that `drotator export format=sparse24` has written.")
    index = read_json(path)
    _check_format(index, path)
    try:
        packed, files = list(index["packed"]), {str(name): folder / file for name, file in index["weight_map"].items()}
        missing = [name + part for name in packed for part in (VALUES, METADATA) if name + part not in files]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it does not say which tensor is in which file.") from error
    if missing:
        raise ValueError(f"{path} is damaged: it names no file for {missing[0]}.")
    return model_with_weights(folder, _unpacked_tensors(packed, files))


def _check_format(found: dict[str, Any], path: Path) -> None:
    if found.get("format") != FORMAT or not str(found.get("format_version")).isdecimal():
        raise ValueError(f"{path} is not of the format {FORMAT}.")
    if int(found["format_version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {found['format_version']}, but this drotator reads up to {FORMAT_VERSION}: "
            "install a newer drotator."
        )


def _unpacked_tensors(packed: list[str], files: dict[str, Path]) -> dict[str, Tensor]:
    """Read all tensors by their names in the state dict. files: the file of each tensor as it is stored."""
    for path in sorted(set(files.values())):
        with open_shard(path) as stored:
            _check_format(stored.metadata() or {}, path)

    def read(name: str) -> Tensor:
        with open_shard(files[name]) as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor

    parts = {name + part for name in packed for part in (VALUES, METADATA)}
    weights = {name: read(name) for name in files if name not in parts}
    for name in packed:
        values, metadata = read(name + VALUES), read(name + METADATA)
        try:
            weights[name] = unpack(values, metadata)
        except ValueError as error:
            raise ValueError(f"{files[name + VALUES]} is damaged ({name}: {error}): export it again.") from error
    return weights
