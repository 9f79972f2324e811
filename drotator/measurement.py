"""How `drotator bench` measures: a call's median time, what the device does at its best, and a row for each result."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from drotator.architecture import ModelSource
from drotator.bounds import UNITS, Peaks, Work
from drotator.config import BenchConfig
from drotator.distributed import ALONE, World
from drotator.folders import write_text
from drotator.products import FLOAT8, multiplies_8_bits, product8
from drotator.resources import device_name, float32_products, peak_memory, reset_peak_memory

logger = logging.getLogger(__name__)

BUDGET_SECONDS = 0.7
MOST_REPEATS = 30
NONE = "none"


@dataclass(frozen=True)
class Timing:
    """milliseconds: the median. peak_bytes: of the device's allocations meanwhile, of the whole process on a CPU.

    working_bytes: what was allocated on the device beyond what was there before; 0 on a CPU.
    """

    milliseconds: float
    peak_bytes: int
    working_bytes: int = 0


@dataclass(kw_only=True)
class Row:
    """One result; bench.json is the list of them.

    bound_milliseconds: see bounds.py. paper_milliseconds: the paper's formulation of the same, in the same run.
    times: how much faster than the paper's formulation, or than what `compared` names.
    bound: the bound in words.
    """

    name: str
    model: str
    objective: str
    optimizer: str
    milliseconds: float
    bound_milliseconds: float
    paper_milliseconds: float | None
    peak_bytes: int
    gpus: int
    device: str
    dtype: str
    torch: str
    rate: str
    bound: str
    times: float | None = None
    compared: str = ""


@dataclass
class Bench:
    """What all measurements share, and what they have found so far.

    source: the model's shapes, without weights. peaks: of all processes together. notes: lines that the table is
    followed by. world: the processes that share what is measured; the first one's measurements are kept.
    """

    settings: BenchConfig
    source: ModelSource
    device: torch.device
    peaks: Peaks
    file: Path
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    world: World = ALONE

    def add(
        self,
        name: str,
        timing: Timing,
        work: Work,
        *,
        objective: str = NONE,
        optimizer: str = NONE,
        paper: float | None = None,
        faster_than: tuple[str, float] | None = None,
    ) -> Row:
        """Keep a result, and write all of them: a benchmark that is stopped leaves what it has measured.

        Args:
            paper: milliseconds of the paper's formulation.
            faster_than: what the result is compared with, and its milliseconds.
        """
        compared, other = faster_than or (("paper", paper) if paper is not None else ("", None))
        row = Row(
            name=name,
            model=self.settings.model.name,
            objective=objective,
            optimizer=optimizer,
            milliseconds=timing.milliseconds,
            bound_milliseconds=1e3 * work.seconds(self.peaks),
            paper_milliseconds=paper,
            peak_bytes=timing.peak_bytes,
            gpus=self.world.size if self.device.type == "cuda" else 0,
            device=device_name(self.device),
            dtype=self.source.dtype_name,
            torch=torch.__version__,
            rate=self._rate(work, timing.milliseconds / 1e3),
            bound=self._bound(work),
            times=None if other is None else other / timing.milliseconds,
            compared=compared,
        )
        self.rows.append(row)
        logger.info("%s: %s", name, duration(row.milliseconds))
        if self.world.is_first:
            write_text(self.file, json.dumps([asdict(row) for row in self.rows], indent=2) + "\n")
        return row

    def note(self, line: str) -> None:
        """Say something below the table."""
        self.notes.append(line)
        logger.info("%s", line, extra={"file_only": True})

    def _rate(self, work: Work, seconds: float) -> str:
        if work.is_computing(self.peaks):
            return f"{_scaled(work.operations / seconds)}FLOP/s"
        return f"{_scaled(work.bytes / seconds)}B/s"

    def _bound(self, work: Work) -> str:
        if not work.is_computing(self.peaks):
            return f"{_scaled(work.bytes)}B at {_scaled(self.peaks['bytes'])}B/s"
        used = {unit: getattr(work, unit) for unit in UNITS if getattr(work, unit)}
        return ", ".join(f"{_scaled(n)}FLOP at {_scaled(self.peaks[u])}FLOP/s ({UNITS[u]})" for u, n in used.items())


def _scaled(value: float) -> str:
    """1.23e12 -> '1.23 T': three digits and the prefix of the unit that follows."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value / 1e3:.3g} k"


def duration(milliseconds: float) -> str:
    """54 us, 4.9 ms, 12.3 s, 3.2 min, 1.5 h."""
    for factor, unit in ((3_600_000, "h"), (60_000, "min"), (1000, "s")):
        if milliseconds >= factor:
            return f"{in_digits(milliseconds / factor)} {unit}"
    return f"{in_digits(milliseconds)} ms" if milliseconds >= 0.1 else f"{in_digits(1000 * milliseconds)} us"


def in_digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done what the call asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_call(
    call: Callable[[], object], device: torch.device, *, warm_up: bool = True, world: World = ALONE
) -> Timing:
    """Call until BUDGET_SECONDS are spent, and return the median: by CUDA events on a GPU, by the clock on a CPU.

    Args:
        warm_up: call once before; what compiles nothing and takes seconds can do without.
        world: processes that make the call together, as often as the first one says.
    """
    if warm_up:
        call()
    reset_peak_memory(device)
    is_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if is_cuda else 0
    milliseconds: list[float] = []

    def goes_on() -> bool:
        return not milliseconds or (sum(milliseconds) < 1e3 * BUDGET_SECONDS and len(milliseconds) < MOST_REPEATS)

    while world.share(goes_on):
        milliseconds.append(_event_milliseconds(call, device) if is_cuda else 1e3 * wall_seconds(call, device))
    peak = peak_memory(device)["device" if is_cuda else "host"]
    return Timing(statistics.median(milliseconds), peak, peak - before if is_cuda else 0)


def _event_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def measure_peaks(device: torch.device) -> Peaks:
    """Measure a square product in each of UNITS, and a copy (bytes read and written), on random data.

    A CPU is asked for float32 alone: whatever it does in other formats is no aim.
    """
    is_cuda = device.type == "cuda"
    n = 8192 if is_cuda else 512
    A = torch.randn(n, n, device=device)
    peaks = {}
    with float32_products("highest"):
        peaks["float32"] = 2 * n**3 / _fastest(lambda: A @ A, device)
    with float32_products("high"):
        peaks["tf32"] = 2 * n**3 / _fastest(lambda: A @ A, device) if is_cuda else peaks["float32"]
    B = A.bfloat16()
    peaks["bfloat16"] = 2 * n**3 / _fastest(lambda: B @ B, device) if is_cuda else peaks["float32"]
    peaks["float8"] = peaks["bfloat16"]
    if is_cuda and multiplies_8_bits(device):
        C = A.to(FLOAT8)
        peaks["float8"] = 2 * n**3 / _fastest(lambda: product8(C, C), device)
    long = torch.randn(2**27 if is_cuda else 2**23, device=device)
    target = torch.empty_like(long)
    peaks["bytes"] = 2 * long.nbytes / _fastest(lambda: target.copy_(long), device)
    return peaks


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the median call."""
    return time_call(call, device).milliseconds / 1e3
