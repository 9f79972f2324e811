"""Where the activations of the calibration set wait for their turn: on the device, in host memory or in files.

A batch is never changed, only replaced: copies of a list of batches share them, wherever they are.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LEVELS = ("device", "host", "disk")
"""From the fastest to the one that takes the least memory."""


@dataclass(frozen=True)
class Offload:
    """level: one of LEVELS. folder: the files' own; disk needs it."""

    level: str = "device"
    folder: Path | None = None

    def clear(self) -> None:
        """Remove the files' folder; a run that was killed may have left it, at whatever level this one is."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


ON_DEVICE = Offload()


class Batches(Sequence[Tensor]):
    """Batches of activations, (b, T, n): given and taken on the device, kept where `offload` says."""

    def __init__(self, device: torch.device, offload: Offload = ON_DEVICE, batches: Iterable[Tensor] = ()) -> None:
        self.device, self.offload = device, offload
        self.kept: list[Tensor | _File] = []
        for batch in batches:
            self.append(batch)

    def append(self, batch: Tensor) -> None:
        self.kept.append(self._keep(batch))

    def copy(self) -> Batches:
        other = self.empty()
        other.kept = list(self.kept)
        return other

    def empty(self) -> Batches:
        """No batches yet, to be kept in the same place."""
        return Batches(self.device, self.offload)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, position: int) -> Tensor:  # type: ignore[override]
        kept = self.kept[position]
        return kept.load(self.device) if isinstance(kept, _File) else kept.to(self.device, non_blocking=True)

    def __setitem__(self, position: int, batch: Tensor) -> None:
        self.kept[position] = self._keep(batch)

    def _keep(self, batch: Tensor) -> Tensor | _File:
        if self.offload.level == "disk":
            assert self.offload.folder is not None
            return _File(batch, self.offload.folder)
        if self.offload.level == "host" and batch.is_cuda:
            # Pinned, the device copies by itself, in the order of its work: nothing here waits for it.
            host = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
            return host.copy_(batch, non_blocking=True)
        return batch


class _File:
    """A batch in a file that is removed when the last list that holds it has let it go."""

    def __init__(self, batch: Tensor, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle, self.name = tempfile.mkstemp(suffix=".safetensors", dir=folder)
        os.close(handle)
        weakref.finalize(self, _remove, self.name)
        save_file({"batch": batch.contiguous().cpu()}, self.name)

    def load(self, device: torch.device) -> Tensor:
        return load_file(self.name, str(device))["batch"]


def _remove(name: str) -> None:
    Path(name).unlink(missing_ok=True)
