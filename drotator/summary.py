"""Say what a run reached: metrics of the dense, plain and rotated model side by side, and the facts in words.

The columns are dense (the model as it was), plain (pruned without rotation), rotated (rotated, then pruned), and
recovered (one of these, fine-tuned after pruning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from drotator.config import (
    PERPLEXITY_SETS,
    ObjectiveConfig,
    OptimizerConfig,
    PrunerConfig,
    ReconstructConfig,
    RotationConfig,
)
from drotator.console import clock, console
from drotator.plots import METRIC_NAMES
from drotator.results import DETAILS, Metrics, RunReport

NAMES = ("model", "pruner", "sparsity", "rotation", "objective", "optimizer")
EVALUATION = ("seqlen", "windows", "tasks_limit", "batch_size")
# Of the provenance, what must be equal before plain and rotated may be compared.
CONDITIONS = ("dataset", "calibration_samples", "calibration_seqlen", "calibration_seed", "dtype", *EVALUATION)
SETTINGS = (*NAMES, "steps", "also", "seed", *CONDITIONS)
UNUSED = "-"
MAX_WARNINGS = 10


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric over the columns: texts to show, which pruned value is the best, percent of the gap closed or nan."""

    label: str
    is_perplexity: bool
    texts: list[str]
    best: list[bool]
    gap_closed: float


def gap_closed(dense: float, plain: float, rotated: float, *, lower_is_better: bool) -> float:
    """Return how much of what plain pruning costs the rotation wins back, in percent; below 0 where it costs more.

    nan where a value is not finite, or where plain pruning costs less than 1% of the dense value, so that the quotient
    would be noise.
    """
    cost = plain - dense if lower_is_better else dense - plain
    won = plain - rotated if lower_is_better else rotated - plain
    return 100 * won / cost if math.isfinite(won) and math.isfinite(cost) and cost >= 0.01 * dense > 0 else math.nan


def summary_table(columns: Mapping[str, Metrics], *, title: str = "") -> Table:
    """Lay out metrics as rows and models as columns (dense, plain, rotated, whatever is given), in 80 characters.

    The best pruned value of a row is bold and starred. With dense, plain and rotated, a last column says which part of
    the gap the rotation closes.
    """
    rows = metric_rows(columns)
    with_gap = {"dense", "plain", "rotated"} <= set(columns)
    has_best = any(any(row.best) for row in rows)
    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        caption="* best pruned value" if has_best else None, caption_justify="left",
    )  # fmt: skip
    table.add_column("metric", overflow="fold")
    for name in (*columns, *(["gap closed"] if with_gap else [])):
        table.add_column(name, justify="right", overflow="fold")
    for is_perplexity, heading in ((True, "perplexity, lower is better"), (False, "accuracy in %, higher is better")):
        group = [row for row in rows if row.is_perplexity == is_perplexity]
        if group:
            table.add_row(Text(heading, style="italic"))
        for row in group:
            cells = [Text("  " + row.label)]
            for text, best in zip(row.texts, row.best, strict=True):
                cells.append(Text(f"* {text}", style="bold green") if best else Text(text))
            table.add_row(*cells, *([Text(percent(row.gap_closed))] if with_gap else []))
    return table


def print_summary(report: RunReport, baseline: RunReport | None = None) -> None:
    """Print what the run reached on standard output: the table, what it buys, time, memory and warnings."""
    columns = columns_of(report, baseline)
    say(headline(report), style="bold")
    if any(columns.values()):
        console().print(summary_table(columns))
    else:
        say("Nothing was evaluated (eval=none).")
    for line in (what_it_buys(report)[0], *sampling_error(report)):
        say(line)
    memory = ", ".join(f"{place} {gib(size)}" for place, size in report.peak_memory_bytes.items() if size)
    say(f"Time {duration(report.seconds.get('total'))}; peak memory {memory or 'not measured'}.")
    warnings = mismatches(report, baseline) + warnings_of(report)
    if len(warnings) > MAX_WARNINGS:
        warnings[MAX_WARNINGS:] = [f"{len(warnings) - MAX_WARNINGS} more in report.md"]
    for warning in warnings:
        say(f"warning: {warning}", style="yellow")


def say(text: str, style: str = "", *, is_wrapped: bool = True) -> None:
    """Print one line as it is: no markup, no colours but `style`."""
    console().print(Text(text, style=style), soft_wrap=not is_wrapped)


def headline(report: RunReport) -> str:
    how = f" ({report.objective}, {report.optimizer})" if report.rotation != "none" else ""
    after = ", recovered" if "recovered" in report.metrics else ""
    return f"{report.model}, {report.pruner} {report.sparsity}, rotation {report.rotation}{how}{after}"


def column_name(report: RunReport) -> str:
    return "plain" if report.rotation == "none" else "rotated"


def columns_of(report: RunReport, baseline: RunReport | None) -> dict[str, Metrics]:
    columns = {"dense": report.metrics.get("dense", {})}
    if baseline is not None:
        columns["plain"] = baseline.metrics.get("pruned", {})
    columns[column_name(report)] = report.metrics.get("pruned", {})
    if "recovered" in report.metrics:
        columns["recovered"] = report.metrics["recovered"]
    return columns


def run_settings(report: RunReport) -> dict[str, object]:
    """Return what tells one run from another; without rotation, what trains it is unused."""
    settings: dict[str, object] = {name: getattr(report, name) for name in (*NAMES, "seed")}
    settings |= {name: report.provenance.get(name, "unknown") for name in ("steps", *CONDITIONS)}
    settings["also"] = ", ".join(unusual_details(report)) or UNUSED
    if report.rotation == "none":
        settings |= dict.fromkeys(("objective", "optimizer", "steps"), UNUSED)
    return {name: settings[name] for name in SETTINGS}


def unusual_details(report: RunReport) -> list[str]:
    """Settings beside the options' names that are not at their defaults and did something, as name=value."""
    defaults = {
        "objective": ObjectiveConfig(),
        "optimizer": OptimizerConfig(),
        "rotation": RotationConfig(),
        "pruner": PrunerConfig(),
        "reconstruct": ReconstructConfig(),
    }
    unused = {"objective", "optimizer", "rotation"} if report.rotation == "none" else set()
    if report.provenance.get("reconstruct.name", "none") == "none":
        unused.add("reconstruct")
    found = []
    for name in DETAILS:
        group, _, leaf = name.partition(".")
        value = report.provenance.get(name, getattr(defaults[group], leaf))
        if group not in unused and value != getattr(defaults[group], leaf):
            found.append(f"{group if leaf == 'name' else leaf}={value}")
    return [*found, "recovered"] if "recovered" in report.metrics else found


def metric_rows(columns: Mapping[str, Metrics]) -> list[MetricRow]:
    rows: dict[str, MetricRow] = {}
    for key in sorted(dict.fromkeys(key for metrics in columns.values() for key in metrics), key=_rank):
        task = key.removesuffix("_acc")
        label = METRIC_NAMES.get(key, key if key == task else METRIC_NAMES.get(task, task).split()[0] + " acc")
        if label in rows:  # winogrande_acc repeats winogrande, whose main accuracy is acc.
            continue
        is_perplexity = key in PERPLEXITY_SETS
        values = {name: metrics[key] for name, metrics in columns.items() if key in metrics}
        pruned = [value for name, value in values.items() if name != "dense" and math.isfinite(value)]
        best = (min if is_perplexity else max)(pruned) if len(set(pruned)) > 1 else None
        # The gap in the accuracy of a single task is of the size of its sampling error.
        has_gap = is_perplexity or key == "zero_shot_mean"
        compared = [values.get(name, math.nan) if has_gap else math.nan for name in ("dense", "plain", "rotated")]
        rows[label] = MetricRow(
            label=label,
            is_perplexity=is_perplexity,
            texts=[format_metric(values[name]) if name in values else UNUSED for name in columns],
            best=[name != "dense" and best is not None and values.get(name) == best for name in columns],
            gap_closed=gap_closed(*compared, lower_is_better=is_perplexity),
        )
    return list(rows.values())


def format_metric(value: float) -> str:
    return f"{value:.2f}" if not abs(value) >= 1000 else f"{value:.0f}" if abs(value) < 1e6 else f"{value:.2e}"


def format_value(value: object) -> str:
    """Write a setting or a provenance value in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={format_value(item)}" for key, item in value.items())
    return ", ".join(map(format_value, value)) if isinstance(value, list | tuple) else str(value)


def place_in(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def percent(value: float) -> str:
    return f"{value:.1f}%" if math.isfinite(value) else UNUSED


def duration(seconds: float | None) -> str:
    return "unknown" if seconds is None or not math.isfinite(seconds) else clock(seconds)


def gib(size: int | None) -> str:
    return f"{size / 2**30:.2f} GiB" if size else UNUSED


def what_it_buys(report: RunReport) -> list[str]:
    zeros = f"Dense file, {100 * report.sparsity_realised:.2f}% zeros in the pruned linears"
    if report.pruner == "none" or not report.sparsity_realised:
        return [f"{zeros}: nothing was pruned."]
    if "of" not in report.sparsity:
        speed = "unstructured: no speed-up on GPUs."
    elif report.sparsity == "2of4":
        speed = "2:4 needs semi-structured kernels."
    else:
        speed = "no speed-up: sparse tensor cores take 2:4 only."
    facts = [f"{zeros}; {speed}", "Zeros are stored like other numbers, so the file is not smaller than the dense one."]
    if report.sparsity == "2of4":
        facts.append(
            "The kernels (torch.sparse.to_sparse_semi_structured) need a GPU with sparse tensor cores and 16-bit or "
            "int8 weights, and a few tokens at a time can run slower than dense. Nothing was timed here."
        )
    if report.rotation == "per_layer":
        facts.append(
            "rotation=per_layer leaves one dense hidden_size x hidden_size matrix between layers, which costs time and "
            "space; rotation=shared leaves none."
        )
    return facts


def sampling_error(report: RunReport) -> list[str]:
    """Say how far accuracies of a part of the questions can be trusted; the worst case, an accuracy of 50%."""
    limit = report.provenance.get("tasks_limit")
    if not isinstance(limit, int) or limit <= 0 or "zero_shot_mean" not in report.final:
        return []
    return [f"Accuracies are of {limit} questions a task, with a standard error of {50 / math.sqrt(limit):.0f} points."]


def warnings_of(report: RunReport) -> list[str]:
    return [f"layer {layer.index}: {text}" for layer in report.layers for text in layer.warnings]


def mismatches(report: RunReport, baseline: RunReport | None) -> list[str]:
    """Say in which conditions the plain run differs, apart from the rotation."""
    if baseline is None:
        return []
    ours, theirs = run_settings(report), run_settings(baseline)
    return [
        f"plain and rotated are not comparable: {name} is {format_value(theirs[name])} and {format_value(ours[name])}"
        for name in ("model", "pruner", "sparsity", "seed", *CONDITIONS)
        if ours[name] != theirs[name]
    ]


def _rank(key: str) -> int:
    """Order metrics: perplexities, main accuracies, their mean, plain accuracies."""
    if key in PERPLEXITY_SETS:
        return PERPLEXITY_SETS.index(key)
    return 100 + (2 if key.endswith("_acc") else key == "zero_shot_mean")
