"""report.json keeps its contract, report.md and the tables say what was measured, and runs are found and compared."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from drotator import comparison
from drotator.comparison import report_command
from drotator.console import console
from drotator.report import load_report, write_report
from drotator.results import LayerResult, LinearResult, Metrics, RunReport
from drotator.summary import gap_closed, print_summary, sampling_error, summary_table

DENSE = {
    "wikitext2": 21.6, "c4": 24.83, "piqa": 67.08, "piqa_acc": 66.1, "winogrande": 52.4, "winogrande_acc": 52.4,
    "zero_shot_mean": 59.74,
}  # fmt: skip
PLAIN = DENSE | {"wikitext2": 99.5, "c4": 110.2, "piqa": 58.0, "piqa_acc": 57.0, "zero_shot_mean": 55.2}
ROTATED = DENSE | {"wikitext2": 59.5, "c4": 67.2, "piqa": 61.0, "piqa_acc": 60.0, "zero_shot_mean": 56.7}


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "80")
    console.cache_clear()
    yield
    console.cache_clear()


def make_layer(index: int) -> LayerResult:
    return LayerResult(
        index=index,
        objective_before=4.0,
        objective_after=1.5,
        orthogonality=1e-6 * (index + 1),
        linears={
            "self_attn.q_proj": LinearResult(sparsity=0.5, relative_error=0.1 + 0.1 * index),
            "mlp.down_proj": LinearResult(sparsity=0.5, relative_error=0.3),
        },
        seconds={"rotate": 2.5, "prune": 1.2},
    )


def make_report(rotation: str = "per_layer", metrics: Metrics | None = None) -> RunReport:
    pruned = metrics if metrics is not None else (PLAIN if rotation == "none" else ROTATED)
    return RunReport(
        model="smollm2-135m", pruner="sparsegpt", sparsity="2of4", rotation=rotation, objective="entropy",
        optimizer="riemannian_adam", seed=0, metrics={"dense": dict(DENSE), "pruned": dict(pruned)},
        sparsity_realised=0.5, layers=[make_layer(0), make_layer(1)],
        seconds={"load": 3.2, "calibrate": 12.0, "rotate": 75.0, "prune": 40.0, "evaluate": 66.0, "total": 196.2},
        peak_memory_bytes={"host": 3 * 2**30, "device": 0}, versions={"torch": "2.13.0", "transformers": "5.23.0"},
        provenance={
            "dataset": "c4", "calibration_samples": 128, "seqlen": 2048, "windows": {"wikitext2": 141, "c4": 256},
            "batch_size": 8, "bos": False, "steps": 200,
        },
    )  # fmt: skip


def rendered(columns: dict[str, Metrics]) -> str:
    page = Console(width=80, record=True, file=io.StringIO())
    page.print(summary_table(columns))
    return page.export_text()


def test_report_json_has_exactly_the_keys_of_the_contract(tmp_path: Path) -> None:
    report = make_report()
    report.layers[0].objective_history = [4.0, 1.5]
    report.layers[0].peak_memory_bytes = {"host": 1}
    write_report(tmp_path, report)
    document = json.loads((tmp_path / "report.json").read_text())
    assert list(document) == [
        "model", "pruner", "sparsity", "rotation", "objective", "optimizer", "seed", "metrics", "sparsity_realised",
        "layers", "seconds", "peak_memory_bytes", "versions", "provenance",
    ]  # fmt: skip
    assert set(document["metrics"]) == {"dense", "pruned"}
    assert set(document["metrics"]["dense"]) == set(document["metrics"]["pruned"])
    for layer in document["layers"]:
        assert list(layer) == [
            "index", "objective_before", "objective_after", "orthogonality", "linears", "seconds"
        ]  # fmt: skip
        assert list(layer["linears"]["mlp.down_proj"]) == ["sparsity", "relative_error"]
    assert set(document["seconds"]) == {"load", "calibrate", "rotate", "prune", "evaluate", "total"}
    assert set(document["peak_memory_bytes"]) == {"host", "device"}


def test_a_report_that_is_written_and_read_is_the_same(tmp_path: Path) -> None:
    report = make_report()
    report.layers[1].warnings = ["the objective did not fall"]
    report.layers[1].damping = {"mlp.down_proj": 0.1}
    report.layers[0].reconstruction = {"before": 0.3, "after": 0.1}
    write_report(tmp_path, report)
    assert load_report(tmp_path) == report
    assert load_report(tmp_path / "report.json") == report
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_numbers_that_are_not_finite_become_null_and_are_named_in_the_text(tmp_path: Path) -> None:
    report = make_report(metrics=ROTATED | {"c4": math.inf})
    report.layers[1].objective_after = math.nan
    report.layers[1].objective_history = [4.0, math.nan]
    write_report(tmp_path, report, baseline=make_report("none"))

    def refuse(name: str) -> float:
        raise AssertionError(name)

    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert document["metrics"]["pruned"]["c4"] is None
    assert document["layers"][1]["objective_after"] is None
    text = (tmp_path / "report.md").read_text()
    assert "- not finite, written as null in report.json: metrics.pruned.c4 = inf" in text
    assert "- not finite, written as null in report.json: layers[1].objective_after = nan" in text
    assert "| C4 (perplexity, lower is better) | 24.83 | 110.20 | inf | - |" in text
    assert "history" not in text
    assert math.isnan(load_report(tmp_path).metrics["pruned"]["c4"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "Expecting"),
        (lambda text: "[]", "where dict is expected"),
        (lambda text: text.replace('"sparsity_realised"', '"x"'), "'sparsity_realised' is missing"),
        (lambda text: text.replace('"seed": 0', '"seed": "0"'), "'0' where int is expected"),
        (lambda text: text.replace('"relative_error": 0.3', '"relative_error": "low"'), "'low' where float"),
    ],
)
def test_a_damaged_report_is_refused_by_its_name(tmp_path: Path, damage: object, message: str) -> None:
    write_report(tmp_path, make_report())
    path = tmp_path / "report.json"
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"report\.json is damaged") as caught:
        load_report(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_report_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report.json cannot be read \(No such file or directory\)"):
        load_report(tmp_path)


def test_a_rotated_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be the unrotated run"):
        write_report(tmp_path, make_report(), baseline=make_report("shared"))
    with pytest.raises(ValueError, match="must be the unrotated run"):
        write_report(tmp_path, make_report("none"), baseline=make_report("none"))


@pytest.mark.parametrize(
    ("dense", "plain", "rotated", "lower_is_better", "expected"),
    [
        (20.0, 100.0, 60.0, True, 50.0),
        (20.0, 100.0, 20.0, True, 100.0),
        (20.0, 100.0, 120.0, True, -25.0),
        (60.0, 50.0, 55.0, False, 50.0),
        (60.0, 59.9, 55.0, False, math.nan),  # plain pruning costs nothing worth speaking of
        (60.0, 65.0, 66.0, False, math.nan),  # plain pruning costs nothing at all
        (20.0, math.inf, 60.0, True, math.nan),
        (20.0, 100.0, math.nan, True, math.nan),
    ],
)
def test_the_gap_closed_is_the_part_of_the_cost_that_the_rotation_wins_back(
    dense: float, plain: float, rotated: float, lower_is_better: bool, expected: float
) -> None:
    found = gap_closed(dense, plain, rotated, lower_is_better=lower_is_better)
    assert found == pytest.approx(expected, nan_ok=True)


def test_the_summary_fits_eighty_columns_and_stars_the_best_pruned_value() -> None:
    lines = rendered({"dense": DENSE, "plain": PLAIN | {"c4": 3.1e6}, "rotated": ROTATED}).splitlines()
    assert max(map(len, lines)) <= 80
    cells = {line[:32].strip(): line[32:].split() for line in lines}
    assert cells["WikiText-2"] == ["21.60", "99.50", "*", "59.50", "51.3%"]
    assert cells["C4"][:3] == ["24.83", "3.10e+06", "*"]
    assert cells["PIQA acc_norm"] == ["67.08", "58.00", "*", "61.00", "-"]  # of a single task, noise
    assert cells["PIQA acc"] == ["66.10", "57.00", "*", "60.00", "-"]
    assert cells["zero-shot mean"][-1].endswith("%")
    assert cells["WinoGrande acc"] == ["52.40", "52.40", "52.40", "-"]
    labels = list(cells)
    assert labels.index("perplexity, lower is better") < labels.index("C4") < labels.index("PIQA acc_norm")
    assert labels.index("PIQA acc_norm") < labels.index("zero-shot mean") < labels.index("PIQA acc")
    assert [line.strip() for line in lines].count("WinoGrande acc") <= 1


def test_the_summary_of_one_model_has_no_gap_and_no_star() -> None:
    text = rendered({"checkpoint": DENSE})
    assert "gap closed" not in text
    assert "*" not in text
    assert "21.60" in text


def test_a_terminal_without_unicode_gets_plain_ascii() -> None:
    code = (
        "from rich.console import Console; from drotator.summary import summary_table; "
        "Console(width=80).print(summary_table({'dense': {'c4': 1.0}, 'plain': {'c4': 3.0}, 'rotated': {'c4': 2.0}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True, timeout=60
    )
    assert "50.0%" in done.stdout.decode("ascii")


def test_reading_reports_needs_no_torch() -> None:
    code = "import sys, drotator.report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_text_says_what_was_done_what_came_out_and_what_it_is_worth(tmp_path: Path) -> None:
    report = make_report()
    report.layers[1].warnings = ["the objective did not fall"]
    (tmp_path / "plots").mkdir()
    for name in ("zebra.png", "layers.png", "perplexity.png"):
        (tmp_path / "plots" / name).touch()
    write_report(tmp_path, report, baseline=make_report("none"))
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# smollm2-135m, sparsegpt 2of4, rotation per_layer (entropy, riemannian_adam)\n")
    assert "2 of every 4 consecutive inputs kept" in text
    assert "learned by riemannian_adam in 200 steps on the objective entropy" in text
    assert "| metric | dense | plain | rotated | gap closed |" in text
    assert "| WikiText-2 (perplexity, lower is better) | 21.60 | 99.50 | **59.50** | 51.3% |" in text
    assert "Dense file, 50.00% zeros in the pruned linears; 2:4 needs semi-structured kernels." in text
    assert "one dense hidden_size x hidden_size matrix between layers" in text
    assert "| self_attn.q_proj | 50.00% | 0.1500 | 0.2000 (1) | 0.1500 |" in text
    assert "Largest |R^T R - I|: 2.0e-06 (layer 1)" in text
    assert "| rotate | 1m15s | 1m15s |" in text
    assert "| peak memory, host | 3.00 GiB | 3.00 GiB |" in text
    assert "- layer 1: the objective did not fall" in text
    for line in ("| seqlen | 2048 |", "| windows | wikitext2=141, c4=256 |", "| bos | False |", "| batch size | 8 |"):
        assert line in text
    assert "| version of transformers | 5.23.0 |" in text
    order = [text.index(f"](plots/{name}.png)") for name in ("perplexity", "layers", "zebra")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("sparsity", "pruner", "words"),
    [
        ("50", "wanda", "unstructured: no speed-up on GPUs."),
        ("62.5", "wanda", "unstructured: no speed-up on GPUs."),
        ("4of8", "wanda", "no speed-up: sparse tensor cores take 2:4 only."),
        ("2of4", "none", "nothing was pruned."),
    ],
)
def test_the_text_promises_no_speed_that_is_not_there(tmp_path: Path, sparsity: str, pruner: str, words: str) -> None:
    write_report(tmp_path, replace(make_report("none"), sparsity=sparsity, pruner=pruner))
    text = (tmp_path / "report.md").read_text()
    assert words in text
    assert "hidden_size x hidden_size" not in text
    assert "gap closed" not in text


def test_plain_and_rotated_that_were_measured_differently_are_called_not_comparable(tmp_path: Path) -> None:
    baseline = make_report("none")
    baseline.provenance["windows"] = {"wikitext2": 8, "c4": 8}
    write_report(tmp_path, make_report(), baseline=baseline)
    text = (tmp_path / "report.md").read_text()
    assert "not comparable: windows is wikitext2=8, c4=8 and wikitext2=141, c4=256" in text


def test_a_run_without_evaluation_is_reported_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(metrics={})
    report.metrics["dense"] = {}
    write_report(tmp_path, report)
    assert "Nothing was evaluated (eval=none)." in (tmp_path / "report.md").read_text()
    print_summary(report)
    assert "Nothing was evaluated (eval=none)." in capsys.readouterr().out


def test_the_printed_summary_has_table_cost_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report()
    report.layers = [copy.deepcopy(report.layers[0]) for _ in range(14)]
    for index, layer in enumerate(report.layers):
        layer.index, layer.warnings = index, ["[q k v] drifted"]
    print_summary(report, make_report("none"))
    text = capsys.readouterr().out
    assert "51.3%" in text
    assert "Dense file, 50.00% zeros" in text
    assert "Time 3m16s; peak memory host 3.00 GiB." in text
    assert "warning: layer 0: [q k v] drifted" in text
    assert "warning: 4 more in report.md" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A single run, a multirun of four, one of them unfinished and one damaged."""
    multirun = tmp_path / "outputs" / "multirun" / "2026-11-22" / "10-00-00"
    write_report(multirun / "0", replace(make_report(), pruner="wanda"))
    write_report(multirun / "1", replace(make_report("none"), pruner="wanda"))
    layers = multirun / "2" / "layers"
    layers.mkdir(parents=True)
    for name in ("000.safetensors", "001.safetensors", ".002.safetensors.partial"):
        (layers / name).touch()
    (multirun / "3").mkdir()
    (multirun / "3" / "report.json").write_text("{")
    write_report(tmp_path / "outputs" / "2026-11-22" / "09-00-00-tiny", replace(make_report("none"), sparsity="50"))
    return tmp_path / "outputs"


def test_all_runs_below_a_folder_are_listed_with_what_is_unfinished_or_damaged(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_command([sweep], None)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if len(line) <= 80]
    header = ["run", "pruner", "sparsity", "rotation", "wikitext2", "c4", "zero-shot", "min"]
    start = table.index(header)
    assert table[start + 2 : start + 6] == [
        ["dense", "-", "-", "-", "21.60", "24.83", "59.74", "-"],
        ["1", "sparsegpt", "50", "none", "99.50", "110.20", "55.20", "3.3"],
        ["2", "wanda", "2of4", "none", "99.50", "110.20", "55.20", "3.3"],
        ["3", "wanda", "2of4", "per_layer", "59.50", "67.20", "56.70", "3.3"],
    ]
    assert lines[0].startswith("All runs: model smollm2-135m; objective entropy; optimizer riemannian_adam; ")
    multirun = sweep / "multirun" / "2026-11-22" / "10-00-00"
    assert f"3: {multirun / '0'}" in lines
    assert f"unfinished, 2 layers done: {multirun / '2'} (go on with resume={multirun / '2'})" in lines
    assert any(line.startswith(f"{multirun / '3' / 'report.json'} is damaged") for line in lines)


def test_a_run_that_is_named_twice_is_listed_once(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sweep / "multirun" / "2026-11-22" / "10-00-00" / "0"
    report_command([run, run.parent / ".." / "10-00-00" / "0", run / "report.json"], None)
    text = capsys.readouterr().out
    assert f"1: {run}" in text
    assert "\n2: " not in text


def test_runs_that_were_measured_differently_show_it_in_a_column_and_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = make_report()
    short.provenance["seqlen"] = 512
    short.metrics["dense"] = DENSE | {"wikitext2": 33.3}
    write_report(tmp_path / "a", make_report())
    write_report(tmp_path / "b", short)
    report_command([tmp_path], None)
    text = capsys.readouterr().out
    assert "The runs differ in seqlen: do not compare their metrics." in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[1:3] for row in rows if row[:1] == ["dense"]] == [["2048", "21.60"], ["512", "33.30"]]


def test_what_has_no_room_in_eighty_columns_is_told_beside_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = replace(make_report(), objective="pruning_error", optimizer="spectral")
    longer.provenance |= {"steps": 2000, "objective.salience": "wanda", "calibration_seed": 1, "windows": {"c4": 8}}
    other = replace(make_report(), pruner="wanda", sparsity="50")
    for name, report in {"a": make_report(), "b": make_report("none"), "c": longer, "d": other}.items():
        report.provenance.setdefault("calibration_seed", 0)
        write_report(tmp_path / name, report)
    report_command([tmp_path], tmp_path / "table.md")
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert ["run", "pruner", "sparsity", "rotation", "wikitext2", "c4", "zero-shot", "min"] in map(str.split, lines)
    assert max(map(len, lines[: lines.index(f"1: {tmp_path / 'd'}")])) <= 80
    said = "Unless it is said beside a run's folder: objective entropy; optimizer riemannian_adam; steps 200; "
    assert f"{said}calibration_seed 0; windows wikitext2=141, c4=256." in " ".join(shown.split())
    assert f"2: {tmp_path / 'b'}" in lines
    differing = "objective pruning_error; optimizer spectral; steps 2000; salience=wanda; calibration_seed 1"
    assert f"4: {tmp_path / 'c'} ({differing}; windows c4=8)" in lines
    assert [line.split()[0] for line in lines if re.match(r" (dense|\d) ", line)] == ["dense", "1", "2", "3", "4"]
    written = (tmp_path / "table.md").read_text()
    assert "| run | pruner | sparsity | rotation | objective | optimizer | steps | also | calibration_seed |" in written


def test_a_recovered_run_stands_beside_the_pruned_one_with_what_it_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recovered = replace(make_report(), layers=[])
    recovered.metrics["recovered"] = {**ROTATED, "wikitext2": 40.5}
    recovered.provenance["recovered"] = "LoRA of rank 8"
    write_report(tmp_path / "pruned", make_report())
    write_report(tmp_path / "recovered", recovered)
    report_command([tmp_path], None)
    shown = capsys.readouterr().out
    rows = {line.split()[1]: line.split() for line in shown.splitlines() if re.match(r" *[12] +\S+ +\d", line)}
    assert (rows["-"][2], rows["recovered"][2]) == ("59.50", "40.50")
    assert "also recovered" not in shown
    text = (tmp_path / "recovered" / "report.md").read_text()
    assert "| metric | dense | rotated | recovered |" in text
    assert "Then recovered: LoRA of rank 8." in text
    assert "## Layers" not in text
    assert "|  | recovered |" in text
    assert load_report(tmp_path / "recovered").final["wikitext2"] == 40.5


def test_the_comparison_is_written_as_markdown_with_a_plot(sweep: Path, tmp_path: Path) -> None:
    report_command([sweep], tmp_path / "made" / "table.md")
    text = (tmp_path / "made" / "table.md").read_text()
    assert "| run | pruner | sparsity | rotation | wikitext2 | c4 | zero-shot | min |" in text
    assert "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |" in text
    assert "| 3 | wanda | 2of4 | per_layer | 59.50 | 67.20 | 56.70 | 3.3 |" in text
    assert "unfinished, 2 layers done" in text
    assert "![Comparison of the runs](table.png)" in text
    assert sorted(entry.name for entry in (tmp_path / "made").iterdir()) == ["table.md", "table.png"]


def test_a_run_is_named_in_the_plot_by_what_is_unusual_about_it(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unusual = replace(make_report(), objective="pruning_error")
    unusual.provenance |= {"steps": 2000, "objective.salience": "wanda"}
    write_report(sweep / "unusual", unusual)
    labels: list[str] = []
    monkeypatch.setattr(comparison, "plot_comparison", lambda path, given, *_: labels.extend(given))
    report_command([sweep], tmp_path / "table.md")
    assert labels == [
        "1: sparsegpt 50 none",
        "2: wanda 2of4 none",
        "3: wanda 2of4 per_layer",
        "4: sparsegpt 2of4 per_layer pruning_error steps=2000 salience=wanda",
    ]


def test_the_comparison_is_written_as_csv_and_json_with_every_number(sweep: Path, tmp_path: Path) -> None:
    broken = make_report(metrics=ROTATED | {"c4": math.inf})
    write_report(sweep / "broken", replace(broken, sparsity="70"))
    for suffix in ("csv", "json"):
        report_command([sweep], tmp_path / f"table.{suffix}")
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["unfinished", "damaged"]
    assert rows[2]["wikitext2"] == 59.5
    assert rows[2]["dense_wikitext2"] == 21.6
    assert rows[2]["steps"] == 200
    assert rows[1]["steps"] == "-"
    assert rows[3]["c4"] is None
    assert rows[4]["layers_done"] == 2
    with (tmp_path / "table.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["wikitext2"] for line in lines] == ["99.5", "99.5", "59.5", "59.5", "", ""]
    assert lines[0]["windows"] == "wikitext2=141, c4=256"


def test_only_unfinished_runs_are_listed_too(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sweep / "multirun" / "2026-11-22" / "10-00-00" / "2"
    report_command([run], tmp_path / "table.md")
    assert capsys.readouterr().out.startswith("unfinished, 2 layers done")
    assert "unfinished, 2 layers done" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "table.png").exists()


def test_what_cannot_be_compared_is_refused_in_one_line(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^No run under .*empty: no report.json, no layers folder\.$"):
        report_command([tmp_path / "empty"], None)
    with pytest.raises(ValueError, match=r"nowhere is not there: give run folders"):
        report_command([sweep, tmp_path / "nowhere"], None)
    with pytest.raises(ValueError, match=r"--output table.txt ends in '.txt': choose from .md, .csv, .json"):
        report_command([sweep], Path("table.txt"))
    with pytest.raises(ValueError, match=r"report.json is damaged"):
        report_command([sweep / "multirun" / "2026-11-22" / "10-00-00" / "3"], None)


def test_accuracies_of_a_part_of_the_questions_come_with_their_error() -> None:
    partial, whole = make_report(), make_report()
    partial.provenance["tasks_limit"] = 20
    whole.provenance["tasks_limit"] = 0
    partial.metrics["pruned"]["zero_shot_mean"] = whole.metrics["pruned"]["zero_shot_mean"] = 50.0
    assert sampling_error(whole) == []
    assert sampling_error(partial) == ["Accuracies are of 20 questions a task, with a standard error of 11 points."]
