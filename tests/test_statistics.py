"""Second moments and activations against plain hooks in a full forward pass of transformers' model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calls_of, families, some_tokens, tiny_model, tiny_source
from torch import Tensor

from drotator import statistics
from drotator.architecture import ModelSource, hidden_states, linear
from drotator.offload import Batches
from drotator.rotation import Rotation, fold_norms, merge_rotation
from drotator.statistics import (
    SENSITIVITY_BATCHES,
    ActivationStream,
    add_moments,
    collect_hessians,
    collect_sensitivities,
    mirror,
    product,
)

CPU = torch.device("cpu")
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
}
MODELS = [(family, {}) for family in ("llama", "mistral", "qwen2", "qwen3")] + list(SLIDING.items())
by_model = pytest.mark.parametrize(
    ("family", "changes"), MODELS, ids=[f"{family}{'-sliding' if changes else ''}" for family, changes in MODELS]
)


@torch.no_grad()
def moments_of_the_whole_model(model: Any, source: ModelSource, windows: Tensor) -> list[dict[str, Tensor]]:
    """Gather every linear's inputs in one forward pass of the model, all windows at once: H in float64, by layer."""
    gathered: dict[tuple[int, str], Tensor] = {}

    def keep(index: int, inputs: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            gathered[index, inputs] = args[0].flatten(0, 1).double()

        return hook

    for index, layer in enumerate(model.model.layers):
        for inputs, names in source.spec.inputs.items():
            layer.get_submodule(names[-1]).register_forward_pre_hook(keep(index, inputs))
    model(windows)
    return [
        {inputs: 2 / len(x) * x.T @ x for (at, inputs), x in gathered.items() if at == index}
        for index in range(source.num_layers)
    ]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is torch.float32
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-5 * expected.norm()


@by_model
def test_moments_and_hidden_states_are_those_of_the_whole_model(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family, **changes)
    model, windows = tiny_model(family, **changes), some_tokens(5, 11)
    expected = moments_of_the_whole_model(model, source, windows)
    stream = ActivationStream.start(source, windows, 2, CPU)  # batches of 2, 2 and 1
    for index in range(source.num_layers):
        layer = source.layer(index)
        found = collect_hessians(layer, source.spec, stream, index, tuple(source.spec.inputs))
        assert found.keys() == set(source.spec.inputs)
        for inputs, H in found.items():
            assert H.shape == (source.sizes.input_size(inputs),) * 2
            assert_close(H, expected[index][inputs])
        stream.advance(layer, index, None)
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(torch.cat(list(stream.hidden))))
        torch.testing.assert_close(logits, model(windows).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), SLIDING.items(), ids=list(SLIDING))
def test_a_sliding_window_changes_the_moments(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for name, settings in (("full", {}), ("sliding", changes)):
        source = tiny_source(tmp_path / name, family, **settings)
        stream = ActivationStream.start(source, some_tokens(2, 11), 2, CPU)
        last = source.num_layers - 1
        found.append(collect_hessians(source.layer(last), source.spec, stream, last, ("output",))["output"])
    assert (found[0] - found[1]).norm() > 1e-2 * found[0].norm()


@families
def test_a_layer_in_another_basis_has_the_same_moments_in_that_basis(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family)
    rotation = Rotation.random(source.sizes, torch.Generator().manual_seed(0))
    layer, folded = source.layer(1), source.layer(1)
    weights = fold_norms(folded, source.spec)
    merged = copy.deepcopy(folded)
    merge_rotation(merged, source.spec, source.sizes, rotation, weights)
    dense_stream = ActivationStream.start(source, some_tokens(3), 2, CPU)
    stream = ActivationStream.start(source, some_tokens(3), 2, CPU)
    wanted = tuple(source.spec.inputs)
    dense = collect_hessians(folded, source.spec, dense_stream, 1, wanted)
    found = collect_hessians(merged, source.spec, stream, 1, wanted, rotation.R1)
    R_output = torch.block_diag(*(R for R in rotation.R2 for _ in range(2)))
    bases = {"attention": rotation.R1, "output": R_output, "mlp": rotation.R1, "down": torch.eye(48).double()}
    for inputs, R in bases.items():
        assert_close(found[inputs], R.T @ dense[inputs].double() @ R)
    dense_stream.advance(layer, 1, None)
    stream.advance(merged, 1, rotation.R1)
    torch.testing.assert_close(stream.hidden, dense_stream.hidden, rtol=1e-4, atol=1e-4)


def test_only_what_is_wanted_is_collected_and_the_pass_ends_there(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer = source.layer(0)
    calls: list[str] = []
    for name in source.spec.linears:
        linear(layer, name).register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    stream = ActivationStream.start(source, some_tokens(), 2, CPU)
    everything = collect_hessians(layer, source.spec, stream, 0, tuple(source.spec.inputs))
    calls.clear()
    found = collect_hessians(layer, source.spec, stream, 0, ("output", "attention"))
    assert found.keys() == {"attention", "output"}
    assert source.spec.gate not in calls
    assert all(torch.equal(H, everything[inputs]) for inputs, H in found.items())
    calls.clear()
    stream.advance(layer, 0, None)  # no hook of the collection is left behind
    assert len(calls) == len(source.spec.linears)


def test_moments_are_float32_sums_of_a_bfloat16_layers_inputs(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", torch.bfloat16)
    stream = ActivationStream.start(source, some_tokens(3), 2, CPU)
    assert stream.hidden[0].dtype is torch.bfloat16
    layer = source.layer(0)
    H = collect_hessians(layer, source.spec, stream, 0, ("attention",))["attention"]
    with torch.no_grad():
        x = layer.get_submodule(source.spec.attention_norm)(torch.cat(list(stream.hidden))).flatten(0, 1).double()
    assert_close(H, 2 / len(x) * x.T @ x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_moments_of_any_dtype_have_float32_products_and_sums(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "MOMENT_ROWS", 24)
    monkeypatch.setattr(statistics, "MOMENT_ROWS_OF_CPU", 24)
    monkeypatch.setattr(statistics, "MOMENT_TOKENS", 300)
    x = (torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) + 1).to(device, dtype)
    H = torch.zeros(64, 64, device=device)
    for part in x.split(900):
        add_moments(H, part)
    mirror(H)
    exact = x.double().T @ x.double()
    assert ((H - exact).abs() <= 1e-6 * exact.diagonal().max()).all()  # 16-bit products would be off by 1e-3
    assert product(x[None], x[None]).dtype is torch.float32
    torch.testing.assert_close(product(x[None], x[None])[0].double(), exact, rtol=1e-5, atol=1e-5 * float(exact.max()))


@by_model
def test_attention_that_is_kept_is_not_run_again_and_nothing_changes(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family, torch.bfloat16, **changes)
    R1 = Rotation.random(source.sizes, torch.Generator().manual_seed(0)).R1
    found = []
    for keep in (False, True):
        layer, spec = source.layer(1), source.spec
        runs: list[str] = []
        linear(layer, spec.key).register_forward_pre_hook(lambda _, __, runs=runs: runs.append(""))
        stream = ActivationStream.start(source, some_tokens(5, 11), 2, CPU)
        results = collect_hessians(layer, spec, stream, 1, ("output",), R1, keep_attention=keep)
        for inputs in ("mlp", "down"):  # what is pruned next is seen by what comes after it
            linear(layer, spec.inputs["output" if inputs == "mlp" else inputs][0]).weight.mul_(0.5)
            results |= collect_hessians(layer, spec, stream, 1, (inputs,), R1)
        stream.advance(layer, 1, R1)
        assert len(runs) == (3 if keep else 4 * 3)
        results |= {str(position): hidden for position, hidden in enumerate(stream.hidden)}
        stream.advance(layer, 1, R1)  # of other inputs it is another one
        assert len(runs) == (3 + 3 if keep else 5 * 3)
        found.append(results)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_output_that_is_not_finite_names_its_layer(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer = source.layer(1)
    linear(layer, source.spec.down).weight[0, 0] = torch.inf
    with pytest.raises(RuntimeError, match="Layer 1: its output is not finite"):
        ActivationStream.start(source, some_tokens(), 2, CPU).advance(layer, 1, None)


def test_moments_that_are_not_finite_name_their_layer_and_inputs(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer = source.layer(2)
    linear(layer, source.spec.up).weight[0, 0] = torch.nan
    stream = ActivationStream.start(source, some_tokens(), 2, CPU)
    collect_hessians(layer, source.spec, stream, 2, ("mlp",))
    with pytest.raises(RuntimeError, match=r"Layer 2: .*inputs of down are not finite"):
        collect_hessians(layer, source.spec, stream, 2, ("mlp", "down"))


def exact_sensitivities(source: ModelSource, layer: Any, stream: ActivationStream, index: int) -> dict[str, Tensor]:
    """Moments J^T J of each linear's outputs, one backward pass for each output of the layer: (d_out, d_out)."""
    outputs: dict[str, Tensor] = {}
    for name in source.spec.linears:
        linear(layer, name).register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
    found: dict[str, Tensor] = {}
    num_tokens = 0
    for hidden, kwargs in calls_of(stream, index, None):
        y = hidden_states(layer(hidden.detach().requires_grad_(), **kwargs))
        num_tokens += y.shape[0] * y.shape[1]
        for value in y.flatten():
            for name, gradient in zip(
                outputs, torch.autograd.grad(value, list(outputs.values()), retain_graph=True), strict=True
            ):
                g = gradient.flatten(0, 1)
                found[name] = found.get(name, torch.zeros(g.shape[1], g.shape[1])) + g.mT @ g
    return {name: moments / num_tokens for name, moments in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sensitivities_are_those_of_the_jacobian(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family)
    stream = ActivationStream.start(source, some_tokens(2, 5), 1, CPU)
    stream.advance(source.layer(0), 0, None)
    exact = exact_sensitivities(source, source.layer(1), stream, 1)
    layer, spec = source.layer(1), source.spec
    drawn = [collect_sensitivities(layer, spec, source.sizes, stream, 1, seed) for seed in range(600)]
    assert all(not module._forward_hooks for module in layer.modules())
    expected = {name: exact[name].diagonal() for name in (spec.query, spec.key, spec.gate, spec.up)}
    expected |= {name: exact[name].diagonal().mean() for name in (spec.output, spec.down)}
    expected[spec.value] = torch.stack([exact[spec.value][:12, :12], exact[spec.value][12:, 12:]])
    for name, wanted in expected.items():
        estimates = torch.stack([draw[name] for draw in drawn])
        assert estimates.dtype is torch.float32
        assert estimates.shape[1:] == wanted.shape
        standard_error = estimates.std(0) / len(drawn) ** 0.5
        assert ((estimates.mean(0) - wanted).abs() <= 5 * standard_error + 1e-6).all(), name
        assert (estimates.mean(0) - wanted).norm() < 0.1 * wanted.norm(), name  # and the errors are small


def test_sensitivities_of_a_seed_are_the_same_and_the_residual_streams_are_one(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    stream = ActivationStream.start(source, some_tokens(4, 8), 2, CPU)
    first, second = (collect_sensitivities(source.layer(0), source.spec, source.sizes, stream, 0, 3) for _ in range(2))
    assert first.keys() == set(source.spec.linears)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(first[source.spec.down]) == pytest.approx(1, abs=0.2)  # it is added to the layer's output as it is


def test_a_fork_leaves_the_stream_where_it_is(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    stream = ActivationStream.start(source, some_tokens(3, 8), 2, CPU)
    before = [hidden.clone() for hidden in stream.hidden]
    stream.dense = stream.hidden.copy()
    ahead = stream.fork()
    assert ahead.dense is None  # a look ahead needs no targets, and must not hold on to them
    ahead.advance(source.layer(0), 0, None)
    assert all(torch.equal(hidden, old) for hidden, old in zip(stream.hidden, before, strict=True))
    stream.advance(source.layer(0), 0, None)
    assert all(torch.equal(hidden, other) for hidden, other in zip(stream.hidden, ahead.hidden, strict=True))


def test_the_dense_stream_is_what_the_dense_layers_make_of_its_inputs(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    stream = ActivationStream.start(source, some_tokens(3, 8), 2, CPU)
    expected = stream.fork()
    stream.dense = stream.hidden.copy()
    for index in range(2):
        stream.advance_dense(source.layer(index), index, stream.dense)
        expected.advance(source.layer(index), index, None)
    assert all(torch.equal(dense, hidden) for dense, hidden in zip(stream.dense, expected.hidden, strict=True))
    assert not any(torch.equal(dense, hidden) for dense, hidden in zip(stream.dense, stream.hidden, strict=True))


def outputs_of(layer: Any, stream: ActivationStream, index: int) -> list[Tensor]:
    with torch.no_grad():
        return [hidden_states(layer(hidden, **kwargs)) for hidden, kwargs in calls_of(stream, index, None)]


def test_dense_goes_on_by_the_inputs_that_are_given_and_alone(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "qwen2", **SLIDING["qwen2"])
    stream, model = ActivationStream.start(source, some_tokens(3, 11), 2, CPU), tiny_model("qwen2", **SLIDING["qwen2"])
    stream.dense = stream.hidden.copy()
    states: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: states.append(hidden_states(output)))
    with torch.no_grad():
        model(some_tokens(3, 11))
    for index in range(source.num_layers):
        inputs = [hidden.clone() for hidden in stream.hidden]
        stream.advance_dense(source.layer(index), index, stream.dense)
        torch.testing.assert_close(torch.cat(list(stream.dense)), states[index], rtol=1e-4, atol=1e-4)
        assert all(torch.equal(*pair) for pair in zip(stream.hidden, inputs, strict=True))
    # Of the inputs of a pruned model it is the dense layer's output on them.
    other = Batches(CPU, batches=[hidden + 1 for hidden in stream.hidden])
    stream.advance_dense(source.layer(1), 1, other)
    expected = outputs_of(source.layer(1), ActivationStream(other, stream.calls, CPU), 1)
    assert all(torch.equal(*pair) for pair in zip(stream.dense, expected, strict=True))


@families
def test_sensitivities_have_a_number_for_an_output_and_moments_within_value_heads(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, torch.bfloat16)
    spec = source.spec
    stream = ActivationStream.start(source, some_tokens(3), 2, CPU)
    found = collect_sensitivities(source.layer(0), spec, source.sizes, stream, 0, seed=0)
    shapes = {spec.query: (48,), spec.key: (24,), spec.gate: (48,), spec.up: (48,), spec.value: (2, 12, 12)}
    assert {name: tuple(moments.shape) for name, moments in found.items()} == {
        **shapes,
        spec.output: (),
        spec.down: (),
    }
    for name, moments in found.items():
        assert moments.dtype is torch.float32
        assert not moments.requires_grad
        diagonal = moments.diagonal(dim1=-2, dim2=-1) if name == spec.value else moments
        assert (diagonal > 0).all(), name
    assert torch.equal(found[spec.value], found[spec.value].mT)
    assert (torch.linalg.eigvalsh(found[spec.value].double()) > -1e-5 * found[spec.value].abs().max()).all()


def test_sensitivities_are_drawn_by_their_seed_and_leave_layer_and_stream_as_they_were(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    stream, layer = ActivationStream.start(source, some_tokens(3), 2, CPU), source.layer(0)
    hidden = [batch.clone() for batch in stream.hidden]
    before = outputs_of(layer, stream, 0)
    torch.manual_seed(0)
    first = collect_sensitivities(layer, source.spec, source.sizes, stream, 0, seed=5)
    torch.manual_seed(1)
    again, other = (collect_sensitivities(layer, source.spec, source.sizes, stream, 0, seed) for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(*pair) for pair in zip(stream.hidden, hidden, strict=True))
    assert all(torch.equal(*pair) for pair in zip(outputs_of(layer, stream, 0), before, strict=True))
    assert not any(module._forward_hooks for module in layer.modules())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_the_first_batches_are_enough_for_sensitivities(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    layer = source.layer(0)
    long, short = (
        ActivationStream.start(source, some_tokens(6)[: 2 * batches], 2, CPU) for batches in (3, SENSITIVITY_BATCHES)
    )
    assert len(long.hidden) > len(short.hidden)
    found = [collect_sensitivities(layer, source.spec, source.sizes, stream, 0, seed=0) for stream in (long, short)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
