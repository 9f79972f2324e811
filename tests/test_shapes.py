from __future__ import annotations

import json

import pytest
import torch
import yaml
from tiny_models import families, tiny_config

from drotator.bounds import num_weights
from drotator.config import ModelConfig
from drotator.shapes import SHAPES, random_moments, shapes_of, write_random_model
from drotator.statistics import ActivationStream
from drotator.usage import config_folder, group_options

BILLIONS = {
    "smollm2-135m": 0.1345,
    "llama3-8b": 8.03,
    "llama3-70b": 70.55,
    "llama3.2-1b": 1.236,
    "llama2-7b": 6.738,
    "llama2-13b": 13.016,
    "llama2-70b": 68.98,
    "mistral-7b": 7.248,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76,
    "qwen2.5-72b": 72.71,
    "qwen3-8b": 8.191,
}
"""Parameters, as the models' cards say."""
CPU = torch.device("cpu")


def path_of(model: str) -> str:
    return str(yaml.safe_load((config_folder() / "model" / f"{model}.yaml").read_text())["path"])


def test_the_shapes_of_every_model_option_are_known():
    assert set(BILLIONS) == set(group_options("model")) - {"local"}
    assert {path_of(model) for model in BILLIONS} == set(SHAPES)


@pytest.mark.parametrize("model", BILLIONS)
def test_a_known_shape_has_as_many_parameters_as_the_model(model):
    source = shapes_of(ModelConfig(path=path_of(model)))
    embeddings = source.config.vocab_size * source.sizes.hidden_size * (1 if source.is_tied else 2)
    found = source.num_layers * num_weights(source.sizes) + embeddings
    assert found / 1e9 == pytest.approx(BILLIONS[model], rel=2e-3)


def test_a_folder_with_a_config_is_enough_and_its_own_sizes_are_read(tmp_path):
    tiny_config("qwen3", hidden_size=40).save_pretrained(tmp_path)
    source = shapes_of(ModelConfig(path=str(tmp_path)))
    assert (source.sizes.hidden_size, source.num_layers, source.config.model_type) == (40, 3, "qwen3")
    assert shapes_of(ModelConfig(path=str(tmp_path), dtype="float16")).dtype == torch.float16


@pytest.mark.parametrize("path", ["no/such/folder/here", "model.gguf"])
def test_a_path_that_names_nothing_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"is no folder with a config\.json"):
        shapes_of(ModelConfig(path=path))


def test_a_family_that_cannot_be_rotated_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="cannot be rotated"):
        shapes_of(ModelConfig(path=str(tmp_path)))


@families
def test_a_random_model_has_the_layers_asked_for_and_correlated_activations(tmp_path, family):
    tiny_config(family, vocab_size=1000, pad_token_id=999).save_pretrained(tmp_path / "config")
    shapes = shapes_of(ModelConfig(path=str(tmp_path / "config"), dtype="bfloat16"))
    source = write_random_model(tmp_path / "model", shapes, 2, device=CPU, seed=3)
    assert (source.num_layers, source.dtype, source.sizes) == (2, torch.bfloat16, shapes.sizes)
    assert source.config.vocab_size == 4 * 32
    windows = torch.randint(128, (8, 64), generator=torch.Generator().manual_seed(0))
    stream = ActivationStream.start(source, windows, 8, CPU)
    for index in range(2):
        stream.advance(source.layer(index), index, None)
    x = stream.hidden[0].float().flatten(0, 1)
    assert 0.3 < float(x.std()) < 10
    correlation = torch.corrcoef(x.mT) - torch.eye(32)
    assert float(correlation.abs().max()) > 0.15


def test_the_same_seed_gives_the_same_weights(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "config")
    shapes = shapes_of(ModelConfig(path=str(tmp_path / "config")))
    first, same, other = (
        write_random_model(tmp_path / str(n), shapes, 1, device=CPU, seed=seed).tensor("model.norm.weight")
        for n, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_random_moments_are_positive_definite_and_not_diagonal():
    H = random_moments(64, torch.Generator().manual_seed(0))
    assert float(torch.linalg.eigvalsh(H).min()) > 0
    scale = H.diagonal().sqrt()
    assert float((H / scale / scale[:, None] - torch.eye(64)).abs().max()) > 0.1
