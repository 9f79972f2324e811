"""The entropy's kernels against float64 and the obvious composition."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from drotator import entropy_kernel
from drotator.products import GRADIENT8
from drotator.scores import entropy_along, sloped, summed, two_passes

IS_INTERPRETED = bool(find_spec("triton")) and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1 to run on a CPU")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=needs_interpreter)]
)
by_strength = pytest.mark.parametrize("has_strength", [False, True], ids=["no-strength", "strength"])
SHAPES = [(16, 128), (48, 384), (400, 1280)]  # fewer and more tiles than parts


@pytest.fixture
def prepared(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name the device on which the kernels now work."""
    if device == "cpu":
        monkeypatch.setattr(entropy_kernel, "HAS_PTX", False)
        monkeypatch.setattr(entropy_kernel, "is_available", lambda *_: True)
        monkeypatch.setattr(entropy_kernel, "GRADIENT8", torch.float32)  # Triton's interpreter rounds 0.49 to 0.25
    return device


def draw(shape: tuple[int, int], has_strength: bool, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """T with a row, a column and an entry of zeros, a scale and a strength."""
    generator = torch.Generator().manual_seed(0)
    T = 100 * torch.randn(shape, generator=generator).bfloat16()
    T[3], T[:, 5], T[0, 0] = 0, 0, 0
    scale, strength = (torch.rand(shape[0], generator=generator) + 0.5 for _ in range(2))
    return T.to(device), scale.to(device) / 100, strength.to(device) if has_strength else None


def in_float64(T: Tensor, scale: Tensor, strength: Tensor | None) -> tuple[Tensor, ...]:
    wide = [None if part is None else part.cpu().double() for part in (T, scale, strength)]
    score = entropy_along(0)
    value, unit, marks = summed(*wide, None, score.summary)  # type: ignore[arg-type]
    return value, *sloped(*wide, None, unit, marks, score.slope, torch.float64)  # type: ignore[arg-type]


@devices
@by_strength
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_follow_float64(prepared: str, shape: tuple[int, int], has_strength: bool) -> None:
    given = draw(shape, has_strength, prepared)
    value, D, by_row_strength, by_row = two_passes(*given, None, entropy_along(0), GRADIENT8)
    assert D.shape == shape and D.device.type == prepared and D.dtype == entropy_kernel.GRADIENT8
    expected_value, expected, *of_rows = in_float64(*given)
    torch.testing.assert_close(value.cpu().double(), expected_value, rtol=1e-5, atol=0)
    for found, reference in zip((by_row_strength, by_row), of_rows, strict=True):
        torch.testing.assert_close(found.cpu().double(), reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    found, reference = (part.cpu().float().to(GRADIENT8).double() for part in (D, expected))
    assert (found != reference).double().mean() < 1e-3  # of values in the middle between two
    torch.testing.assert_close(found, reference, rtol=0.26, atol=1e-4)


@devices
def test_what_is_larger_than_8_bits_hold_is_held_at_their_largest(prepared: str) -> None:
    T = torch.full((16, 128), 1.0, dtype=torch.bfloat16, device=prepared)
    ones, weight = torch.ones(16, device=prepared), torch.full((128,), 1e6, device=prepared)
    D, _ = entropy_kernel.slopes(T, ones, None, torch.full((128,), -1.0, device=prepared), weight)
    assert D.float().eq(-torch.finfo(GRADIENT8).max).all()


@devices
def test_what_is_not_a_number_stays_none(prepared: str) -> None:
    T = torch.ones(16, 128, dtype=torch.bfloat16, device=prepared)
    T[2, 7] = math.nan
    ones = torch.ones(16, device=prepared)
    value, *_ = two_passes(T, ones, None, None, entropy_along(0), GRADIENT8)
    assert value.isnan()


def test_other_weights_and_machines_take_the_compiled_passes() -> None:
    assert not entropy_kernel.is_available(torch.ones(16, 128, dtype=torch.bfloat16), None)
    if torch.cuda.is_available():
        T = torch.ones(32, 256, dtype=torch.bfloat16, device="cuda")
        for other in (T.float(), T[:, :100].contiguous(), T[:, :128]):
            assert not entropy_kernel.is_available(other, None)
        assert not entropy_kernel.is_available(T, T.new_ones(()).float().expand(32))
