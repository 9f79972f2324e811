"""Summaries of importances against slow, obvious loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drotator import importance
from drotator.importance import CURVE_POINTS, IMAGE_CELLS, summarise


def test_a_small_matrix_is_its_own_image() -> None:
    S = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    found = summarise(S)
    assert found.shape == (12, 20)
    np.testing.assert_array_equal(found.image, S.double().numpy())


@pytest.mark.parametrize("shape", [(2 * IMAGE_CELLS + 100, 20), (12, 3 * IMAGE_CELLS), (IMAGE_CELLS + 1, 700)])
def test_cells_of_a_large_matrix_are_means_of_blocks_that_cover_it(shape: tuple[int, int]) -> None:
    S = torch.rand(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    image = summarise(S).image
    assert image.shape == tuple(min(size, IMAGE_CELLS) for size in shape)
    edges = [
        np.linspace(0, size, cells + 1).round().astype(int) for size, cells in zip(shape, image.shape, strict=True)
    ]
    for row, column in ((0, 0), (3, 5), (image.shape[0] - 1, image.shape[1] - 1)):
        block = S[edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]]
        assert image[row, column] == pytest.approx(float(block.double().mean()), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (70, 50)])
def test_the_share_is_what_the_largest_weights_hold(shape: tuple[int, int]) -> None:
    S = torch.rand(shape, generator=torch.Generator().manual_seed(0)).pow(4)
    found = summarise(S)
    ordered = sorted(S.flatten().tolist(), reverse=True)
    assert len(found.kept) == min(CURVE_POINTS, S.numel() + 1)
    assert (found.kept[0], found.share[0], found.kept[-1], found.share[-1]) == (0, 0, 1, 1)
    for part, share in zip(found.kept, found.share, strict=True):
        assert share == pytest.approx(sum(ordered[: round(part * S.numel())]) / sum(ordered), rel=1e-6, abs=1e-12)


def test_values_that_are_counted_together_share_their_sum_and_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    S = torch.rand(70, 50, generator=torch.Generator().manual_seed(0)).pow(4)
    exact = summarise(S).share
    monkeypatch.setattr(importance, "CHUNK", 999)
    np.testing.assert_allclose(summarise(S).share, exact, rtol=1e-12)
    monkeypatch.setattr(importance, "BUCKET_BITS", 12)  # 8 of the exponent and 3 of the mantissa: 1 part in 8
    coarse = summarise(S).share
    assert 0 < np.abs(coarse - exact).max() < 1e-2
    equal = summarise(torch.full((40, 50), 0.3))
    np.testing.assert_allclose(equal.share, equal.kept, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, float("nan"), -float("nan"), float("inf")])
def test_what_has_no_finite_sum_above_zero_has_no_share(value: float) -> None:
    assert np.isnan(summarise(torch.full((4, 8), value)).share).all()
