"""`drotator report`: one table and one plot over many runs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from drotator.config import PERPLEXITY_SETS, PRUNERS, ROTATIONS
from drotator.console import console
from drotator.folders import write_text
from drotator.plots import plot_comparison
from drotator.report import load_report, markdown_list, markdown_table, without_nan
from drotator.results import Metrics, RunReport
from drotator.summary import (
    EVALUATION,
    NAMES,
    SETTINGS,
    UNUSED,
    column_name,
    format_metric,
    format_value,
    place_in,
    run_settings,
    say,
)

MAX_TEXT_WIDTH = 22
COMPARED = (*PERPLEXITY_SETS, "zero_shot_mean")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Many runs as a table: what all share in words, then header and body (a line for the dense model above its runs).

    num_left: columns of text at the left. usual: what a setting is in most runs, by the names in which they differ.
    labels: one name for each run, for the plot.
    """

    shared: list[str]
    header: list[str]
    num_left: int
    body: list[list[str]]
    usual: dict[str, str]
    labels: list[str]


def report_command(paths: list[Path], output: Path | None) -> None:
    """Print one table over all runs found under `paths`; with `output` (.md, .csv or .json) write it, and a plot.

    Runs that are not finished, or whose report.json is damaged, are named below the table.
    Raises: ValueError if a path is not there, if nothing is found, or if output has another ending.
    """
    if output is not None and output.suffix not in (".md", ".csv", ".json"):
        raise ValueError(f"--output {output} ends in '{output.suffix}': choose from .md, .csv, .json.")
    finished, unfinished = _find_runs(paths)
    runs: list[tuple[Path, RunReport]] = []
    damaged: list[tuple[Path, str]] = []
    for run in finished:
        try:
            runs.append((run, load_report(run)))
        except ValueError as error:
            damaged.append((run, str(error)))
    if not runs and not unfinished:
        where = ", ".join(map(str, paths))
        raise ValueError(damaged[0][1] if damaged else f"No run under {where}: no report.json, no layers folder.")
    runs.sort(key=lambda item: _order(item[1]))
    comparison = _compare([report for _, report in runs])
    listing = [f"{i}: {run}" for i, (run, _) in enumerate(runs, start=1)]
    others = [f"unfinished, {count} layers done: {run} (go on with resume={run})" for run, count in unfinished]
    others += [message for _, message in damaged]
    shown = listing
    if runs:
        table, left_out = _fitting_table(comparison)
        usual, notes = _told_beside(comparison, left_out)
        for text in [*comparison.shared, *usual]:
            say(text)
        console().print(table)
        shown = [f"{text}{note}" for text, note in zip(listing, notes, strict=True)]
    for text in shown + others:
        say(text, is_wrapped=False)
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [_row(run, report) for run, report in runs]
    rows += [{"run": str(run), "status": "unfinished", "layers_done": count} for run, count in unfinished]
    rows += [{"run": str(run), "status": "damaged"} for run, _ in damaged]
    plot = output.with_suffix(".png")
    figure = plot_comparison(
        plot,
        comparison.labels,
        [column_name(report) for _, report in runs],
        [report.final for _, report in runs],
        [report.metrics.get("dense", {}) for _, report in runs],
    )
    if output.suffix == ".csv":
        write_text(output, _csv(rows))
    elif output.suffix == ".json":
        write_text(output, json.dumps(without_nan(rows, "", []), indent=2, allow_nan=False, default=str) + "\n")
    else:
        parts = ["# Comparison of runs", *comparison.shared]
        parts += [markdown_table(comparison.header, comparison.body, num_left=comparison.num_left)] if runs else []
        parts += [markdown_list(listing + others), *([f"![Comparison of the runs]({plot.name})"] if figure else [])]
        write_text(output, "\n\n".join(parts) + "\n")


def _find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, int]]]:
    """Return the folders (or files) that hold a report, and unfinished runs with their number of finished layers."""
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, tuple[Path, int]] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there: give run folders, multirun folders or parents of them.")
        if path.is_file():
            finished.setdefault((path.parent if path.name == "report.json" else path).resolve(), path)
            continue
        for found in sorted(path.rglob("report.json")):
            finished.setdefault(found.parent.resolve(), found.parent)
        for folder in sorted(path.rglob("layers")):
            run = folder.parent
            if folder.is_dir() and not (run / "report.json").exists():
                done = sum(layer.stem.isdigit() for layer in folder.glob("*.safetensors"))
                unfinished.setdefault(run.resolve(), (run, done))
    return list(finished.values()), list(unfinished.values())


def _order(report: RunReport) -> tuple[object, ...]:
    """Sort by model, sparsity (unstructured before grouped), pruner and rotation, plain before rotated."""
    how = report.objective, report.optimizer, report.seed
    places = place_in(report.pruner, PRUNERS), place_in(report.rotation, ("none", *ROTATIONS))
    return report.model, _fraction(report.sparsity), "of" in report.sparsity, report.sparsity, *places, *how


def _fraction(sparsity: str) -> float:
    """Return the part of the weights that a sparsity's name removes: 50 -> 0.5, 2of4 -> 0.5; 0 for other names."""
    if match := re.fullmatch(r"(\d+)of(\d+)", sparsity):
        return 1 - int(match[1]) / int(match[2])
    return float(sparsity) / 100 if re.fullmatch(r"\d+(\.\d+)?", sparsity) else 0.0


def _compare(reports: Sequence[RunReport]) -> Comparison:
    settings = [{name: format_value(value) for name, value in run_settings(report).items()} for report in reports]
    found = {name: {line[name] for line in settings} for name in SETTINGS}
    for name in ("objective", "optimizer", "steps"):  # unused without rotation, where they set nothing apart
        found[name].discard(UNUSED)
    varying = [name for name in SETTINGS if len(found[name]) > 1]
    silent = {"unknown", UNUSED}
    same = [f"{name} {value}" for name, values in found.items() if len(values) == 1 for value in values - silent]
    shared = [f"All runs: {'; '.join(same)}.", "Perplexity: lower is better. Zero-shot mean in %: higher is better."]
    if differing := [name for name in EVALUATION if name in varying]:
        shared.append(f"The runs differ in {', '.join(differing)}: do not compare their metrics.")
    usual = {name: _most_frequent(line[name] for line in settings) for name in varying} | {"also": UNUSED}
    metrics = [key for key in COMPARED if any(key in part for report in reports for part in report.metrics.values())]
    body: list[list[str]] = []
    last_dense: list[str] = []
    for i, (report, line) in enumerate(zip(reports, settings, strict=True), start=1):
        parts = report.metrics.get("dense", {}), report.final
        dense, pruned = ([_cell(part, key) for key in metrics] for part in parts)
        dense = [line[name] if name in ("model", *EVALUATION) else UNUSED for name in varying] + dense
        if dense != last_dense:
            body.append(["dense", *dense, UNUSED])
            last_dense = dense
        body.append([str(i), *(line[name] for name in varying), *pruned, f"{_minutes(report):.1f}"])
    return Comparison(
        shared=shared,
        header=["run", *varying, *("zero-shot" if key == "zero_shot_mean" else key for key in metrics), "min"],
        num_left=1 + len(varying),
        body=body,
        usual=usual,
        labels=[_label(i, line, varying, usual) for i, line in enumerate(settings, start=1)],
    )


def _most_frequent(values: Iterable[str]) -> str:
    return Counter(value for value in values if value != UNUSED).most_common(1)[0][0]


def _label(number: int, line: Mapping[str, str], varying: Sequence[str], usual: Mapping[str, str]) -> str:
    """Name a run by model, pruner, sparsity and rotation, and by what is unusual about it."""
    first = [name for name in NAMES[:4] if name in varying or name != "model"]
    others = [name for name in varying if name not in first and line[name] not in (usual[name], UNUSED)]
    words = [line[name] if name in (*NAMES, "also") else f"{name}={line[name]}" for name in first + others]
    return f"{number}: {' '.join(words)}"


def _fitting_table(comparison: Comparison) -> tuple[Table, list[str]]:
    """Lay out the columns of settings that the console has room for; return the names of those that it has not."""
    kept, left_out = ["run"], list[str]()
    endless = console().options.update(max_width=sys.maxsize)
    for name in comparison.header[1 : comparison.num_left]:
        fits = console().measure(_table(comparison, [*kept, name]), options=endless).maximum <= console().width
        (kept if fits else left_out).append(name)
    return _table(comparison, kept), left_out


def _table(comparison: Comparison, kept: Sequence[str]) -> Table:
    places = [i for i, name in enumerate(comparison.header) if i >= comparison.num_left or name in kept]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i in places:
        is_text = i < comparison.num_left
        table.add_column(
            comparison.header[i],
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=not is_text,
            max_width=MAX_TEXT_WIDTH if is_text else None,
        )
    last_dense: list[str] = []
    for line in comparison.body:
        cells = [line[i] for i in places]
        if line[0] == "dense" and cells == last_dense:  # what sets it apart has no column
            continue
        last_dense = cells if line[0] == "dense" else last_dense
        table.add_row(*map(Text, cells), style="dim" if line[0] == "dense" else "")
    return table


def _told_beside(comparison: Comparison, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Say in a line what settings without a column usually are, and for every run in which it differs from that."""
    usual = comparison.usual
    said = "; ".join(f"{name} {usual[name]}" for name in names if usual[name] != UNUSED)
    notes = []
    for line in comparison.body:
        if line[0] == "dense":
            continue
        run = dict(zip(comparison.header, line, strict=True))
        differing = [name for name in names if run[name] not in (usual[name], UNUSED)]
        note = "; ".join(run[name] if name == "also" else f"{name} {run[name]}" for name in differing)
        notes.append(f" ({note})" if note else "")
    return [f"Unless it is said beside a run's folder: {said}."] if said else [], notes


def _cell(metrics: Metrics, key: str) -> str:
    return format_metric(metrics[key]) if key in metrics else UNUSED


def _minutes(report: RunReport) -> float:
    return report.seconds.get("total", math.nan) / 60


def _row(run: Path, report: RunReport) -> dict[str, object]:
    row: dict[str, object] = {"run": str(run), "status": "finished", **run_settings(report)}
    row |= report.final
    row |= {f"dense_{key}": value for key, value in report.metrics.get("dense", {}).items()}
    return row | {"sparsity_realised": report.sparsity_realised, "minutes": _minutes(report)}


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    stream = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: format_value(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()
