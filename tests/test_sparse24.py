"""Compressed 2:4 checkpoints: what is packed, what comes back bit by bit, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import TOKENS, drotator, settings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from drotator import checkpoint, load_sparse24
from drotator.checkpoint import load_checkpoint
from drotator.commands import run_export
from drotator.config import ExportConfig, ModelConfig
from drotator.pipeline import run_prune
from drotator.sparse24 import INDEX_NAME, export_sparse24, pack, unpack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PAIRS = list(itertools.combinations(range(4), 2))
INTEGER = {2: torch.int16, 4: torch.int32}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FIRST = "model.layers.0.mlp.down_proj.weight"


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: equal only where -0.0 and nan are the same too."""
    return tensor.contiguous().view(INTEGER[tensor.element_size()])


def two_of_four(d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
    """A random weight with two non-zeros in each group of four, in random places."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(d_out, d_in // 4, 4, generator=generator).argsort(-1)
    weight = torch.randn(d_out, d_in, generator=generator).to(dtype)
    return torch.where((order < 2).view(d_out, d_in), weight, 0)


def reference(values: Tensor, metadata: Tensor) -> list[list[float]]:
    """The weight that values and metadata stand for, group by group in plain Python."""
    rows = []
    for kept, packed in zip(values.tolist(), metadata.tolist(), strict=True):
        row = []
        for group in range(len(kept) // 2):
            nibble = packed[group // 2] >> 4 * (group % 2) & 15
            four = [0.0] * 4
            four[nibble & 3], four[nibble >> 2] = kept[2 * group : 2 * group + 2]
            row += four
        rows.append(row)
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_those_of_an_obvious_reference_and_come_back_bit_by_bit(dtype):
    weight = two_of_four(6, 48, dtype)
    before = weight.clone()
    values, metadata = pack(weight)
    assert (values.shape, values.dtype) == ((6, 24), dtype)
    assert (metadata.shape, metadata.dtype) == ((6, 6), torch.uint8)
    assert reference(values, metadata) == weight.tolist()
    unpacked = unpack(values, metadata)
    assert unpacked.dtype == dtype
    assert torch.equal(bits(unpacked), bits(before))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_each_of_the_six_patterns_has_the_places_of_its_weights(pair, dtype):
    weight = torch.zeros(1, 8, dtype=dtype)
    weight[0, pair[0]], weight[0, pair[1]], weight[0, 4 + pair[0]], weight[0, 4 + pair[1]] = 1, 2, 3, 4
    values, metadata = pack(weight)
    assert values.tolist() == [[1, 2, 3, 4]]
    nibble = pair[0] + 4 * pair[1]
    assert metadata.tolist() == [[nibble + 16 * nibble]]
    assert torch.equal(unpack(values, metadata), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(), (0,), (1,), (2,), (3,)])
def test_zeros_among_the_kept_weights_come_back(places, dtype):
    weight = torch.zeros(2, 16, dtype=dtype)
    for place in places:
        weight[:, place::4] = 1 + place
    values, metadata = pack(weight)
    assert values.count_nonzero() == weight.count_nonzero()
    assert reference(values, metadata) == weight.tolist()
    assert torch.equal(bits(unpack(values, metadata)), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zeros_and_nan_are_weights_that_are_kept(dtype):
    weight = torch.tensor([[-0.0, 0, 0, 1, 0, float("nan"), -0.0, 0]]).to(dtype)
    assert torch.equal(bits(unpack(*pack(weight))), bits(weight))
    with pytest.raises(ValueError, match=r"inputs 4 to 7 of row 0 hold 3 weights"):
        pack(torch.tensor([[1, 2, 0, 0, -0.0, 1, 2, 0]]).to(dtype))


def test_a_weight_that_is_not_contiguous_is_packed_too():
    weight = two_of_four(8, 16, torch.float32)
    assert torch.equal(unpack(*pack(weight.mT.contiguous().mT)), weight)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(2, 12), r"^the weight has d_in=12, but sparse24 needs one that is divisible by 8\.$"),
        (torch.ones(2, 8, dtype=torch.float64), r"torch\.float64 of shape \(2, 8\)"),
        (torch.ones(2, 8, dtype=torch.int32), r"torch\.int32"),
        (torch.ones(8), r"of shape \(8,\)"),
        (torch.eye(8) + torch.eye(8).roll(1) + torch.eye(8).roll(2), r"^the weight is not 2:4: inputs 0 to 3 of row 0"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_refused(weight, said):
    with pytest.raises(ValueError, match=said):
        pack(weight)


def test_the_first_group_that_is_not_2_of_4_is_named():
    weight = two_of_four(4, 32, torch.bfloat16)
    weight[2, 12:15] = 1
    weight[2, 15] = 0
    weight[3] = 1
    with pytest.raises(ValueError, match=r"^layer\.x is not 2:4: inputs 12 to 15 of row 2 hold 3 weights, not 2 or"):
        pack(weight, "layer.x")


def test_values_and_metadata_that_do_not_fit_are_refused():
    values, metadata = pack(two_of_four(4, 16, torch.bfloat16))
    for nibble in range(16):
        damaged = metadata.clone()
        damaged[1, 1] = nibble + 16 * 14
        if nibble in {first + 4 * second for first, second in PAIRS}:
            unpack(values, damaged)
            continue
        with pytest.raises(ValueError, match="places that no group"):
            unpack(values, damaged)
    for wrong in [(values[:3], metadata), (values, metadata[0]), (values[:, :4], metadata)]:
        with pytest.raises(ValueError, match="do not fit each other"):
            unpack(*wrong)
    for wrong in [(values, metadata.int()), (values.view(torch.int16), metadata), (values.double(), metadata)]:
        with pytest.raises(ValueError, match="not floats of 16 or 32 bits and uint8"):
            unpack(*wrong)


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory):
    """Make checkpoints of a tiny model, once each: runs(dtype, rotation, keep) -> its folder, never changed."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def make(dtype: torch.dtype, rotation: str, keep: int = 2) -> Path:
        run = folder / f"{dtype}-{rotation}-{keep}"
        sparsity = {"ratio": 0.0, "keep": keep, "group": 4}
        given = settings(
            inputs,
            pruner="magnitude",
            rotation=rotation,
            sparsity=sparsity,
            steps=2,
            evaluation={"perplexity": []},
        )
        given.model.dtype = str(dtype).removeprefix("torch.")
        run_prune(given, run, baseline=False)
        return run / "checkpoint"

    return make


@pytest.fixture
def pruned(runs, tmp_path: Path) -> Path:
    """A rotated bfloat16 checkpoint of its own."""
    return Path(shutil.copytree(runs(torch.bfloat16, "per_layer"), tmp_path / "checkpoint"))


@pytest.fixture
def exported(pruned: Path, tmp_path: Path) -> Path:
    export_sparse24(pruned, tmp_path / "exported")
    return tmp_path / "exported"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotation", ["none", "shared", "per_layer"])
@torch.no_grad()
def test_a_pruned_checkpoint_comes_back_bit_by_bit(runs, tmp_path, rotation, dtype):
    folder = runs(dtype, rotation)
    export_sparse24(folder, tmp_path / "exported", max_shard_bytes=20_000)
    model, original = load_sparse24(tmp_path / "exported"), load_checkpoint(folder)
    assert type(model) is type(original)
    assert not model.training
    model.config.name_or_path = original.config.name_or_path  # where it was loaded from
    assert (model.config.to_dict(), model.dtype) == (original.config.to_dict(), dtype)
    assert model.generation_config.to_dict() == original.generation_config.to_dict()
    state, expected = model.state_dict(), original.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == dtype
        assert torch.equal(bits(state[name]), bits(tensor)), name
    stored = tensors_of(folder)
    assert all(torch.equal(bits(state[name]), bits(tensor)) for name, tensor in stored.items())
    assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 0.5625), (torch.float32, 0.53125)])
def test_the_files_hold_the_linears_in_nine_sixteenths_and_the_rest_as_it_is(runs, tmp_path, dtype, ratio):
    folder = runs(dtype, "per_layer")
    sizes = export_sparse24(folder, tmp_path / "exported")
    before, after = tensors_of(folder), tensors_of(tmp_path / "exported")
    linears = [name for name in before if name.split(".")[-2] in PROJECTIONS]
    assert len(linears) == 3 * 7
    packed = {name: tensor for name, tensor in after.items() if name.endswith((".values", ".metadata"))}
    assert set(packed) == {name + part for name in linears for part in (".values", ".metadata")}
    num_bytes = sum(before[name].nbytes for name in linears)
    assert sum(tensor.nbytes for tensor in packed.values()) / num_bytes == ratio == sizes.ratio
    assert set(after) - set(packed) == set(before) - set(linears)
    assert "model.layers.0.boundary.weight" in after
    for name in set(before) - set(linears):
        assert torch.equal(bits(after[name]), bits(before[name])), name
    assert sizes.others == sum(before[name].nbytes for name in set(before) - set(linears))


def test_an_export_says_what_it_is_and_no_other_loader_takes_it_for_a_checkpoint(exported, pruned):
    index = json.loads((exported / INDEX_NAME).read_text())
    assert (index["format"], index["format_version"], index["dtype"]) == ("drotator-sparse24", 1, "bfloat16")
    assert set(index["weight_map"].values()) == {"sparse24-00001-of-00001.safetensors"}
    with safe_open(exported / "sparse24-00001-of-00001.safetensors", framework="pt") as stored:
        assert stored.metadata() == {"format": "drotator-sparse24", "format_version": "1"}
    for name in ("config.json", "modeling_rotated.py", "tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (pruned / name).read_bytes()
    card = (exported / "README.md").read_text()
    assert "load_sparse24(PATH)" in card and "AutoModelForCausalLM" not in card
    assert card.startswith((pruned / "README.md").read_text().partition("## How to load it")[0])
    assert AutoTokenizer.from_pretrained(exported)("word1").input_ids
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(exported)
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_checkpoint(exported)


def test_a_checkpoint_in_shards_is_exported_and_no_shard_is_larger_than_asked(runs, tmp_path, monkeypatch):
    tensors = tensors_of(runs(torch.bfloat16, "none"))
    folder = tmp_path / "shards"
    checkpoint.write_checkpoint(
        folder,
        model_folder=runs(torch.bfloat16, "none"),
        tensors=tensors.items(),
        boundaries=[],
        untie=False,
        metadata={},
        max_shard_bytes=20_000,
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    export_sparse24(folder, tmp_path / "exported", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "exported").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"sparse24-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 1
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 20_000 for path in shards)
    state = load_sparse24(tmp_path / "exported").state_dict()
    assert all(torch.equal(bits(state[name]), bits(tensor)) for name, tensor in tensors.items())


def only_what_was_there(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("keep", [3, 0])
def test_a_checkpoint_that_is_not_2_of_4_is_refused_by_tensor_and_group(inputs, runs, tmp_path, keep):
    folder = runs(torch.float32, "none", keep) if keep else inputs / "model"
    with pytest.raises(ValueError, match=rf"^{FIRST} is not 2:4: inputs 0 to 3 of row 0 hold [34] weights"):
        export_sparse24(folder, tmp_path / "exported")
    assert only_what_was_there(tmp_path)


def test_one_wrong_group_in_the_last_layer_leaves_nothing_and_an_old_export_in_place(pruned, exported, tmp_path):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    tensors = load_file(pruned / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][5, 8:12] = 1
    save_file(tensors, pruned / "model.safetensors")
    for output, overwrite in [(exported, True), (tmp_path / "new", False)]:
        with pytest.raises(ValueError, match=r"^model\.layers\.2\.self_attn\.v_proj\.weight .* 8 to 11 of row 5"):
            export_sparse24(pruned, output, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert only_what_was_there(tmp_path, "checkpoint", "exported")


def test_a_missing_projection_is_refused(pruned, tmp_path):
    tensors = load_file(pruned / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, pruned / "model.safetensors")
    with pytest.raises(ValueError, match=r"incomplete: model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        export_sparse24(pruned, tmp_path / "exported")
    assert only_what_was_there(tmp_path, "checkpoint")


def test_only_an_export_is_replaced_and_only_on_request(pruned, exported, tmp_path):
    (exported / "old").touch()
    with pytest.raises(ValueError, match="overwrite=true"):
        export_sparse24(pruned, exported)
    assert (exported / "old").exists()
    export_sparse24(pruned, exported, overwrite=True)
    assert not (exported / "old").exists()
    other = Path(shutil.copytree(pruned, tmp_path / "other"))
    with pytest.raises(ValueError, match=r"holds no sparse24\.json"):
        export_sparse24(pruned, other, overwrite=True)
    for output in (pruned, tmp_path):
        with pytest.raises(ValueError, match="holds the checkpoint that is exported"):
            export_sparse24(pruned, output, overwrite=True)
    assert only_what_was_there(tmp_path, "checkpoint", "exported", "other")
    assert tensors_of(other).keys() == tensors_of(pruned).keys()


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(pruned, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RuntimeError, match=r"^No room on the disk .*exported"):
        export_sparse24(pruned, tmp_path / "exported")
    assert only_what_was_there(tmp_path, "checkpoint")


def edit_index(folder: Path, **entries: object) -> None:
    path = folder / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"format_version": 2}, r"sparse24\.json has format version 2, .* reads up to 1: install a newer drotator"),
        ({"format": "other"}, r"sparse24\.json is not of the format drotator-sparse24"),
        ({"format_version": None}, r"is not of the format"),
        ({"packed": None}, r"sparse24\.json is damaged"),
        ({"weight_map": ["x"]}, r"sparse24\.json is damaged"),
        ({"weight_map": {"x": 1}}, r"sparse24\.json is damaged"),
        ({"weight_map": {}}, r"names no file for model\.layers\.0\.self_attn\.q_proj\.weight\.values"),
        (
            {"packed": []},
            r"does not fit its config\.json: missing weight model\.layers\.0\.mlp\.down_proj\.weight",
        ),
    ],
)
def test_an_index_of_a_newer_format_or_damaged_is_refused(exported, entries, said):
    edit_index(exported, **entries)
    with pytest.raises(ValueError, match=said) as caught:
        load_sparse24(exported)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, header: dict[str, str] | None = None, **changes: Tensor | None) -> None:
    with safe_open(path, framework="pt") as stored:
        header = header or stored.metadata()
    tensors = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(tensors, path, metadata=header)


def test_a_damaged_missing_or_newer_shard_is_refused_by_name(exported):
    (shard,) = exported.glob("*.safetensors")
    whole = shard.read_bytes()
    tensors = load_file(shard)
    q_proj = "model.layers.0.self_attn.q_proj.weight"

    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            load_sparse24(exported)
        assert "\n" not in str(caught.value)
        shard.write_bytes(whole)

    shard.write_bytes(whole[: len(whole) // 2])
    refused(f"{shard.name} is damaged")
    shard.unlink()
    refused(f"{shard.name} is missing")
    rewrite(shard, {"format": "drotator-sparse24", "format_version": "2"})
    refused(f"{shard.name} has format version 2")
    rewrite(shard, {"format": "pt"})
    refused(f"{shard.name} is not of the format")
    rewrite(shard, **{f"{q_proj}.values": None})
    refused(f"{shard.name} is damaged .*{q_proj}.values")
    rewrite(shard, **{f"{q_proj}.metadata": torch.zeros_like(tensors[f"{q_proj}.metadata"])})
    refused(f"{shard.name} is damaged .*{q_proj}: metadata names places")
    rewrite(shard, **{"model.norm.weight": torch.ones(8).bfloat16()})
    refused(r"mismatched weight.*model\.norm\.weight")
    load_sparse24(exported)


def test_a_folder_that_is_no_export_is_refused(pruned, exported, tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*sparse24\.json: give a folder that `drotator export"):
        load_sparse24(pruned)
    (exported / "config.json").unlink()
    with pytest.raises(ValueError, match=r"There is no .*config\.json"):
        load_sparse24(exported)


def test_the_command_writes_beside_the_checkpoint_and_says_what_it_saved(pruned, tmp_path):
    result = drotator("export", "model.path=checkpoint", "format=sparse24", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "(0.5625)" in result.stdout and "checkpoint-sparse24" in result.stdout
    assert only_what_was_there(tmp_path, "checkpoint", "checkpoint-sparse24")
    load_sparse24(tmp_path / "checkpoint-sparse24")
    again = drotator("export", "model.path=checkpoint", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("drotator: ") and again.stderr.count("\n") == 1
    assert "is not empty: give another folder, or overwrite=true" in again.stderr


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 20), "model.safetensors is damaged"),
        (
            lambda folder: save_file(
                load_file(folder / "model.safetensors") | {FIRST: torch.ones(32, 64).bfloat16()},
                folder / "model.safetensors",
            ),
            f"{FIRST} is not 2:4: inputs 0 to 3 of row 0 hold 4 weights",
        ),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line_and_nothing_is_written(pruned, tmp_path, prepare, said):
    prepare(pruned)
    with pytest.raises(ValueError, match=said) as caught:
        run_export(ExportConfig(model=ModelConfig(path=str(pruned))))
    assert "\\n" not in str(caught.value)
    assert only_what_was_there(tmp_path, "checkpoint")


def test_output_is_asked_for_where_the_model_is_no_folder(monkeypatch, pruned, tmp_path):
    monkeypatch.setattr("drotator.commands.resolve_model", lambda path, revision: pruned)
    with pytest.raises(ValueError, match=r"^model\.path=org/name is no folder .* give output=FOLDER"):
        run_export(ExportConfig(model=ModelConfig(path="org/name")))
    run_export(ExportConfig(model=ModelConfig(path="org/name"), output=str(tmp_path / "exported")))
    assert (tmp_path / "exported" / INDEX_NAME).is_file()
