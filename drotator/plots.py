"""Draw what a run did: objective, importance, perplexity and errors, as PNG files.

Figures are built without pyplot, so that nothing is kept between calls and no display is needed. Every function writes
its file whole (temporary name, then rename) and returns the Figure. Where there is nothing to draw (no perplexity was
measured, no step was made) it writes no file, says so in the log and returns None: a run must not end for that.
Colours are those of Okabe and Ito, which colour-blind readers tell apart.

W: (d_out, d_in); importance: same shape, >= 0 (README, "Objectives").
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from drotator.config import PERPLEXITY_SETS
from drotator.results import LayerResult, Metrics, RunReport

if TYPE_CHECKING:
    from drotator.importance import ImportanceSummary

logger = logging.getLogger(__name__)

DPI = 150
COLOURS = {"dense": "#999999", "plain": "#E69F00", "rotated": "#0072B2"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#D55E00")
DEPTH_COLOURS = "viridis"
IMPORTANCE_COLOURS = "magma"
METRIC_NAMES = {
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "passages": "Wikipedia passages",
    "piqa": "PIQA acc_norm",
    "winogrande": "WinoGrande acc",
    "hellaswag": "HellaSwag acc_norm",
    "arc_easy": "ARC-Easy acc_norm",
    "arc_challenge": "ARC-Challenge acc_norm",
    "zero_shot_mean": "zero-shot mean",
}
# Linears that share their input, in the order in which a layer is pruned.
LINEAR_GROUPS = {
    "q_proj, k_proj, v_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_proj, up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
LOG_RATIO = 8.0  # Bars whose largest value is more than this times the smallest get a log axis.
NUM_DEPTHS = 5


def plot_objective(path: Path, layers: Sequence[LayerResult]) -> Figure | None:
    """Draw the objective over the steps for about five layers spread over the depth, each divided by its start."""
    trained = [
        layer
        for layer in layers
        if len(layer.objective_history) > 1 and math.isfinite(layer.objective_history[0]) and layer.objective_history[0]
    ]
    if not trained:
        _skip(path, "no layer has an objective history that starts at a finite value other than 0")
        return None
    count = min(NUM_DEPTHS, len(trained))
    chosen = [trained[round(i * (len(trained) - 1) / max(count - 1, 1))] for i in range(count)]
    figure = _canvas(8.4, 4.2)
    axes = figure.subplots()
    for i, layer in enumerate(chosen):
        history = np.asarray(layer.objective_history, dtype=np.float64)
        curve = history / history[0]
        colour = colormaps[DEPTH_COLOURS](0.88 * i / max(count - 1, 1))  # The last tenth is too pale on white.
        label = f"layer {layer.index}: ends at {curve[-1]:.3f}"
        axes.plot(np.arange(len(curve)), curve, color=colour, linewidth=1.6, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("objective / objective at step 0")
    axes.set_title("Rotation training: objective relative to its start")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", frameon=False)
    return _save(figure, path)


def plot_importance_image(path: Path, before: ImportanceSummary, after: ImportanceSummary, title: str) -> Figure | None:
    """Draw the importance of one weight matrix before and after rotation, side by side on one log scale.

    Args:
        title: which matrix this is, for example "layer 3, self_attn.q_proj".
    """
    if before.shape != after.shape:
        raise ValueError(f"Importance has shape {before.shape} before and {after.shape} after rotation.")
    d_out, d_in = before.shape
    images = [before.image, after.image]
    positive = np.concatenate([image[np.isfinite(image) & (image > 0)] for image in images])
    if positive.size == 0:
        _skip(path, f"no importance in {title} is above 0")
        return None
    low, high = np.quantile(positive, [0.005, 0.9995])  # Single extremes would leave one colour for all the rest.
    scale = LogNorm(low, max(high, 1.0001 * low))
    figure = _canvas(9.2, 4.6)
    rows, columns = images[0].shape
    drawn = None
    panels = figure.subplots(1, 2, sharey=True)
    for axes, image, name in zip(panels, images, ("before rotation", "after rotation"), strict=True):
        drawn = axes.imshow(
            np.maximum(image, low), norm=scale, cmap=IMPORTANCE_COLOURS, aspect="auto", interpolation="nearest",
            extent=(0, d_in, d_out, 0),
        )  # fmt: skip
        axes.set_title(name)
        axes.set_xlabel("input of the linear")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylabel("output of the linear")
    assert drawn is not None
    cell = "weight"
    if (rows, columns) != (d_out, d_in):
        cell = f"block mean of about {d_out / rows:.3g} x {d_in / columns:.3g} weights"
    figure.colorbar(drawn, ax=list(panels), label="importance (log scale)", extend="both")
    figure.suptitle(f"Importance of the weights: {title}\none cell: {cell}", fontsize=11)
    return _save(figure, path)


def plot_importance_curves(
    path: Path, before: ImportanceSummary, after: ImportanceSummary, title: str = ""
) -> Figure | None:
    """Draw the share of the importance that the largest weights hold, before and after rotation.

    Left: the share kept against the part of weights kept. Right: what is missing to 100%, on a log scale. All weights
    of the matrix are sorted together.
    """
    shares = [(summary.kept, summary.share) for summary in (before, after)]
    if not all(np.isfinite(share).all() for _, share in shares):
        _skip(path, f"the importance of {title} has no finite sum above 0")
        return None
    figure = _canvas(9.2, 4.6)
    kept_axes, lost_axes = figure.subplots(1, 2)
    for (part, share), name, column in zip(shares, ("before", "after"), ("plain", "rotated"), strict=True):
        lost = np.where(share < 1 - 1e-9, 1 - share, np.nan)
        at_half = 100 * (1 - float(np.interp(0.5, part, share)))
        label = f"{name} rotation: removing the smaller half loses {at_half:.2g}%"
        style = {"color": COLOURS[column], "linewidth": 1.8, "linestyle": "--" if column == "plain" else "-"}
        kept_axes.plot(100 * part, 100 * share, label=label, **style)
        lost_axes.plot(100 * part, 100 * lost, **style)
    for axes in (kept_axes, lost_axes):
        axes.axvline(50, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 100)
        axes.set_xlabel("weights kept, most important first (%)")
    kept_axes.set_ylim(0, 102)
    kept_axes.set_ylabel("importance kept (% of total)")
    lost_axes.set_yscale("log")
    lost_axes.set_ylim(0.01, 130)
    _label_log_axis(lost_axes.yaxis, 1e4)
    lost_axes.set_ylabel("importance removed (% of total, log scale)")
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.suptitle("Importance held by the most important weights" + (f": {title}" if title else ""), fontsize=11)
    return _save(figure, path)


def plot_perplexity(path: Path, columns: Mapping[str, Metrics]) -> Figure | None:
    """Draw one group of bars for each data set, one bar for each column (dense, plain, rotated), with values.

    A perplexity that is not finite has no bar, and its value is written where the bar would stand.
    """
    names = [name for name in PERPLEXITY_SETS if any(name in metrics for metrics in columns.values())]
    if not names:
        _skip(path, "no perplexity was measured")
        return None
    values = [metrics[name] for metrics in columns.values() for name in names if name in metrics]
    finite = [value for value in values if math.isfinite(value) and value > 0]
    is_log = bool(finite) and max(finite) > LOG_RATIO * min(finite)
    figure = _canvas(max(5.0, 1.2 + 0.7 * len(names) * (len(columns) + 1)), 4.2)
    axes = figure.subplots()
    width = 0.8 / len(columns)
    floor = min(finite) / 2 if is_log else 0.0
    for i, (column, metrics) in enumerate(columns.items()):
        places = [j for j, name in enumerate(names) if name in metrics]
        heights = [metrics[names[j]] for j in places]
        shown = [value if math.isfinite(value) else floor for value in heights]
        at = [j + (i - (len(columns) - 1) / 2) * width for j in places]
        bars = axes.bar(at, shown, 0.92 * width, color=_colour(column, i), label=column)
        axes.bar_label(bars, labels=[_short(value) for value in heights], padding=2, fontsize=9)
    axes.set_xticks(range(len(names)), [METRIC_NAMES[name] for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel("perplexity" + (" (log scale)" if is_log else "") + ", lower is better")
    axes.set_title("Perplexity: " + ", ".join(columns))
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(floor, 2 * max(finite))
        _label_log_axis(axes.yaxis, max(finite) / floor)
    else:
        axes.set_ylim(0, 1.15 * max(finite, default=1.0))
    figure.legend(loc="outside lower center", ncols=len(columns), frameon=False)
    return _save(figure, path)


def plot_layers(path: Path, report: RunReport, baseline: RunReport | None = None) -> Figure | None:
    """Draw the relative error that pruning leaves in every layer, one panel for each group of linears.

    A point is the mean of the group's linears. baseline: the run without rotation, drawn beside it.
    """
    runs = {"plain" if report.rotation == "none" else "rotated": report}
    if baseline is not None:
        runs = {"plain": baseline, **runs}
    groups = {name: members for name, members in LINEAR_GROUPS.items() if _has_linear(report, members)}
    known = {member for members in LINEAR_GROUPS.values() for member in members}
    others = {_last(name) for layer in report.layers for name in layer.linears} - known
    groups |= {name: (name,) for name in sorted(others)}
    if not groups:
        _skip(path, "no layer has the result of a linear")
        return None
    num_rows = math.ceil(len(groups) / 2)
    figure = _canvas(9.2, 1.0 + 2.6 * num_rows)
    panels = figure.subplots(num_rows, min(2, len(groups)), sharex=True, squeeze=False).flat
    for i, (axes, (name, members)) in enumerate(zip(panels, groups.items(), strict=False)):
        for column, run in runs.items():
            points = [(layer.index, _group_error(layer, members)) for layer in run.layers]
            style = {"linestyle": "--", "marker": "s"} if column == "plain" else {"linestyle": "-", "marker": "o"}
            axes.plot(
                [index for index, _ in points], [error for _, error in points],
                color=COLOURS[column], markersize=3.5, linewidth=1.4, label=column, **style,
            )  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("relative error")
        axes.set_xlabel("layer" if i >= len(groups) - 2 else "")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in figure.axes[len(groups) :]:
        axes.set_axis_off()
    figure.suptitle("Output error that pruning leaves in each layer, lower is better", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(runs), frameon=False)
    return _save(figure, path)


def plot_comparison(
    path: Path, labels: Sequence[str], columns: Sequence[str], runs: Sequence[Metrics], dense: Sequence[Metrics]
) -> Figure | None:
    """Draw the runs as horizontal bars, one panel for each perplexity and for the zero-shot mean.

    Args:
        labels: one name for each run, from top to bottom.
        columns: "plain" or "rotated" for each run; gives its colour.
        runs: the metrics of each pruned model.
        dense: the metrics of the dense model of each run, drawn as a line across its bar.
    """
    keys = [key for key in (*PERPLEXITY_SETS, "zero_shot_mean") if any(key in metrics for metrics in runs)]
    if not keys:
        _skip(path, "no run has a perplexity or a zero-shot mean")
        return None
    figure = _canvas(1.2 + 0.075 * max(map(len, labels)) + 2.8 * len(keys), 1.6 + 0.32 * len(runs))
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    places = np.arange(len(runs))
    for axes, key in zip(panels, keys, strict=True):
        is_perplexity = key in PERPLEXITY_SETS
        values = [metrics.get(key, math.nan) for metrics in runs]
        marks = [metrics.get(key, math.nan) for metrics in dense]
        seen = [value for value in values + marks if math.isfinite(value) and value > 0]
        low, high = min(seen, default=1.0), max(seen, default=1.0)
        is_log = is_perplexity and high > LOG_RATIO * low
        left, right = (low / 2, high * (2 * high / low) ** 0.3) if is_log else (0.0, 1.3 * high)
        shown = [value if math.isfinite(value) else left for value in values]
        axes.barh(places, shown, 0.7, color=[COLOURS[column] for column in columns])
        axes.vlines(marks, places - 0.45, places + 0.45, color="black", linewidth=1.4)
        for i, (value, bar, mark) in enumerate(zip(values, shown, marks, strict=True)):
            text = _short(value) if key in runs[i] else "not measured"
            if not is_log and 0.3 * right < bar < mark:  # Behind the dense line it would read as the dense value.
                style = {"ha": "right", "color": "black" if columns[i] == "plain" else "white"}
                axes.annotate(text, (bar, i), (-4, 0), textcoords="offset points", va="center", fontsize=8, **style)
            else:
                end = max(bar, mark) if math.isfinite(value) and math.isfinite(mark) else bar
                axes.annotate(text, (end, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
        if is_log:
            axes.set_xscale("log")
            _label_log_axis(axes.xaxis, right / left)
        axes.set_xlim(left, right)
        unit = "perplexity" if is_perplexity else "accuracy in %"
        better = "lower" if is_perplexity else "higher"
        axes.set_xlabel(f"{unit}{', log scale' if is_log else ''}\n{better} is better")
        axes.set_title(METRIC_NAMES[key], fontsize=11)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, labels, fontsize=8)
    panels[0].set_ylim(len(runs) - 0.4, -0.6)
    handles: list[Artist] = [Line2D([], [], color="black", linewidth=1.4, label="dense")]
    handles += [Patch(color=COLOURS[column], label=column) for column in ("plain", "rotated") if column in columns]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle("Pruned models and their dense models", fontsize=11)
    return _save(figure, path)


def _canvas(width: float, height: float) -> Figure:
    """Make an empty figure of width x height inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _skip(path: Path, reason: str) -> None:
    logger.info("no %s: %s", path.name, reason)


def _save(figure: Figure, path: Path) -> Figure:
    """Write the figure under a temporary name in the same folder, then rename it."""
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>" and not axes.images:
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})  # No version inside: same data, same bytes.
    os.replace(temporary, path)
    return figure


def _colour(column: str, i: int) -> str:
    return COLOURS.get(column, OTHER_COLOURS[i % len(OTHER_COLOURS)])


def _short(value: float) -> str:
    """Write a perplexity or an accuracy in about six characters: 21.60, 110.2, 5200, 1.23e+05, inf."""
    if value < 100:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.3g}"


def _label_log_axis(axis: Axis, ratio: float) -> None:
    """Write 0.1, 10, 1000 where matplotlib writes powers of ten; also 20 and 50 where the axis spans few decades."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 300 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _last(name: str) -> str:
    """self_attn.q_proj -> q_proj."""
    return name.rsplit(".", 1)[-1]


def _has_linear(report: RunReport, members: Sequence[str]) -> bool:
    return any(_last(name) in members for layer in report.layers for name in layer.linears)


def _group_error(layer: LayerResult, members: Sequence[str]) -> float:
    errors = [result.relative_error for name, result in layer.linears.items() if _last(name) in members]
    return sum(errors) / len(errors) if errors else math.nan
