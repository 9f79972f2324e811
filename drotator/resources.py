"""The machine: device, memory and disk, checked before a run and measured after it."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from drotator.distributed import ALONE, World


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """Return the device of `auto`, `cpu`, `cuda` or `cuda:N`; each process of a world gets a GPU of its own.

    Raises: ValueError where there is no such device.
    """
    if name == "auto":
        return own_gpu(torch.device("cuda"), world) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name} is not allowed: choose auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name} is not allowed: choose auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA GPUs. Use device=cpu.")
    return own_gpu(device, world) if device.type == "cuda" else device


def own_gpu(device: torch.device, world: World) -> torch.device:
    """Of several processes, give each the GPU of its rank on this machine, and make it the current one.

    Where the scheduler shows each process a single GPU, that is its own.
    """
    if world.size == 1:
        return device
    count = torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(f"device={device}: each of the {world.size} processes takes its own GPU. Use device=cuda.")
    if world.local_rank >= count > 1:
        raise ValueError(f"this machine has {count} GPUs, and process {world.local_rank + 1} on it finds none left.")
    own = torch.device("cuda", world.local_rank if count > 1 else 0)
    torch.cuda.set_device(own)
    return own


def device_name(device: torch.device) -> str:
    """What the device is called: the GPU's product name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raises: ValueError if the disk of `folder` has less room than needed."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"{folder}: the run needs about {needed_bytes / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free."
        )


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has, or the machine for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device) -> int:
    """Bytes of memory that can still be taken: of the GPU, or of the machine within the job's control group."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_memory(), _left_to_the_job())


def _available_memory() -> int:
    """What the system can give without swapping, caches of files counted in; all there is where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return memory_of(torch.device("cpu"))


def _left_to_the_job(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the limits of the control groups (version 2) leave, as SLURM and containers set them."""
    left = sys.maxsize
    try:
        path = next(line[4:] for line in own.read_text().splitlines() if line.startswith("0::/"))
        for folder in (root / path, *(root / path).parents):
            if not (folder / "memory.max").is_file() or (limit := (folder / "memory.max").read_text().strip()) == "max":
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(stat["file"])
            left = min(left, int(limit) - used)
    except (OSError, StopIteration, KeyError, ValueError):
        pass
    return left


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of the process on the host, and of torch's allocations on the GPU since the last reset."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Let float32 products on a GPU be exact ("highest") or TF32 on its tensor cores ("high").

    Layers and models run with "high": bfloat16 models round more than that. Moments, rotations and pruners are exact.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of matrices or batches of them, summed in float32, or in float64 for such matrices."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        multiply = torch.mm if a.ndim == 2 else torch.bmm
        return multiply(a.mT, b, out_dtype=torch.float32)  # torch.addmm: some versions want a 16-bit sum
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype).mT @ b.to(dtype)


@dataclass
class Stopwatch:
    """Seconds spent by stage. Waits for the device, so that a stage pays for its own work."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
