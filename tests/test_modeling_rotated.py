"""Rotated models against plain ones: the same function, and everything that users do with a model of transformers."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BIASED, SIZES, families, some_tokens, tiny_model, without_float32
from torch import Tensor

from drotator import modeling_rotated
from drotator.modeling_rotated import ROTATED_FAMILIES

SEEN_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def plain_and_rotated(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """Build a random plain model, every parameter of which matters, and its rotated twin with identity boundaries."""
    rotated_family = ROTATED_FAMILIES[family]
    plain = tiny_model(family, **settings)
    rotated = rotated_family.causal_lm(rotated_family.config(**(SIZES | BIASED.get(family, {}) | settings))).eval()
    missing, unexpected = rotated.load_state_dict(plain.state_dict(), strict=False)
    assert all("boundary" in name for name in missing)
    assert not unexpected
    return plain.to(dtype), rotated.to(dtype)


def random_orthogonal() -> Tensor:
    return torch.linalg.qr(torch.randn(SIZES["hidden_size"], SIZES["hidden_size"], dtype=torch.float64))[0]


def with_random_boundaries(family: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    model = plain_and_rotated(family, dtype, **settings)[1]
    with torch.no_grad():
        for layer in model.model.layers[:-1]:
            layer.boundary.weight.copy_(random_orthogonal())
    return model


def merge(model: Any, rotations: list[Tensor]) -> None:
    """Write every layer in a basis of its own, straight from the formulas, with B = R_l^T R_{l+1} between layers."""
    state = dict(model.named_parameters())
    with torch.no_grad():
        state["model.embed_tokens.weight"].copy_(state["model.embed_tokens.weight"] @ rotations[0])
        for i, rotation in enumerate(rotations):
            layer = f"model.layers.{i}."
            for norm, readers in (("input_layernorm", SEEN_INPUTS[:3]), ("post_attention_layernorm", SEEN_INPUTS[3:])):
                for reader in readers:
                    weight = state[f"{layer}{reader}.weight"]
                    weight.copy_(weight * state[f"{layer}{norm}.weight"] @ rotation)
                state[f"{layer}{norm}.weight"].fill_(1)
            for writer in WRITERS:
                weight = state[f"{layer}{writer}.weight"]
                weight.copy_(rotation.T @ weight)
                if (bias := state.get(f"{layer}{writer}.bias")) is not None:
                    bias.copy_(bias @ rotation)
            if f"{layer}boundary.weight" in state:
                state[f"{layer}boundary.weight"].copy_((rotation.T @ rotations[i + 1]).T)
        head = state["lm_head.weight"]
        head.copy_(head * state["model.norm.weight"] @ rotations[-1])
        state["model.norm.weight"].fill_(1)


@families
@torch.no_grad()
def test_identity_boundaries_give_the_plain_models_logits_exactly(family: str) -> None:
    plain, rotated = plain_and_rotated(family)
    assert torch.equal(rotated(some_tokens()).logits, plain(some_tokens()).logits)


@families
@torch.no_grad()
def test_a_basis_for_each_layer_leaves_the_logits_unchanged(family: str) -> None:
    plain, rotated = (without_float32(model) for model in plain_and_rotated(family, torch.float64))
    expected = plain(some_tokens()).logits
    merge(rotated, [random_orthogonal() for _ in rotated.model.layers])
    assert (rotated(some_tokens()).logits - expected).abs().max() < 1e-9
    rotated.model.layers[0].boundary.weight.copy_(torch.eye(SIZES["hidden_size"]))
    assert (rotated(some_tokens()).logits - expected).abs().max() > 1e-2


@families
@torch.no_grad()
def test_every_layer_but_the_last_has_a_boundary_under_its_contract_name(family: str) -> None:
    _, rotated = plain_and_rotated(family)
    boundaries = {name: p.shape for name, p in rotated.named_parameters() if "boundary" in name}
    d = SIZES["hidden_size"]
    assert boundaries == {f"model.layers.{i}.boundary.weight": (d, d) for i in range(2)}


@families
@pytest.mark.parametrize("listed", [[], [0], [1], [0, 1]])
@torch.no_grad()
def test_the_layers_that_the_config_lists_have_a_boundary_and_no_others(family: str, listed: list[int]) -> None:
    rotated_family = ROTATED_FAMILIES[family]
    sizes = SIZES | BIASED.get(family, {})
    rotated = rotated_family.causal_lm(rotated_family.config(**sizes, boundary_layers=listed)).eval()
    names = {name for name, _ in rotated.named_parameters() if "boundary" in name}
    assert names == {f"model.layers.{i}.boundary.weight" for i in listed}
    assert [type(layer) is rotated_family.layer for layer in rotated.model.layers] == [i in listed for i in range(3)]
    # The basis changes there alone.
    plain = tiny_model(family, torch.float64)
    rotated.double().load_state_dict(plain.state_dict(), strict=False)
    bases = [random_orthogonal()]
    for i in range(2):
        bases.append(random_orthogonal() if i in listed else bases[-1])
    plain, rotated = without_float32(plain), without_float32(rotated)
    expected = plain(some_tokens()).logits
    merge(rotated, bases)
    assert (rotated(some_tokens()).logits - expected).abs().max() < 1e-9


@families
def test_a_list_of_boundaries_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    rotated_family = ROTATED_FAMILIES[family]
    sizes = SIZES | BIASED.get(family, {})
    model = rotated_family.causal_lm(rotated_family.config(**sizes, boundary_layers=[1])).eval()
    with torch.no_grad():
        model.model.layers[1].boundary.weight.copy_(random_orthogonal())
        expected = model(some_tokens()).logits
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["boundary_layers"] == [1]
        loaded = rotated_family.causal_lm.from_pretrained(tmp_path)
        assert loaded.config.boundary_layers == [1]
        assert torch.equal(loaded(some_tokens()).logits, expected)


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generating_a_left_padded_batch_equals_generating_each_row(family: str, attention: str) -> None:
    model = with_random_boundaries(family, torch.float32, attn_implementation=attention)
    rows = [some_tokens(1, 9), some_tokens(1, 9)[:, 4:]]
    expected = [model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=6)[0, -6:] for row in rows]
    padded = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (4, 0))])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=6)[:, -6:], torch.stack(expected))
    assert not torch.equal(expected[0], expected[1])


@families
def test_generating_with_a_cache_equals_generating_without(family: str) -> None:
    model, tokens = with_random_boundaries(family), some_tokens()
    mask = torch.ones_like(tokens)
    cached, plain = (
        model.generate(tokens, attention_mask=mask, max_new_tokens=8, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert len(cached[0, -8:].unique()) > 4  # not one token again and again


@families
@torch.no_grad()
def test_sdpa_and_eager_attention_and_bfloat16_agree(family: str) -> None:
    expected = with_random_boundaries(family)(some_tokens()).logits
    eager = with_random_boundaries(family, attn_implementation="eager")(some_tokens()).logits
    assert (eager - expected).abs().max() < 1e-4 * expected.abs().max()
    model = with_random_boundaries(family, torch.bfloat16)
    low = model(some_tokens()).logits
    exact = model.double()(some_tokens()).logits
    assert low.dtype is torch.bfloat16
    assert (low - exact).norm() < 0.15 * exact.norm()


@families
@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded(family: str) -> None:
    model = with_random_boundaries(family, attn_implementation="eager")
    outputs = model(some_tokens(), output_hidden_states=True, output_attentions=True)
    states = outputs.hidden_states
    assert len(states) == SIZES["num_hidden_layers"] + 1
    assert len(outputs.attentions) == SIZES["num_hidden_layers"]
    recorded: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: recorded.append(args[0]))
    model(some_tokens())
    assert torch.equal(states[1], recorded[0])  # after the boundary, in the next layer's basis


@families
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = with_random_boundaries(family).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(some_tokens(), labels=some_tokens(), use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-9) for name in gradients[0])
    assert gradients[0]["model.layers.0.boundary.weight"].abs().max() > 0


@families
@torch.no_grad()
def test_a_model_saved_and_loaded_and_saved_again_keeps_its_logits(family: str, tmp_path: Path) -> None:
    model = with_random_boundaries(family, torch.float32)
    expected = model(some_tokens()).logits
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        assert (folder / "modeling_rotated.py").read_bytes() == Path(modeling_rotated.__file__).read_bytes()
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        names = {name: getattr(modeling_rotated, reference.split(".")[1]) for name, reference in auto_map.items()}
        assert names == {"AutoConfig": type(model.config), "AutoModelForCausalLM": type(model)}
        model = ROTATED_FAMILIES[family].causal_lm.from_pretrained(folder)
        assert torch.equal(model(some_tokens()).logits, expected)


@families
@pytest.mark.filterwarnings("ignore:Current model requires:UserWarning")
def test_an_automatic_device_map_keeps_a_layer_and_its_boundary_together(family: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = with_random_boundaries(family, torch.float32)
    layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in model.model.embed_tokens.parameters())
    for extra in range(0, 3 * layer_bytes, layer_bytes // 5):
        devices = accelerate.infer_auto_device_map(
            model,
            max_memory={0: outside + extra, "cpu": 10**9},
            no_split_module_classes=list(model._no_split_modules),
        )
        assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in devices)
    model.save_pretrained(tmp_path)
    loaded = ROTATED_FAMILIES[family].causal_lm.from_pretrained(tmp_path, device_map="auto")
    with torch.no_grad():
        device = next(loaded.parameters()).device
        torch.testing.assert_close(loaded(some_tokens().to(device)).logits.cpu(), model(some_tokens()).logits)


@families
def test_classes_are_attributes_of_their_module_under_their_own_names(family: str) -> None:
    for cls in ROTATED_FAMILIES[family]:
        assert getattr(sys.modules[cls.__module__], cls.__name__) is cls
        assert cls.__module__ == "drotator.modeling_rotated"
    assert ROTATED_FAMILIES[family].config.model_type == f"drotator_{family}"
    assert ROTATED_FAMILIES[family].causal_lm.config_class is ROTATED_FAMILIES[family].config


def test_the_file_imports_torch_and_transformers_only() -> None:
    tree = ast.parse(Path(modeling_rotated.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {f"{'.' * node.level}{node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"__future__", "typing", "torch", "transformers"}
