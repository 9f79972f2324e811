"""Which models are taken, which are refused and why, and weights read layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import families, some_tokens, tiny_model, tiny_source
from torch import nn

from drotator.architecture import FAMILIES, REFUSED, ModelSource, embed, hidden_states, linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def edit_config(folder: Path, *, without: tuple[str, ...] = (), **entries: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in without}))


def edit_tensors(folder: Path, *, without: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[without]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("model_type", [*REFUSED, "martian", "bert"])
def test_a_model_that_cannot_be_rotated_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"'{model_type}'.*cannot be rotated") as refusal:
        ModelSource.open(tmp_path)
    message = str(refusal.value)
    assert REFUSED.get(model_type, "no entry of the family table") in message
    assert str(tmp_path) in message
    assert all(family in message for family in FAMILIES)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gemma", "1 + weight"),
        ("gemma3", "normalises after"),
        ("olmo2", "normalises after"),
        ("cohere", "subtracts the mean"),
        ("phi3", "fused"),
        ("qwen3_moe", "mixture of experts"),
        ("drotator_llama", "already"),
    ],
)
def test_the_reason_is_that_of_the_models_structure(model_type: str, words: str) -> None:
    assert words in REFUSED[model_type]
    assert model_type not in FAMILIES


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "not JSON", "without a type"])
def test_a_folder_without_a_readable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        ModelSource.open(tmp_path)


def test_a_config_with_wrong_values_is_refused_with_its_file(tmp_path: Path) -> None:
    tiny_source(tmp_path, "llama")
    edit_config(tmp_path, hidden_size="wide")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        ModelSource.open(tmp_path)


@families
def test_quantised_weights_are_refused(family: str, tmp_path: Path) -> None:
    tiny_source(tmp_path, family)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised weights; give the float checkpoint"):
        ModelSource.open(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    tiny_source(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors file"):
        ModelSource.open(tmp_path)


def test_a_damaged_file_is_named_when_the_folder_is_opened(tmp_path: Path) -> None:
    tiny_source(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*fetch it again"):
        ModelSource.open(tmp_path)


def test_a_file_damaged_later_is_named_when_a_tensor_is_read(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*fetch it again"):
        source.layer(0)


def test_a_missing_tensor_is_named_when_its_layer_is_read(tmp_path: Path) -> None:
    tiny_source(tmp_path, "llama")
    edit_tensors(tmp_path, without="model.layers.1.mlp.up_proj.bias")
    source = ModelSource.open(tmp_path)
    source.layer(0)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.bias'.*not complete"):
        source.layer(1)


@families
def test_sizes_are_those_of_the_weights(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family)
    sizes, spec, layer = source.sizes, source.spec, source.layer(0)
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.head_dim) == (32, 48, 12)
    assert (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.queries_per_group) == (4, 2, 2)
    assert source.num_layers == 3
    for inputs, names in spec.inputs.items():
        assert all(linear(layer, name).in_features == sizes.input_size(inputs) for name in names)
    assert linear(layer, spec.value).out_features == sizes.num_key_value_heads * sizes.head_dim
    assert set(spec.linears) == {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_head_dim_is_hidden_size_over_heads_where_the_config_has_none(family: str, tmp_path: Path) -> None:
    tiny_source(tmp_path, family, head_dim=8)
    edit_config(tmp_path, without=("head_dim",))
    source = ModelSource.open(tmp_path)
    assert source.sizes.head_dim == 8
    assert linear(source.layer(0), source.spec.output).in_features == 32


def test_head_dim_of_qwen3_is_not_hidden_size_over_heads(tmp_path: Path) -> None:
    assert tiny_source(tmp_path, "qwen3", head_dim=20).sizes.head_dim == 20


@families
def test_layers_hold_their_dense_weights_and_learn_nothing(family: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family)
    state = tiny_model(family).state_dict()
    for index in range(source.num_layers):
        layer = source.layer(index)
        assert not layer.training
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        found = {f"model.layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
        assert found.keys() == {name for name in state if name.startswith(f"model.layers.{index}.")}
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_two_readings_of_a_layer_share_no_memory(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    weights = [linear(source.layer(0), source.spec.gate).weight for _ in range(2)]
    weights[0].zero_()
    assert weights[1].count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_the_dtype_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama", dtype)
    assert source.dtype is dtype
    assert linear(source.layer(0), source.spec.gate).weight.dtype is dtype
    edit_config(tmp_path, without=("dtype",))
    assert ModelSource.open(tmp_path).dtype is dtype


def test_the_dtype_asked_for_wins_and_rounds_the_weights(tmp_path: Path) -> None:
    exact = tiny_source(tmp_path, "llama").tensor("model.embed_tokens.weight")
    source = ModelSource.open(tmp_path, "bfloat16")
    assert torch.equal(source.tensor("model.embed_tokens.weight"), exact.bfloat16())
    assert linear(source.layer(0), source.spec.gate).weight.dtype is torch.bfloat16


@families
def test_a_sharded_checkpoint_reads_as_the_whole_one_does(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = ModelSource.open(tmp_path)
    assert source.files.keys() == model.state_dict().keys()
    for name, tensor in source.layer(2).state_dict().items():
        assert torch.equal(tensor, model.model.layers[2].state_dict()[name])


@families
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_the_embedding_where_they_are_tied(family: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, family, tie_word_embeddings=tied)
    assert source.is_tied is tied
    assert torch.equal(source.head_weight(), source.tensor("model.embed_tokens.weight")) is tied
    assert torch.equal(source.head_weight(), tiny_model(family, tie_word_embeddings=tied).lm_head.weight)


@families
def test_the_skeleton_holds_no_weights_also_after_a_layer_and_the_embeddings_were_read(
    family: str, tmp_path: Path
) -> None:
    source = tiny_source(tmp_path, family)
    source.layer(0)
    hidden: list[torch.Tensor] = []
    calls = embed(source, some_tokens(3).split(2), torch.device("cpu"), hidden.append)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    assert torch.equal(torch.cat(hidden), source.tensor("model.embed_tokens.weight")[some_tokens(3)])
    assert [len(batch) for batch in hidden] == [2, 1]
    assert {size: len(call.per_layer) for size, call in calls.items()} == {2: 3, 1: 3}


def test_hidden_states_are_alone_or_first_of_a_tuple() -> None:
    states = torch.ones(2)
    assert hidden_states(states) is hidden_states((states, torch.zeros(1))) is states
