from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TOKENS
from tiny_text import byte_tokenizer, tiny_llama

from drotator import export
from drotator.architecture import ModelSource
from drotator.artifacts import RunFolder
from drotator.checkpoint import load_checkpoint
from drotator.config import RotationConfig
from drotator.export import checkpoint_tensors, export_checkpoint, merged_rotation
from drotator.results import LayerResult
from drotator.rotation import Rotation, fold_norms, merge_rotation
from drotator.training import TrainedRotation

NOTHING = {"objective_before": 0.0, "objective_after": 0.0, "orthogonality": 0.0, "linears": {}, "seconds": {}}


def make_source(folder, *, tied, dtype=torch.float32):
    model = tiny_llama(head_dim=12, num_hidden_layers=3, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape) / 4)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSource.open(folder)


KINDS = {
    "none": RotationConfig(name="none"),
    "shared": RotationConfig(name="shared"),
    "groups": RotationConfig(name="shared", groups=2),
    "per_layer": RotationConfig(name="per_layer"),
    "R2_alone": RotationConfig(name="per_layer", R1=False),
}
BOUNDARIES = {"none": [], "shared": [], "groups": [0], "per_layer": [0, 1], "R2_alone": []}


def fill(run, source, kind):
    """Put dense layers with random rotations in the run folder: an R1 after every boundary, if R1 is learned at all."""
    generator = torch.Generator().manual_seed(0)
    R1 = torch.eye(source.sizes.hidden_size)
    for index in range(source.num_layers):
        layer = source.layer(index)
        if kind != "none":
            rotation = Rotation.random(source.sizes, generator).to(dtype=torch.float32)
            if KINDS[kind].R1 and (index == 0 or index - 1 in BOUNDARIES[kind]):
                R1 = rotation.R1
            rotation = Rotation(R1, rotation.R2)
            merge_rotation(layer, source.spec, source.sizes, rotation.polished(), fold_norms(layer, source.spec))
            run.save_rotation(index, TrainedRotation(rotation, 0.0, 0.0, 0.0))
        run.save_layer(index, layer.state_dict(), LayerResult(index=index, **NOTHING))


@pytest.fixture
def run(tmp_path):
    return RunFolder.open(tmp_path / "run", {})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_exported_model_has_the_logits_of_the_model_it_was_made_from(tmp_path, run, kind, tied):
    source = make_source(tmp_path / "model", tied=tied)
    fill(run, source, kind)
    export_checkpoint(KINDS[kind], run, source, {"rotation": kind})
    dense = load_checkpoint(source.folder)(TOKENS).logits
    exported = load_checkpoint(run.checkpoint)
    difference = (exported(TOKENS).logits - dense).abs().max()
    assert difference <= (0 if kind == "none" else 1e-4 * dense.abs().max())
    assert exported.config.model_type == ("drotator_llama" if BOUNDARIES[kind] else "llama")
    assert (run.checkpoint / "modeling_rotated.py").exists() == bool(BOUNDARIES[kind])
    assert exported.config.tie_word_embeddings == (tied and kind == "none")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_named_once_and_in_the_dtype_of_the_model(tmp_path, run, kind):
    source = make_source(tmp_path / "model", tied=True, dtype=torch.bfloat16)
    fill(run, source, kind)
    tensors = list(checkpoint_tensors(KINDS[kind], run, source))
    names = [name for name, _ in tensors]
    assert len(names) == len(set(names))
    boundaries = [name for name in names if "boundary" in name]
    assert boundaries == [f"model.layers.{i}.boundary.weight" for i in BOUNDARIES[kind]]
    assert ("lm_head.weight" in names) == (kind != "none")
    assert {tensor.dtype for _, tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize("rows", [16384, 30])
def test_products_are_rounded_once(tmp_path, run, monkeypatch, rows):
    monkeypatch.setattr(export, "ROWS", rows)
    source = make_source(tmp_path / "model", tied=True, dtype=torch.bfloat16)
    fill(run, source, "per_layer")
    export_checkpoint(RotationConfig(), run, source, {})
    stored = load_file(run.checkpoint / "model.safetensors")
    R1 = [run.load_rotation(index).rotation.polished().R1 for index in range(3)]
    embedding = source.tensor("model.embed_tokens.weight").double()
    gain = source.tensor("model.norm.weight").double()
    expected = {
        "model.embed_tokens.weight": embedding @ R1[0],
        "model.layers.1.boundary.weight": (R1[1].mT @ R1[2]).mT,
        "lm_head.weight": embedding * gain @ R1[2],
    }
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16)), name
    assert torch.equal(stored["model.norm.weight"], torch.ones(32).bfloat16())


def test_an_exported_checkpoint_replaces_the_one_before_it(tmp_path, run):
    source = make_source(tmp_path / "model", tied=True)
    fill(run, source, "none")
    export_checkpoint(RotationConfig(name="none"), run, source, {"pruner": "wanda"})
    (run.checkpoint / "old").write_text("")
    export_checkpoint(RotationConfig(name="none"), run, source, {"pruner": "sparsegpt"})
    assert not (run.checkpoint / "old").exists()
    assert "sparsegpt" in (run.checkpoint / "config.json").read_text()


def test_the_merged_rotation_is_orthogonal_in_float64(tmp_path, run):
    source = make_source(tmp_path / "model", tied=True)
    fill(run, source, "shared")
    assert merged_rotation("none", run, 0, torch.device("cpu")) is None
    R1 = merged_rotation("shared", run, 0, torch.device("cpu"))
    assert R1.dtype == torch.float64
    assert (R1.mT @ R1 - torch.eye(32)).abs().max() < 1e-12
