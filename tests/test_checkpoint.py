"""Checkpoints on disk: what a reader gets, in this process and in a fresh one without drotator; and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from drotator import checkpoint
from drotator.checkpoint import (
    check_output_folder,
    load_checkpoint,
    read_metadata,
    register_rotated_classes,
    update_metadata,
    write_checkpoint,
)
from drotator.modeling_rotated import ROTATED_FAMILIES

HIDDEN_SIZE = 32
TOKENS = torch.arange(2, 20).reshape(2, 9)
METADATA: dict[str, object] = {"model": "tiny", "pruner": "sparsegpt", "sparsity": "2of4", "rotation": "per_layer"}
families = pytest.mark.parametrize("family", ROTATED_FAMILIES)


def make_model_folder(folder: Path, family: str) -> Path:
    """Save a tiny random model with tied embeddings, its tokenizer, and what a checkpoint must not take over."""
    config_class, model_class = (
        ROTATED_FAMILIES[family].config.__bases__[-1],
        ROTATED_FAMILIES[family].causal_lm.__bases__[-1],
    )
    torch.manual_seed(0)
    config = config_class(
        vocab_size=40,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model_class(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gguf"})
    (folder / "training_args.bin").write_bytes(b"0")
    return folder


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def rotated_tensors(model_folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the model's tensors, with embeddings untied and random orthogonal boundaries."""
    tensors = load_file(model_folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        square = torch.randn(HIDDEN_SIZE, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
        tensors[f"model.layers.{i}.boundary.weight"] = torch.linalg.qr(square)[0]
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_rotated(folder: Path, model_folder: Path, **settings: Any) -> Path:
    tensors = settings.pop("tensors", None) or rotated_tensors(model_folder)
    arguments: dict[str, Any] = {"boundaries": [0, 1], "untie": True, "metadata": METADATA} | settings
    write_checkpoint(folder, model_folder=model_folder, tensors=tensors.items(), **arguments)
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS.to(model.device)).logits


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model", "llama")


@pytest.fixture
def rotated(tmp_path: Path, model_folder: Path) -> Path:
    return write_rotated(tmp_path / "rotated", model_folder)


@families
def test_a_rotated_checkpoint_holds_the_model_that_was_in_memory(family: str, tmp_path: Path) -> None:
    model_folder = make_model_folder(tmp_path / "model", family)
    tensors = rotated_tensors(model_folder)
    rotated_family = ROTATED_FAMILIES[family]
    config = rotated_family.config.from_pretrained(model_folder, tie_word_embeddings=False)
    del config.quantization_config
    model: Any = rotated_family.causal_lm(config).eval()
    model.load_state_dict(tensors)
    loaded = load_checkpoint(write_rotated(tmp_path / "rotated", model_folder))
    assert type(loaded) is rotated_family.causal_lm
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))


FRESH_PROCESS = """
import json, sys
sys.modules["drotator"] = None  # importing it fails
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folders, out = json.loads(sys.argv[1]), sys.argv[2]
tokens = torch.arange(2, 20).reshape(2, 9)
results = {}
with torch.no_grad():
    for family, folder in folders.items():
        for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
            try:
                auto_class.from_pretrained(folder)
                raise SystemExit(f"{auto_class.__name__} loaded {folder} without being trusted")
            except ValueError as error:
                assert "trust_remote_code" in str(error), error
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        results[f"{family}.logits"] = model(tokens).logits
        results[f"{family}.generated"] = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False
        )
        results[f"{family}.base"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(tokens).last_hidden_state
        model.save_pretrained(f"{out}/{family}")
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"{out}/{family}")
save_file(results, f"{out}/results.safetensors")
"""


def run_fresh(script: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments],
        cwd=home,
        env={
            **os.environ,
            "HF_HOME": str(home / "hf"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_OFFLINE": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_fresh_process_without_drotator_needs_trust_and_then_gets_the_same_logits(tmp_path: Path) -> None:
    folders = {}
    for family in ROTATED_FAMILIES:
        folders[family] = write_rotated(tmp_path / family, make_model_folder(tmp_path / f"{family}-model", family))
    for again in (tmp_path / "again", tmp_path / "once more"):
        again.mkdir()
        names = json.dumps({family: str(folder) for family, folder in folders.items()})
        process = run_fresh(FRESH_PROCESS, names, str(again), home=tmp_path)
        assert process.returncode == 0, process.stderr
        results = load_file(again / "results.safetensors")
        for family, folder in folders.items():
            model: Any = load_checkpoint(folder)
            mask = torch.ones_like(TOKENS)
            assert torch.equal(results[f"{family}.logits"], logits(model))
            generated = model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False)
            assert torch.equal(results[f"{family}.generated"], generated)
            with torch.no_grad():
                assert torch.equal(results[f"{family}.base"], model.model(TOKENS).last_hidden_state)
            # The reader saved it again: that is loaded here, saved, and must load once more in a fresh process.
            saved = load_checkpoint(again / family)
            assert torch.equal(logits(saved), logits(model))
            assert read_metadata(again / family) == read_metadata(folder)
            saved.save_pretrained(again / family)
            folders[family] = again / family


def test_registered_classes_load_a_rotated_checkpoint_without_trust(rotated: Path) -> None:
    register_rotated_classes()
    register_rotated_classes()
    model = AutoModelForCausalLM.from_pretrained(rotated)
    assert torch.equal(logits(model), logits(load_checkpoint(rotated)))
    assert type(AutoModel.from_pretrained(rotated)) is ROTATED_FAMILIES["llama"].model


def test_code_in_the_folder_is_never_executed(rotated: Path) -> None:
    (rotated / "modeling_rotated.py").write_text("raise SystemExit('executed')")
    load_checkpoint(rotated)


@families
def test_a_plain_checkpoint_is_a_plain_model_of_its_family(family: str, tmp_path: Path) -> None:
    model_folder = make_model_folder(tmp_path / "model", family)
    tensors = load_file(model_folder / "model.safetensors")
    write_checkpoint(
        tmp_path / "plain",
        model_folder=model_folder,
        tensors=tensors.items(),
        boundaries=[],
        untie=False,
        metadata=METADATA | {"rotation": "none"},
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(model) is ROTATED_FAMILIES[family].causal_lm.__bases__[-1]
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(logits(load_checkpoint(tmp_path / "plain")), logits(model))
    assert not (tmp_path / "plain" / "modeling_rotated.py").exists()
    assert "trust_remote_code" not in (tmp_path / "plain" / "README.md").read_text()


@families
def test_the_tokenizer_is_of_the_class_that_the_model_had(family: str, tmp_path: Path) -> None:
    model_folder = make_model_folder(tmp_path / "model", family)
    expected = AutoTokenizer.from_pretrained(model_folder)
    register_rotated_classes()
    tokenizer = AutoTokenizer.from_pretrained(write_rotated(tmp_path / "rotated", model_folder))
    assert type(tokenizer) is type(expected)
    assert tokenizer("abc xyz").input_ids == expected("abc xyz").input_ids


def test_config_tokenizer_and_card_say_what_the_checkpoint_is(rotated: Path) -> None:
    config = json.loads((rotated / "config.json").read_text())
    assert config["model_type"] == "drotator_llama"
    assert config["architectures"] == ["RotatedLlamaForCausalLM"]
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["boundary_layers"] == [0, 1]
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert read_metadata(rotated) == {"format_version": 1, **METADATA}
    assert (rotated / "generation_config.json").is_file()
    assert not (rotated / "training_args.bin").exists()
    card = (rotated / "README.md").read_text()
    assert "| sparsity | 2of4 |" in card
    assert "trust_remote_code=True" in card


def test_a_checkpoint_with_some_boundaries_lists_them_and_is_refused_without_one(
    tmp_path: Path, model_folder: Path
) -> None:
    tensors = rotated_tensors(model_folder)
    del tensors["model.layers.0.boundary.weight"]
    folder = write_rotated(tmp_path / "rotated", model_folder, tensors=tensors, boundaries=[1])
    assert json.loads((folder / "config.json").read_text())["boundary_layers"] == [1]
    model: Any = load_checkpoint(folder)
    assert [hasattr(layer, "boundary") for layer in model.model.layers] == [False, True, False]
    assert torch.equal(model.model.layers[1].boundary.weight, tensors["model.layers.1.boundary.weight"])
    drop(folder, "model.layers.1.boundary.weight")
    with pytest.raises(ValueError, match=r"missing weight model\.layers\.1\.boundary\.weight\.$"):
        load_checkpoint(folder)


def test_everybody_may_read_the_weights_who_may_read_the_config(rotated: Path) -> None:
    assert (rotated / "model.safetensors").stat().st_mode == (rotated / "config.json").stat().st_mode


def test_metadata_added_later_reaches_the_card_and_leaves_the_weights(rotated: Path) -> None:
    before = logits(load_checkpoint(rotated))
    metrics = {"dense": {"wikitext2": 21.6, "piqa": 67.25}, "pruned": {"wikitext2": 59.5}}
    update_metadata(rotated, {"metrics": metrics})
    assert read_metadata(rotated) == {"format_version": 1, **METADATA, "metrics": metrics}
    card = (rotated / "README.md").read_text()
    assert "| wikitext2 (perplexity) | 21.60 | 59.50 |" in card
    assert "| piqa (accuracy, %) | 67.25 |  |" in card
    assert torch.equal(logits(load_checkpoint(rotated)), before)


def test_weights_are_stored_in_the_dtype_they_have(tmp_path: Path, model_folder: Path) -> None:
    tensors = rotated_tensors(model_folder, torch.bfloat16)
    folder = write_rotated(tmp_path / "rotated", model_folder, tensors=tensors)
    assert load_checkpoint(folder).dtype is torch.bfloat16
    assert load_checkpoint(folder, dtype="float32").dtype is torch.float32
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_negative_zeros_are_stored_as_positive_zeros(tmp_path: Path, model_folder: Path) -> None:
    tensors = rotated_tensors(model_folder)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    weight[::2] = -0.0
    stored = load_file(write_rotated(tmp_path / "rotated", model_folder, tensors=tensors) / "model.safetensors")
    assert not any(tensor[tensor == 0].signbit().any() for tensor in stored.values())
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], weight)
    assert weight[0].signbit().all()


def test_a_checkpoint_in_shards_equals_one_in_a_single_file(tmp_path: Path, model_folder: Path, rotated: Path) -> None:
    folder = write_rotated(tmp_path / "shards", model_folder, max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = load_file(rotated / "model.safetensors")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(folder / file).values()) <= 20_000
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert torch.equal(logits(load_checkpoint(folder)), logits(load_checkpoint(rotated)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(load_checkpoint(rotated)))


def test_tensors_are_drawn_one_shard_at_a_time(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    counts: list[tuple[int, int]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in rotated_tensors(model_folder).items():
            drawn.append(name)
            yield name, tensor

    def saving(shard: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        counts.append((len(drawn), len(shard)))
        save_file(shard, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", saving)
    write_checkpoint(
        tmp_path / "rotated",
        model_folder=model_folder,
        tensors=stream(),
        boundaries=[0, 1],
        untie=True,
        metadata=METADATA,
        max_shard_bytes=20_000,
    )
    saved = 0
    for num_drawn, num_saved in counts:
        saved += num_saved
        assert num_drawn <= saved + 1  # the one that did not fit any more


def test_an_error_in_the_stream_leaves_nothing_behind(tmp_path: Path, model_folder: Path) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from list(rotated_tensors(model_folder).items())[:20]
        raise OSError("the source went away")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"^the source went away$"):
        write_checkpoint(
            tmp_path / "rotated",
            model_folder=model_folder,
            tensors=stream(),
            boundaries=[0, 1],
            untie=True,
            metadata=METADATA,
            max_shard_bytes=5_000,
        )
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_while_overwriting_leaves_the_old_one(tmp_path: Path, model_folder: Path, rotated: Path) -> None:
    expected, before = logits(load_checkpoint(rotated)), sorted(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(
            rotated,
            model_folder=model_folder,
            tensors=((str(1 // 0), torch.zeros(1)) for _ in range(1)),
            boundaries=[0, 1],
            untie=True,
            metadata=METADATA,
            overwrite=True,
        )
    assert sorted(tmp_path.iterdir()) == before
    assert torch.equal(logits(load_checkpoint(rotated)), expected)


def test_a_folder_that_is_not_empty_is_replaced_only_on_request_and_only_if_it_is_a_checkpoint(
    tmp_path: Path, model_folder: Path, rotated: Path
) -> None:
    with pytest.raises(ValueError, match="overwrite=true"):
        write_rotated(rotated, model_folder)
    before = sorted(tmp_path.iterdir())
    tensors = rotated_tensors(model_folder)
    tensors["model.norm.weight"] += 1
    write_rotated(rotated, model_folder, tensors=tensors, overwrite=True)
    assert torch.equal(load_checkpoint(rotated).state_dict()["model.norm.weight"], tensors["model.norm.weight"])
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("text")
    with pytest.raises(ValueError, match="no checkpoint"):
        write_rotated(tmp_path / "thesis", model_folder, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "text"
    (tmp_path / "empty").mkdir()
    load_checkpoint(write_rotated(tmp_path / "empty", model_folder))


def test_what_a_killed_run_left_is_cleared(tmp_path: Path, model_folder: Path) -> None:
    left = tmp_path / ".rotated.partial"
    left.mkdir()
    (left / "0.safetensors").write_bytes(b"half")
    load_checkpoint(write_rotated(tmp_path / "rotated", model_folder))
    assert not left.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(
    error: Exception, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=r"^No room on the disk for the checkpoint .*rotated.*$"):
        write_rotated(tmp_path / "rotated", model_folder)
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_where_no_checkpoint_can_go_is_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="not a writable folder"):
        check_output_folder(tmp_path / "file" / "checkpoint")
    with pytest.raises(ValueError, match="are free there"):
        check_output_folder(tmp_path / "runs" / "checkpoint", num_bytes=10**18)
    check_output_folder(tmp_path / "runs" / "checkpoint", num_bytes=10)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_refused_beforehand(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="not a writable folder"):
        check_output_folder(tmp_path / "checkpoint")


def test_a_family_without_rotated_classes_cannot_be_written_rotated(tmp_path: Path, model_folder: Path) -> None:
    edit_json(model_folder / "config.json", model_type="gemma2")
    with pytest.raises(ValueError, match=r"model_type 'gemma2'.*choose from llama, mistral, qwen2, qwen3"):
        write_rotated(tmp_path / "rotated", model_folder)


def test_a_rotated_checkpoint_can_be_the_model_of_another(tmp_path: Path, rotated: Path) -> None:
    folder = write_rotated(tmp_path / "tuned", rotated, tensors=load_file(rotated / "model.safetensors"))
    assert torch.equal(logits(load_checkpoint(folder)), logits(load_checkpoint(rotated)))


def drop(folder: Path, *names: str, **added: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors | added, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_boundary_matrix_is_refused_by_name(rotated: Path, capfd: pytest.CaptureFixture[str]) -> None:
    drop(rotated, "model.layers.1.boundary.weight")
    with pytest.raises(ValueError, match=r"missing weight model\.layers\.1\.boundary\.weight\.$"):
        load_checkpoint(rotated)
    assert "REPORT" not in capfd.readouterr().err


def test_a_missing_head_is_refused_where_it_is_not_tied(rotated: Path) -> None:
    drop(rotated, "lm_head.weight")
    with pytest.raises(ValueError, match=r"missing weight lm_head\.weight"):
        load_checkpoint(rotated)


def test_unexpected_and_mismatched_tensors_are_refused_by_name(rotated: Path) -> None:
    drop(rotated, **{"model.layers.2.boundary.weight": torch.eye(HIDDEN_SIZE)})
    with pytest.raises(ValueError, match=r"unexpected weight model\.layers\.2\.boundary\.weight"):
        load_checkpoint(rotated)
    drop(rotated, "model.layers.2.boundary.weight", **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(ValueError, match=r"mismatched .*model\.norm\.weight"):
        load_checkpoint(rotated)


def test_a_damaged_or_missing_shard_is_refused_by_name(tmp_path: Path, model_folder: Path) -> None:
    folder = write_rotated(tmp_path / "shards", model_folder, max_shard_bytes=20_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for damaged in (content[:-1], content[:10], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
            load_checkpoint(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        load_checkpoint(folder)


def test_a_newer_format_is_refused(rotated: Path) -> None:
    edit_json(rotated / "config.json", drotator={"format_version": 2})
    for read in (load_checkpoint, read_metadata):
        with pytest.raises(ValueError, match=r"format version 2.*newer drotator"):
            read(rotated)


def test_a_folder_without_a_model_or_with_an_unknown_one_is_refused(tmp_path: Path, rotated: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no .*config.json"):
        load_checkpoint(tmp_path)
    edit_json(rotated / "config.json", model_type="drotator_gemma")
    with pytest.raises(ValueError, match="model_type 'drotator_gemma'"):
        load_checkpoint(rotated)
    (rotated / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        load_checkpoint(rotated)


def test_a_model_without_a_drotator_entry_has_no_metadata(model_folder: Path) -> None:
    assert read_metadata(model_folder) == {}
