"""`drotator bench`: what every part costs at a model's real shapes, beside what the device could do at its best."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from drotator.benchmark_inference import check_inference, run_inference
from drotator.benchmark_pruning import check_pruning, run_pruning
from drotator.bounds import UNITS, Peaks
from drotator.config import BenchConfig
from drotator.console import console
from drotator.distributed import World
from drotator.measurement import Bench, Row, duration, in_digits, measure_peaks
from drotator.resources import choose_device, device_name
from drotator.shapes import shapes_of

logger = logging.getLogger(__name__)

CHECKS: dict[str, Callable[[Bench], None]] = {"pruning": check_pruning, "inference": check_inference}
KINDS: dict[str, Callable[[Bench, Path], None]] = {"pruning": run_pruning, "inference": run_inference}
WIDTH = 80


def run_bench(settings: BenchConfig, run_dir: Path) -> float:
    """Measure what `settings.kind` names, print its table and write bench.json to the run folder.

    Processes that torch.distributed has joined all call this, and share what is measured.

    Returns: milliseconds of the first row.
    Raises: ValueError for shapes that are not known or do not fit the settings, before anything is measured.
    """
    world = World.current()
    device = choose_device(settings.device, world)
    torch.manual_seed(settings.seed)
    bench = Bench(settings, shapes_of(settings.model), device, {}, run_dir / "bench.json", world=world)
    CHECKS[settings.kind](bench)
    run_dir.mkdir(parents=True, exist_ok=True)
    peaks = measure_peaks(device)
    bench.peaks = {unit: world.size * rate for unit, rate in peaks.items()}
    KINDS[settings.kind](bench, run_dir)
    machine = f"{world.size} x {device_name(device)}" if world.size > 1 else device_name(device)
    title = f"{settings.model.name}, {settings.kind}, {bench.source.dtype_name}, {machine}"
    console().print(table(bench.rows, title), width=WIDTH)
    for line in (peaks_in_words(peaks, device, world), *bench.notes):
        console().print(line, width=WIDTH)
    logger.info("written to %s", bench.file)
    return bench.rows[0].milliseconds


def peaks_in_words(peaks: Peaks, device: torch.device, world: World) -> str:
    """What the bounds were counted with."""
    each = f" in each of {world.size} processes" if world.size > 1 else ""
    rates = [f"{peaks[unit] / 1e12:.3g} TFLOP/s in {UNITS[unit]}" for unit in UNITS]
    shown = rates if device.type == "cuda" else rates[-1:]
    return f"Bounds: counted work at {', '.join(shown)} and {peaks['bytes'] / 1e9:.4g} GB/s, measured here{each}."


def table(rows: list[Row], title: str) -> Table:
    shown = Table(title=title, box=None, padding=(0, 1, 0, 0), width=WIDTH)
    shown.add_column("", overflow="fold", ratio=1)
    for heading in ("time", "rate", "bound", "x bound", "GiB", "faster"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.name,
            duration(row.milliseconds),
            row.rate.replace("FLOP/s", "F/s"),
            duration(row.bound_milliseconds),
            in_digits(row.milliseconds / row.bound_milliseconds),
            f"{row.peak_bytes / 2**30:.2f}",
            "" if row.times is None else f"{in_digits(row.times)}x",
        )
    return shown
