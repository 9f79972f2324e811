"""What people do with the checkpoint of a run: transformers, lm-eval and converters know nothing of drotator."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import drotator, make_inputs, process_environment, settings
from tiny_text import byte_tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from drotator import cli, modeling_rotated
from drotator.checkpoint import load_checkpoint, write_checkpoint
from drotator.pipeline import run_prune

ROTATIONS = ("per_layer", "shared")
rotations = pytest.mark.parametrize("rotation", ROTATIONS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As the fixture of all tests, with positions enough for the prompts of PIQA, a token each byte."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROTATOR_CACHE", str(folder / "cache"))
        yield make_inputs(folder, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def checkpoints(inputs: Path) -> dict[str, Path]:
    """A 2:4 checkpoint of each rotation, never changed."""
    for rotation in ROTATIONS:
        run_prune(settings(inputs, rotation=rotation), inputs / rotation, baseline=False)
    return {rotation: inputs / rotation / "checkpoint" for rotation in ROTATIONS}


LIMIT = 200


@pytest.mark.slow
@pytest.mark.hub
def test_lm_evals_own_command_measures_the_folder_as_our_evaluation_does(
    checkpoints: dict[str, Path], hub: str, tmp_path: Path
) -> None:
    client = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub")}
    with_bos = Path(shutil.copytree(checkpoints["shared"], tmp_path / "with_bos"))
    byte_tokenizer(bos=True).save_pretrained(with_bos)
    checkpoints = {"per_layer": checkpoints["per_layer"], "shared": with_bos}
    paths = ",".join(map(str, checkpoints.values()))
    words = [f"model.path={paths}", "eval=zeroshot", "eval.tasks=[piqa]", f"eval.limit={LIMIT}", "eval.batch_size=4"]
    ours = drotator("eval", "-m", *words, "device=cpu", f"hydra.sweep.dir={tmp_path}", cwd=tmp_path, **client)
    assert (ours.returncode, ours.stderr) == (0, "")
    # The same words as the README's, both at once: reading its index takes lm-eval most of its time.
    started = {}
    for rotation, folder in checkpoints.items():
        command = f"--model hf --model_args pretrained={folder},trust_remote_code=True --tasks piqa --limit {LIMIT}"
        command += f" --batch_size 4 --device cpu --output_path {tmp_path / rotation}"
        started[rotation] = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_DROTATOR + RUN_LM_EVAL, *command.split()],
            env=process_environment(**client),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    found = []
    for job, (rotation, process) in enumerate(started.items()):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        (results,) = (tmp_path / rotation).rglob("results_*.json")
        theirs = json.loads(results.read_text())["results"]["piqa"]
        metrics = json.loads((tmp_path / str(job) / "metrics.json").read_text())["metrics"]
        assert metrics["piqa"] == 100 * theirs["acc_norm,none"]
        assert metrics["piqa_acc"] == 100 * theirs["acc,none"]
        found.append(metrics)
    assert found[0] != found[1]


WITHOUT_DROTATOR = "import sys; sys.modules['drotator'] = None\n"  # importing it fails
RUN_LM_EVAL = "import runpy; runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)\n"


PEOPLE = """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out, trusted = sys.argv[1], sys.argv[2], sys.argv[3] == "per_layer"
found = {}
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
texts = ["word17 word18 word19 word20", "word5"]

def load(folder=folder, **given):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, **given)

@torch.no_grad()
def logits(model):
    return model(tokenizer(texts[0], return_tensors="pt").input_ids.to(model.device)).logits

def continued(model, texts, **given):
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    given |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    return model.generate(**batch, **given)[:, -8:]

model = load()
assert "drotator" not in type(model).__module__.split(".")[0]
found["logits"] = logits(model)
found["batch"] = continued(model, texts)
found["without cache"] = continued(model, texts, use_cache=False)
found["one by one"] = torch.cat([continued(model, [text]) for text in texts])
for name, given in {
    "eager": {"attn_implementation": "eager"},
    "sdpa": {"attn_implementation": "sdpa"},
    "bfloat16": {"dtype": torch.bfloat16},
    "auto": {"device_map": "auto"},
    "split": {
        "device_map": {
            "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
            "model.layers.2": "cpu", "model.norm": "cpu", "lm_head": "disk",
        },
        "offload_folder": f"{out}/offloaded",
    },
}.items():
    loaded = load(**given)
    found[name] = logits(loaded).to("cpu")
    if name == "split":
        assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
model.save_pretrained(f"{out}/again")
tokenizer.save_pretrained(f"{out}/again")
found["again"] = logits(load(f"{out}/again"))
save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{out}/found.safetensors")
"""


@rotations
def test_transformers_alone_loads_generates_places_and_saves_a_checkpoint(
    checkpoints: dict[str, Path], tmp_path: Path, rotation: str
) -> None:
    folder = checkpoints[rotation]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_DROTATOR + PEOPLE, str(folder), str(tmp_path), rotation],
        env=process_environment(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = load_file(tmp_path / "found.safetensors")
    tokens = AutoTokenizer.from_pretrained(folder)("word17 word18 word19 word20", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = load_checkpoint(folder)(tokens).logits
    for name in ("logits", "again"):
        assert torch.equal(found[name], expected), name
    for name in ("sdpa", "eager", "auto", "split"):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    assert found["bfloat16"].dtype is torch.bfloat16
    assert 0 < (found["bfloat16"].float() - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(found["without cache"], found["batch"])
    assert torch.equal(found["one by one"], found["batch"])
    assert len(found["batch"].unique()) > 4  # not one token again and again


@rotations
def test_the_files_hold_positive_zeros_and_no_code_but_that_of_torch_and_transformers(
    checkpoints: dict[str, Path], rotation: str
) -> None:
    folder = checkpoints[rotation]
    tensors = load_file(folder / "model.safetensors")
    assert not any(tensor[tensor == 0].signbit().any() for tensor in tensors.values())
    assert (tensors["model.layers.1.mlp.down_proj.weight"] == 0).float().mean() == 0.5
    code = [path.name for path in folder.glob("*.py")]
    assert code == (["modeling_rotated.py"] if rotation == "per_layer" else [])
    for name in code:
        text = (folder / name).read_text()
        assert text == Path(modeling_rotated.__file__).read_text()
        nodes = list(ast.walk(ast.parse(text)))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {module.partition(".")[0] for module in imported} == {"__future__", "typing", "torch", "transformers"}


@rotations
def test_llama_cpps_converter_would_know_every_tensor_of_a_shared_checkpoint_and_refuse_the_other(
    inputs: Path, checkpoints: dict[str, Path], rotation: str
) -> None:
    # convert_hf_to_gguf.py goes by `architectures`, by these names, and by the tokenizer's files.
    folder = checkpoints[rotation]
    config = json.loads((folder / "config.json").read_text())
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    names = load_file(folder / "model.safetensors")
    unknown = [name for name in names if known.get_name(name, try_suffixes=(".weight",)) is None]
    if rotation == "per_layer":
        assert unknown == [f"model.layers.{i}.boundary.weight" for i in range(2)]
        assert config["architectures"] == ["RotatedLlamaForCausalLM"]
        return
    assert not unknown
    assert len({known.get_name(name, try_suffixes=(".weight",)) for name in names}) == len(names) == 3 * 9 + 3
    dense = json.loads((inputs / "model" / "config.json").read_text())
    assert config == {**dense, "tie_word_embeddings": False, "drotator": config["drotator"]}
    assert config["architectures"] == ["LlamaForCausalLM"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (inputs / "model" / file).read_bytes()
    assert gguf.SpecialVocab(folder).special_token_ids == {"bos": 0, "eos": 1}


# Checkpoints that cannot be used.


def of_a_newer_format(checkpoint: Path) -> None:
    edit_config(checkpoint, drotator={"format_version": 2})


def of_no_format(checkpoint: Path) -> None:
    edit_config(checkpoint, drotator={"format_version": "new"})


def with_a_damaged_shard(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    write_checkpoint(
        checkpoint,
        model_folder=checkpoint,
        tensors=tensors.items(),
        boundaries=config["boundary_layers"],
        untie=True,
        metadata={},
        overwrite=True,
        max_shard_bytes=50_000,
    )
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def without_a_boundary(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.boundary.weight"))


def without_a_projection(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def with_three_of_four(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"][7, 8:11].fill_(1))


def dense(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: [tensor.add_(1e-3) for tensor in tensors.values()])


def edit_config(checkpoint: Path, **entries: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | entries))


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    edit(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


NOT_2_OF_4 = "down_proj.weight is not 2:4: inputs 8 to 11 of row 7 hold"
BAD: list[tuple[Callable[[Path], None], tuple[str, ...], str]] = [
    (of_a_newer_format, ("eval", "export", "recover"), "format version 2, but this drotator reads up to 1: install"),
    (of_no_format, ("eval", "export", "recover"), "config.json is damaged: its entry drotator has no format_version"),
    (with_a_damaged_shard, ("eval", "export", "recover"), "model-00002-of-"),
    (without_a_boundary, ("eval", "export", "recover"), "missing weight model.layers.1.boundary.weight"),
    (without_a_projection, ("export", "recover"), "model.layers.1.mlp.up_proj.weight is missing"),
    (with_three_of_four, ("export",), NOT_2_OF_4),
    (dense, ("recover",), "is not pruned (0.00% zeros in its linears)"),
    (dense, ("export",), "is not 2:4"),
]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("verb", "spoil", "said"),
    [(verb, spoil, said) for spoil, verbs, said in BAD for verb in verbs],
    ids=lambda value: getattr(value, "__name__", value if value in ("eval", "export", "recover") else ""),
)
def test_a_bad_checkpoint_is_refused_in_one_line_before_anything_is_read_or_written(
    inputs: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    verb: str,
    spoil: Callable[[Path], None],
    said: str,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["per_layer"], checkpoint)
    spoil(checkpoint)
    before = files(checkpoint)
    monkeypatch.chdir(tmp_path)
    for name in ("calibration.calibration_windows", "evaluation.prepare"):
        monkeypatch.setattr(f"drotator.{name}", lambda *_: pytest.fail("something long started"))
    words = [f"model.path={checkpoint}"]
    if verb != "export":
        words += ["eval=embedded", "device=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    if verb == "recover":
        words += ["calibration=local", f"calibration.path={inputs / 'text.txt'}", "calibration.seqlen=32"]
    capfd.readouterr()
    assert cli.main([verb, *words]) == 2
    stderr = capfd.readouterr().err
    assert stderr.count("\n") == 1
    assert stderr.startswith("drotator: ")
    assert said in stderr
    assert files(checkpoint) == before
    assert {path for path in tmp_path.iterdir() if path.name != "run"} == {checkpoint}
    assert not list(tmp_path.glob("run/**/*.safetensors"))


def test_a_checkpoint_that_stands_in_a_new_runs_folder_is_not_replaced(inputs: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "run" / "checkpoint"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint is there already and is not replaced: give another hydra.run.di"):
        run_prune(settings(inputs, rotation="none"), tmp_path / "run", baseline=False)
    assert files(tmp_path) == {"run/checkpoint/config.json": b"{}"}
