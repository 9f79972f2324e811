"""2:4 linears by torch's kernels: what is asked of cuSPARSELt, and what `drotator bench` says of single linears."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmark import bench_settings
from tiny_models import tiny_source
from torch import Tensor, nn

from drotator.benchmark import run_bench
from drotator.benchmark_products import distinct_linears
from drotator.bounds import SPARSE_SIZE, product
from drotator.pruners.masks import apply_mask, grouped_mask
from drotator.semi_structured import DEFAULT, Algorithm, Product, SearchedLinear, fastest_algorithm, search

FASTEST = Algorithm(7)


class Library:
    """Stands for cuSPARSELt on a CPU: the compressed weight is the weight, and calls are written down.

    wrong: the algorithm whose results are.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: int = -1) -> None:
        self.wrong = wrong
        self.algorithms: list[Algorithm] = []
        self.searched: list[tuple[int, ...]] = []
        monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight.clone())
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.multiply)
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", self.search)

    def multiply(
        self,
        packed: Tensor,
        B: Tensor,
        *,
        bias: Tensor | None,
        transpose_result: bool,
        alg_id: int,
        split_k: int,
        split_k_mode: int,
    ) -> Tensor:
        assert B.shape[1] % 8 == 0 and (B.is_contiguous() or B.t().is_contiguous())
        self.algorithms.append(Algorithm(alg_id, split_k, split_k_mode))
        y = packed @ B if bias is None else packed @ B + bias[:, None]
        y = torch.zeros_like(y) if alg_id == self.wrong else y
        return y.t().contiguous() if transpose_result else y

    def search(self, packed: Tensor, B: Tensor, **asked: Any) -> int:
        self.searched.append((*packed.shape, B.shape[1], asked["transpose_result"]))
        return FASTEST.number


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drotator.measurement.BUDGET_SECONDS", 0.002)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch)


def dense_linear(d_in: int, d_out: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Linear whose weights are 2:4."""
    dense = nn.Linear(d_in, d_out, bias=bias).to(dtype).requires_grad_(False)
    dense.weight.copy_(apply_mask(dense.weight, grouped_mask(dense.weight.float().abs(), 2, 4)))
    return dense


@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 1, 16), (16, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_searched_linear_gives_what_the_dense_one_gives_and_takes_what_was_found(library, shape, bias):
    dense = dense_linear(16, 32, bias=bias)
    own, x = SearchedLinear(dense), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(own(x), dense(x))
        assert library.algorithms == [DEFAULT]
        num_tokens = -(-x.numel() // 16 // 8) * 8
        assert search(own, lambda: own(x)) == {"product": FASTEST}
        assert library.searched == [(32, 16, num_tokens, True)]
        library.algorithms.clear()
        torch.testing.assert_close(own(x), dense(x))
        assert own(x).is_contiguous()
        own(torch.randn(100, 16))
        assert library.algorithms == [FASTEST, FASTEST, DEFAULT], "another number of tokens has another algorithm"


def test_the_search_is_made_once_for_a_number_of_tokens_and_leaves_nothing_behind(library):
    layer = nn.Sequential(SearchedLinear(dense_linear(16, 16)), SearchedLinear(dense_linear(16, 32)))
    x = torch.randn(8, 16)
    assert search(layer, lambda: layer(x)) == {"0.product": FASTEST, "1.product": FASTEST}
    assert search(layer, lambda: layer(x)) == {}
    layer(torch.randn(24, 16))
    assert len(library.searched) == 2
    assert search(nn.Linear(2, 2), lambda: pytest.fail("there is nothing to search for")) == {}


def test_an_algorithm_with_other_results_than_the_default_is_refused(monkeypatch):
    Library(monkeypatch, wrong=FASTEST.number)
    own = SearchedLinear(dense_linear(16, 32))
    with pytest.raises(RuntimeError, match="algorithm 7 differs from the default by 1 of its size"):
        search(own, lambda: own(torch.randn(8, 16)))
    assert own.product.algorithms == {}


@pytest.mark.parametrize("mode", [1, True])
def test_where_torch_was_built_with_cusparselt_the_search_splits_sums_too(monkeypatch, mode):
    asked = []

    def mm_search(*operands: Any) -> tuple[int, int, int | bool, int]:
        asked.append(operands)
        return 3, 2, mode, 40

    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=mm_search), raising=False)
    W, B = torch.randn(4, 8), torch.randn(8, 8)
    found = fastest_algorithm(W, B, None, transposes=True)
    assert found == Algorithm(3, 2, 1) and str(found) == "3 in 2 parts"
    assert asked == [(W, B, None, None, None, True)]


def test_linears_are_timed_once_for_each_shape(tmp_path):
    source = tiny_source(tmp_path, "llama", head_dim=8)
    found = distinct_linears(source.layer(0), source.spec)
    assert found == ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"]


def test_a_2_of_4_product_has_half_the_operations_and_smaller_weights():
    dense, sparse = product(8, 16, 32), product(8, 16, 32, sparse=True)
    assert sparse.operations == dense.operations / 2
    assert dense.bytes - sparse.bytes == 2 * 16 * 32 * (1 - SPARSE_SIZE)


def bench_rows(folder: Path) -> list[dict[str, Any]]:
    words = ("kind=inference", "bench.batch_size=2", "bench.seqlen=8", "bench.decode=[1,8]")
    run_bench(bench_settings(folder, *words, head_dim=8), folder / "run")
    rows: list[dict[str, Any]] = json.loads((folder / "run" / "bench.json").read_text())
    return rows


def test_bench_times_searched_layers_and_the_linears_alone(library, tmp_path, capsys):
    rows = {row["name"]: row for row in bench_rows(tmp_path)}
    searched = "2:4 cuSPARSELt, searched"
    for call in ("prefill 1 x 8", "prefill 2 x 8", "decode 1 after 8", "decode 8 after 8"):
        assert {f"{call}: {searched}", f"{call}: {searched} + R1", f"model, {call}: {searched}"} < set(rows)
    forms = [
        "dense",
        searched,
        "product alone, x to y, default",
        "product alone, x to y^T, default",
        "product alone, x^T to y, searched",
        "product alone, x^T to y^T, searched",
    ]
    shapes = {"q_proj": (32, 32), "k_proj": (16, 32), "gate_proj": (48, 32), "down_proj": (32, 48)}
    expected = [
        f"{name} ({d_out} x {d_in}), {call}: {form}"
        for call in ("prefill 2 x 8", "decode 8 after 8")
        for name, (d_out, d_in) in shapes.items()
        for form in forms
    ]
    assert [name for name in rows if "_proj" in name] == expected
    dense, sparse = (rows[f"q_proj (32 x 32), prefill 2 x 8: {form}"] for form in ("dense", searched))
    assert sparse["times"] == pytest.approx(dense["milliseconds"] / sparse["milliseconds"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"prefill 2 x 8: algorithms of {searched}: self_attn.q_proj 7, self_attn.k_proj 7" in shown
    assert "decode 8 after 8: how much faster than dense the fastest 2:4 form of each linear is" in shown
    assert f"algorithms of {searched} + R1" not in shown, "the layer with a boundary matrix is the same"


def test_bench_says_where_a_search_fails_and_goes_on(library, tmp_path, monkeypatch, capsys):
    def fail(*args: Any, **kwargs: Any) -> int:
        raise RuntimeError("CUDA error: operation not supported\nand more")

    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", fail)
    names = [row["name"] for row in bench_rows(tmp_path)]
    assert not any(name.endswith("searched") for name in names)
    assert any("product alone, x to y, default" in name for name in names)
    shown = " ".join(capsys.readouterr().out.split())
    reason = "failed: CUDA error: operation not supported."
    assert f"prefill 2 x 8: the search for 2:4 cuSPARSELt, searched {reason}" in shown
    assert f"the search for product alone, x^T to y^T, searched {reason}" in shown


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 256), (2, 96, 256)])
def test_a_searched_linear_gives_what_the_dense_one_gives_on_a_gpu(shape, bias):
    dense = dense_linear(256, 512, bias=bias, dtype=torch.bfloat16).cuda()
    try:
        own = SearchedLinear(dense)
    except RuntimeError as error:
        pytest.skip(f"no cuSPARSELt here: {error}")
    x = torch.randn(shape, device="cuda").bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(own(x), dense(x), rtol=0.02, atol=0.02)
        assert set(search(own, lambda: own(x))) == {"product"}
        torch.testing.assert_close(own(x), dense(x), rtol=0.02, atol=0.02)
        assert own(x).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_cusparselt_reads_and_writes_either_layout(transposes, copied):
    dense = dense_linear(256, 512, dtype=torch.bfloat16).cuda()
    try:
        own = Product(torch._cslt_compress(dense.weight.data), transposes=transposes)
    except RuntimeError as error:
        pytest.skip(f"no cuSPARSELt here: {error}")
    x = torch.randn(64, 256, device="cuda").bfloat16()
    B = x.t().contiguous() if copied else x.t()
    with torch.no_grad():
        search(own, lambda: own(B))
        y = own(B)
        assert y.is_contiguous()
        torch.testing.assert_close(y if transposes else y.t(), dense(x), rtol=0.02, atol=0.02)
