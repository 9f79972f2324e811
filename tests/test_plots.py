"""The plots are valid files, and their axes hold the data they were given."""

from __future__ import annotations

import logging
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from drotator.importance import IMAGE_CELLS, summarise
from drotator.plots import (
    COLOURS,
    plot_comparison,
    plot_importance_curves,
    plot_importance_image,
    plot_layers,
    plot_objective,
    plot_perplexity,
)
from drotator.results import LayerResult, LinearResult, RunReport

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def make_layer(index: int, error: float = 0.2, history: tuple[float, ...] = ()) -> LayerResult:
    return LayerResult(
        index=index,
        objective_before=history[0] if history else 0.0,
        objective_after=history[-1] if history else 0.0,
        orthogonality=1e-6,
        linears={name: LinearResult(sparsity=0.5, relative_error=error + 0.01 * i) for i, name in enumerate(LINEARS)},
        seconds={"rotate": 1.0},
        objective_history=list(history),
    )


def make_report(rotation: str, layers: list[LayerResult]) -> RunReport:
    return RunReport(
        model="tiny", pruner="wanda", sparsity="2of4", rotation=rotation, objective="entropy", optimizer="adam_qr",
        seed=0, metrics={"dense": {}, "pruned": {}}, sparsity_realised=0.5, layers=layers, seconds={},
        peak_memory_bytes={}, versions={}, provenance={},
    )  # fmt: skip


def drawn(figure: Figure | None, path: Path) -> Figure:
    """Check that the file is a whole PNG of a sensible size, alone in its folder, and hand the figure on."""
    assert figure is not None
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    assert 400 <= width <= 3000
    assert 200 <= height <= 3000
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return figure


def test_objective_curves_are_of_five_layers_over_the_depth_and_start_at_one(tmp_path: Path) -> None:
    layers = [make_layer(i, history=(4.0, 2.0 + i, 1.0 + 0.1 * i)) for i in range(30)]
    figure = drawn(plot_objective(tmp_path / "plots" / "objective.png", layers), tmp_path / "plots" / "objective.png")
    curves = figure.axes[0].get_lines()[:5]
    assert [curve.get_label().split(":")[0] for curve in curves] == [f"layer {i}" for i in (0, 7, 14, 22, 29)]
    np.testing.assert_allclose(curves[1].get_ydata(), np.array([4.0, 9.0, 1.7]) / 4.0)
    assert "step 0" in figure.axes[0].get_ylabel()


def test_objective_of_two_layers_has_two_curves(tmp_path: Path) -> None:
    figure = plot_objective(tmp_path / "o.png", [make_layer(i, history=(1.0, 0.5)) for i in range(2)])
    assert figure is not None
    assert len(figure.axes[0].get_lines()) == 3  # two curves and the line at 1


def test_where_there_is_nothing_to_draw_no_file_is_written_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = [summarise(torch.zeros(4, 8))] * 2
    with caplog.at_level(logging.INFO, "drotator"):
        assert plot_objective(tmp_path / "a.png", [make_layer(0), make_layer(1, history=(1.0,))]) is None
        assert plot_objective(tmp_path / "a.png", [make_layer(0, history=(math.nan, 1.0))]) is None
        assert plot_perplexity(tmp_path / "b.png", {"dense": {"piqa": 60.0}}) is None
        assert plot_layers(tmp_path / "c.png", make_report("none", [])) is None
        assert plot_importance_image(tmp_path / "d.png", *zeros, "zeros") is None
        assert plot_importance_curves(tmp_path / "e.png", *zeros) is None
        assert plot_comparison(tmp_path / "f.png", ["1"], ["plain"], [{"piqa": 60.0}], [{}]) is None
    assert list(tmp_path.iterdir()) == []
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"no {name}.png" for name in ("a", "a", "b", "c", "d", "e", "f")
    ]


def test_importance_image_shows_every_weight_of_a_small_matrix_on_one_scale(tmp_path: Path) -> None:
    before = torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) + 0.5
    after = before.flip(1) * 3
    path = tmp_path / "image.png"
    figure = drawn(plot_importance_image(path, summarise(before), summarise(after), "layer 0, q_proj"), path)
    images = [axes.images[0] for axes in figure.axes[:2]]
    assert images[0].norm is images[1].norm
    np.testing.assert_allclose(images[1].get_array(), np.maximum(after.numpy(), images[0].norm.vmin), rtol=1e-6)
    assert "layer 0, q_proj" in figure.get_suptitle()
    assert "one cell: weight" in figure.get_suptitle()


def test_importance_image_of_a_large_matrix_holds_block_means_and_says_so(tmp_path: Path) -> None:
    d_out, d_in = 2 * IMAGE_CELLS + 100, 3 * IMAGE_CELLS
    before = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64).bfloat16()
    figure = plot_importance_image(tmp_path / "image.png", *[summarise(before)] * 2, "W")
    assert figure is not None
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (IMAGE_CELLS, IMAGE_CELLS)
    edge = round(d_out / IMAGE_CELLS)
    np.testing.assert_allclose(image[0, 1], before[:edge, 3:6].float().mean(), rtol=1e-5)
    assert "block mean of about 2.39 x 3 weights" in figure.get_suptitle()


def test_importance_of_two_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) before and \(3, 2\) after"):
        plot_importance_image(tmp_path / "image.png", summarise(torch.ones(2, 3)), summarise(torch.ones(3, 2)), "W")


def test_importance_curves_are_cumulative_shares_of_sorted_importance(tmp_path: Path) -> None:
    before, after = torch.ones(10, 10), torch.zeros(10, 10)
    after[0, :5] = 7.0
    after[3, 4:9] = 1.0
    path = tmp_path / "curves.png"
    figure = drawn(plot_importance_curves(path, summarise(before), summarise(after), "W"), path)
    kept, lost = figure.axes
    uniform, concentrated, half = kept.get_lines()
    np.testing.assert_allclose(uniform.get_ydata(), uniform.get_xdata(), atol=1e-4)
    part = np.asarray(concentrated.get_xdata())
    np.testing.assert_allclose(np.interp([5, 10, 50], part, concentrated.get_ydata()), [87.5, 100, 100])
    np.testing.assert_allclose(np.interp(5, part, lost.get_lines()[1].get_ydata()), 12.5)
    assert set(half.get_xdata()) == {50}
    assert uniform.get_label() == "before rotation: removing the smaller half loses 50%"


def test_perplexity_bars_have_the_values_the_labels_and_fixed_colours(tmp_path: Path) -> None:
    path = tmp_path / "perplexity.png"
    columns = {
        "dense": {"wikitext2": 21.6, "c4": 25.0, "piqa": 67.0},
        "plain": {"wikitext2": 99.5, "c4": 110.0},
        "rotated": {"wikitext2": 59.5},
    }
    axes = drawn(plot_perplexity(path, columns), path).axes[0]
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    assert heights == [[21.6, 25.0], [99.5, 110.0], [59.5]]
    assert [text.get_text() for text in axes.texts] == ["21.60", "25.00", "99.50", "110.0", "59.50"]
    assert axes.get_yscale() == "linear"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["WikiText-2", "C4"]
    found = [bar.get_facecolor()[:3] for container in axes.containers for bar in list(container)[:1]]
    assert found == [tuple(int(COLOURS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)) for name in columns]


def test_far_apart_perplexities_get_a_log_axis_and_an_infinite_one_a_label_without_a_bar(tmp_path: Path) -> None:
    columns = {"dense": {"passages": 20.0}, "plain": {"passages": 5e5}, "rotated": {"passages": math.inf}}
    figure = plot_perplexity(tmp_path / "perplexity.png", columns)
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert "log scale" in axes.get_ylabel()
    assert [text.get_text() for text in axes.texts] == ["20.00", "5e+05", "inf"]
    assert axes.containers[2][0].get_height() == axes.get_ylim()[0]


def test_layer_errors_are_means_over_linears_that_share_their_input(tmp_path: Path) -> None:
    path = tmp_path / "layers.png"
    rotated = make_report("per_layer", [make_layer(i, error=0.1 + 0.1 * i) for i in range(3)])
    plain = make_report("none", [make_layer(i, error=0.4) for i in range(3)])
    figure = drawn(plot_layers(path, rotated, plain), path)
    assert [axes.get_title() for axes in figure.axes] == [
        "q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"
    ]  # fmt: skip
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines["rotated"].get_ydata(), [0.11, 0.21, 0.31])
    np.testing.assert_allclose(lines["plain"].get_ydata(), [0.41, 0.41, 0.41])
    np.testing.assert_allclose(figure.axes[3].get_lines()[1].get_ydata(), [0.16, 0.26, 0.36])


def test_a_linear_of_another_name_gets_its_own_panel(tmp_path: Path) -> None:
    layer = make_layer(0)
    layer.linears = {"mlp.down_proj": LinearResult(sparsity=0.5, relative_error=0.3)}
    layer.linears["mlp.experts"] = LinearResult(sparsity=0.5, relative_error=0.7)
    figure = plot_layers(tmp_path / "layers.png", make_report("none", [layer]))
    assert figure is not None
    assert {axes.get_title(): axes.get_lines()[0].get_ydata()[0] for axes in figure.axes} == {
        "down_proj": 0.3,
        "experts": 0.7,
    }


def test_comparison_has_a_bar_for_each_run_and_a_line_for_each_dense_model(tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    runs = [{"wikitext2": 99.5, "zero_shot_mean": 41.0}, {"wikitext2": 59.5}]
    dense = [{"wikitext2": 21.6, "zero_shot_mean": 49.0}] * 2
    figure = drawn(plot_comparison(path, ["1: wanda", "2: wanda"], ["plain", "rotated"], runs, dense), path)
    perplexity, accuracy = figure.axes
    assert [bar.get_width() for bar in perplexity.patches] == [99.5, 59.5]
    assert [segment[0][0] for segment in perplexity.collections[0].get_segments()] == [21.6, 21.6]
    assert [text.get_text() for text in accuracy.texts] == ["41.00", "not measured"]
    assert "higher is better" in accuracy.get_xlabel()
    assert [label.get_text() for label in perplexity.get_yticklabels()] == ["1: wanda", "2: wanda"]


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    columns = {"dense": {"c4": 20.0}, "rotated": {"c4": 30.0}}
    for name in ("a.png", "b.png"):
        plot_perplexity(tmp_path / name, columns)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
