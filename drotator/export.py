"""From the files of a run folder to a checkpoint: every tensor by name, one layer in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from drotator.architecture import EMBEDDING, FINAL_NORM, HEAD, LAYERS, ModelSource
from drotator.artifacts import RunFolder
from drotator.checkpoint import write_checkpoint
from drotator.config import RotationConfig
from drotator.rotation import boundary_weight

logger = logging.getLogger(__name__)

ROWS = 16384
"""Rows of the embeddings that are float64 at a time."""
CPU = torch.device("cpu")


def export_checkpoint(
    rotation: RotationConfig,
    run: RunFolder,
    source: ModelSource,
    metadata: dict[str, object],
    device: torch.device = CPU,
) -> None:
    """Write run/checkpoint. A plain model of its family, unless R1 changes between layers: then with boundaries.

    Args:
        device: where products are made, float64.
    """
    logger.info("writing %s", run.checkpoint)
    write_checkpoint(
        run.checkpoint,
        model_folder=source.folder,
        tensors=checkpoint_tensors(rotation, run, source, device),
        boundaries=rotation.boundaries(source.num_layers),
        untie=rotation.name != "none" and source.is_tied,
        metadata=metadata,
        overwrite=True,
    )


def merged_rotation(rotation: str, run: RunFolder, index: int, device: torch.device) -> Tensor | None:
    """The R1 that stands in a finished layer, (d, d) float64, or None without rotation."""
    if rotation == "none":
        return None
    return run.load_rotation(index).rotation.to(device).polished().R1


def checkpoint_tensors(
    rotation: RotationConfig, run: RunFolder, source: ModelSource, device: torch.device = CPU
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the pruned checkpoint by its name, on the CPU, one layer in memory at a time.

    A boundary stands where R1 changes between two layers; with any rotation the first R1 is absorbed in the embeddings,
    the last one and the gain of the final norm in the head. Products are float64 and on `device`, rounded once.
    """
    is_rotated, boundaries = rotation.name != "none", rotation.boundaries(source.num_layers)
    norm, embedding = source.tensor(f"{FINAL_NORM}.weight"), source.tensor(f"{EMBEDDING}.weight")
    R1 = merged_rotation(rotation.name, run, 0, device)
    yield f"{EMBEDDING}.weight", embedding if R1 is None else rotated_rows(embedding, R1, torch.ones_like(norm))
    for index in range(source.num_layers):
        state, _ = run.load_layer(index)
        for name, tensor in state.items():
            yield f"{LAYERS}.{index}.{name}", tensor
        if index in boundaries:
            R1_next = merged_rotation(rotation.name, run, index + 1, device)
            assert R1 is not None
            assert R1_next is not None
            yield f"{LAYERS}.{index}.boundary.weight", boundary_weight(R1, R1_next).to(source.dtype).cpu()
            R1 = R1_next
    yield f"{FINAL_NORM}.weight", torch.ones_like(norm) if is_rotated else norm
    if R1 is not None:
        yield f"{HEAD}.weight", rotated_rows(source.head_weight(), R1, norm)
    elif not source.is_tied:
        yield f"{HEAD}.weight", source.head_weight()


def rotated_rows(W: Tensor, R: Tensor, gain: Tensor) -> Tensor:
    """W gain R in the dtype of W, products float64 on R's device. W: (vocab_size, d); R: (d, d) float64; gain: (d,)."""
    gain = gain.to(R)
    return torch.cat([((rows.to(R) * gain) @ R).to(W.dtype).cpu() for rows in W.split(ROWS)])
