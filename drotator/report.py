"""Write and read the report of a run: `report.json`, a contract for programs, and `report.md`, for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from drotator.folders import write_text
from drotator.results import LayerResult, LinearResult, RunReport
from drotator.summary import (
    NAMES,
    UNUSED,
    columns_of,
    duration,
    format_value,
    gib,
    headline,
    metric_rows,
    mismatches,
    percent,
    place_in,
    sampling_error,
    warnings_of,
    what_it_buys,
)

PLOT_CAPTIONS = {
    "perplexity": "Perplexity of the dense and the pruned models, lower is better",
    "objective": "Objective over the optimizer's steps, divided by its value at step 0",
    "importance_image": "Importance of one weight matrix before and after rotation",
    "importance_curves": "Importance held by the most important weights, before and after rotation",
    "layers": "Relative output error that pruning leaves in each layer",
}
Kind = TypeVar("Kind")


def write_report(run: Path, report: RunReport, *, baseline: RunReport | None = None) -> None:
    """Write run/report.json and run/report.md, each under a temporary name first.

    A number that is not finite becomes null in report.json and is named in report.md. Of a layer, report.json holds the
    contract's keys, and warnings and raised damping only where there are any; the histories are in metrics.jsonl.

    Args:
        run: the run folder. The plots that stand in run/plots are embedded, so draw them first.
        baseline: the report of the same run without rotation, shown beside it.
    Raises: ValueError if baseline is rotated, or report is not.
    """
    if baseline is not None and (baseline.rotation != "none" or report.rotation == "none"):
        found = f"rotation={baseline.rotation} beside rotation={report.rotation}"
        raise ValueError(f"The baseline of {run} must be the unrotated run beside a rotated one, but it is {found}.")
    document = asdict(report)
    for layer in document["layers"]:
        del layer["objective_history"], layer["peak_memory_bytes"]
        for name in ("warnings", "damping", "reconstruction"):
            if not layer[name]:
                del layer[name]
    lost: list[str] = []
    document = without_nan(document, "", lost)
    run.mkdir(parents=True, exist_ok=True)
    stems = [path.stem for path in (run / "plots").glob("*.png")]
    stems.sort(key=lambda stem: (place_in(stem, tuple(PLOT_CAPTIONS)), stem))
    write_text(run / "report.md", _markdown(report, baseline, stems, lost))
    # Last: a run folder with a report.json is a finished run.
    write_text(run / "report.json", json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def load_report(run: Path) -> RunReport:
    """Read run/report.json (or the file itself); null becomes nan.

    Raises: ValueError, naming the file, if it is missing, is no JSON, or breaks the contract.
    """
    path = run / "report.json" if run.is_dir() else run
    try:
        document = _typed(json.loads(path.read_text(encoding="utf-8")), dict)
        return RunReport(
            **{name: _typed(document[name], str) for name in NAMES},
            seed=_typed(document["seed"], int),
            metrics={column: _numbers(values) for column, values in _typed(document["metrics"], dict).items()},
            sparsity_realised=_number(document["sparsity_realised"]),
            layers=[_layer(layer) for layer in _typed(document["layers"], list)],
            seconds=_numbers(document["seconds"]),
            peak_memory_bytes={
                place: _typed(size, int) for place, size in _typed(document["peak_memory_bytes"], dict).items()
            },
            versions={name: _typed(version, str) for name, version in _typed(document["versions"], dict).items()},
            provenance=_typed(document["provenance"], dict),
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {run} is no finished run.") from error
    except KeyError as error:
        raise ValueError(f"{path} is damaged ({error} is missing): resume the run to write it anew.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): resume the run to write it anew.") from error


def without_nan(value: Any, where: str, lost: list[str]) -> Any:
    """Replace every float that is not finite by None and note it in `lost`, as "metrics.pruned.c4 = inf"."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item, f"{where}.{key}".lstrip("."), lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item, f"{where}[{i}]", lost) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{where} = {value}")
        return None
    return value


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """Lay out a table whose first num_left columns are text, the others numbers."""
    rule = ["---"] * num_left + ["---:"] * (len(header) - num_left)
    return "\n".join("| " + " | ".join(map(escape, line)) + " |" for line in (header, rule, *body))


def markdown_list(texts: Sequence[str]) -> str:
    return "\n".join(f"- {escape(text)}" for text in texts)


def _typed(value: object, kind: type[Kind]) -> Kind:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} where {kind.__name__} is expected")
    return value


def _number(value: object) -> float:
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int) else _typed(value, float)


def _numbers(values: object) -> dict[str, float]:
    return {name: _number(value) for name, value in _typed(values, dict).items()}


def _layer(layer: object) -> LayerResult:
    document = _typed(layer, dict)
    linears = {name: _typed(linear, dict) for name, linear in _typed(document["linears"], dict).items()}
    return LayerResult(
        index=_typed(document["index"], int),
        objective_before=_number(document["objective_before"]),
        objective_after=_number(document["objective_after"]),
        orthogonality=_number(document["orthogonality"]),
        linears={
            name: LinearResult(sparsity=_number(linear["sparsity"]), relative_error=_number(linear["relative_error"]))
            for name, linear in linears.items()
        },
        seconds=_numbers(document["seconds"]),
        damping=_numbers(document.get("damping", {})),
        reconstruction=_numbers(document.get("reconstruction", {})),
        warnings=[_typed(text, str) for text in _typed(document.get("warnings", []), list)],
    )


def _in_words(report: RunReport) -> str:
    pattern = re.fullmatch(r"(\d+)of(\d+)", report.sparsity)
    removed = f"{pattern[1]} of every {pattern[2]} consecutive inputs kept" if pattern else "unstructured"
    text = f"Model {report.model}, pruned by {report.pruner} to sparsity {report.sparsity} ({removed}), "
    after = f" Then recovered: {report.provenance['recovered']}." if "recovered" in report.provenance else ""
    if report.rotation == "none":
        return text + f"without rotation. Seed {report.seed}.{after}"
    steps = f" in {format_value(report.provenance['steps'])} steps" if "steps" in report.provenance else ""
    return text + (
        f"after rotation {report.rotation}, learned by {report.optimizer}{steps} on the objective {report.objective}. "
        f"Seed {report.seed}.{after}"
    )


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(report: RunReport, baseline: RunReport | None, plots: Sequence[str], lost: Sequence[str]) -> str:
    columns = columns_of(report, baseline)
    rows = metric_rows(columns)
    parts = [f"# {headline(report)}", _in_words(report), "## Quality"]
    if rows:
        body = []
        for row in rows:
            unit = "perplexity, lower is better" if row.is_perplexity else "%, higher is better"
            texts = [f"**{text}**" if best else text for text, best in zip(row.texts, row.best, strict=True)]
            body.append([f"{row.label} ({unit})", *texts, percent(row.gap_closed)][: None if baseline else -1])
        parts.append(markdown_table(["metric", *columns, *(["gap closed"] if baseline else [])], body))
    else:
        parts.append("Nothing was evaluated (eval=none).")
    if rows and baseline is not None:
        parts.append(
            "Gap closed: (plain - rotated) / (plain - dense), in percent; - where plain pruning moves the dense value "
            "by less than 1%, and for single tasks."
        )
    parts += sampling_error(report)
    runs = {list(columns)[-1]: report} if baseline is None else {"rotated": report, "plain": baseline}
    parts += ["## What the sparsity buys", markdown_list(what_it_buys(report))]
    if report.layers:
        parts += ["## Layers", _layers_in_words(report), markdown_table(*_linears(runs))]
    parts += ["## Time and memory", markdown_table(*_costs(runs))]
    warnings = mismatches(report, baseline) + warnings_of(report)
    warnings += [f"not finite, written as null in report.json: {entry}" for entry in lost]
    parts += ["## Warnings", markdown_list(warnings) if warnings else "None."]
    facts = [
        [name.replace("_", " "), format_value(value)]
        for name, value in (report.provenance | {"seed": report.seed}).items()
    ]
    facts += [[f"version of {name}", version] for name, version in report.versions.items()]
    parts += ["## Provenance", markdown_table(["what", "value"], facts, num_left=2)]
    if plots:
        parts.append("## Plots")
        parts += [f"![{PLOT_CAPTIONS.get(stem, stem.replace('_', ' '))}](plots/{stem}.png)" for stem in plots]
    return "\n\n".join(parts) + "\n"


def _layers_in_words(report: RunReport) -> str:
    text = (
        f"{len(report.layers)} layers; realised sparsity of the pruned linears {100 * report.sparsity_realised:.2f}%."
    )
    if report.rotation == "none" or not report.layers:
        return text
    before = sum(layer.objective_before for layer in report.layers)
    after = sum(layer.objective_after for layer in report.layers)
    worst = max(report.layers, key=lambda layer: layer.orthogonality)
    return text + (
        f" The objective, summed over layers, went from {before:.4g} to {after:.4g}. Largest |R^T R - I|: "
        f"{worst.orthogonality:.1e} (layer {worst.index})."
    )


def _linears(runs: Mapping[str, RunReport]) -> tuple[list[str], list[list[str]]]:
    """Lay out sparsity and error of each kind of linear in the first run, and the mean error in the others."""
    report = next(iter(runs.values()))
    others = list(runs.items())[1:]
    header = ["linear", "sparsity", "mean relative error", "largest (layer)"]
    body = []
    for name in dict.fromkeys(name for layer in report.layers for name in layer.linears):
        found = [(layer.linears[name], layer.index) for layer in report.layers if name in layer.linears]
        low, high = min(result.sparsity for result, _ in found), max(result.sparsity for result, _ in found)
        sparsity = f"{100 * low:.2f}%" if f"{low:.4f}" == f"{high:.4f}" else f"{100 * low:.2f}% to {100 * high:.2f}%"
        worst, index = max(found, key=lambda item: item[0].relative_error)
        line = [name, sparsity, _mean_error(report, name), f"{worst.relative_error:.4f} ({index})"]
        body.append(line + [_mean_error(other, name) for _, other in others])
    return header + [f"mean relative error, {column}" for column, _ in others], body


def _mean_error(report: RunReport, name: str) -> str:
    errors = [layer.linears[name].relative_error for layer in report.layers if name in layer.linears]
    return f"{sum(errors) / len(errors):.4f}" if errors else UNUSED


def _costs(runs: Mapping[str, RunReport]) -> tuple[list[str], list[list[str]]]:
    reports = runs.values()
    stages = dict.fromkeys(stage for report in reports for stage in report.seconds)
    places = dict.fromkeys(place for report in reports for place in report.peak_memory_bytes)
    times = [[stage, *(duration(report.seconds.get(stage)) for report in reports)] for stage in stages]
    peaks = [[f"peak memory, {at}", *(gib(report.peak_memory_bytes.get(at)) for report in reports)] for at in places]
    return ["", *runs], times + peaks
