"""LoRA on pruned checkpoints: what is kept, what is trained, what is written, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import some_tokens, tiny_model
from tiny_runs import TOKENS, make_inputs, process_environment, report_of, settings
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from drotator import cli, recover
from drotator.config import CalibrationConfig, ModelConfig, RecoverCommandConfig, RecoverConfig
from drotator.lora import ADAPTER, MaskedLinear, add_adapters, merged_weight
from drotator.pipeline import run_prune
from drotator.report import load_report

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def pruned(inputs: Path) -> dict[str, Path]:
    """A rotated and a plain run, by rotation; never changed."""
    runs = {name: inputs / f"run-{name}" for name in ("per_layer", "none")}
    for name, run in runs.items():
        run_prune(settings(inputs, rotation=name, pruner="wanda"), run, baseline=False)
    return runs


def recovery(
    inputs: Path, checkpoint: Path, *, batch_size: int = 2, resume: str = "", dtype: str = "auto", **lora: Any
):
    """Settings of a recovery of 16 windows that takes a second: 8 steps, or what `lora` says."""
    given = {"learning_rate": 2e-2, "warmup_steps": 2, "epochs": 1} | lora
    return RecoverCommandConfig(
        model=ModelConfig(path=str(checkpoint), dtype=dtype),
        calibration=CalibrationConfig(
            dataset="local", path=str(inputs / "text.txt"), num_samples=16, seqlen=32, batch_size=batch_size
        ),
        eval=settings(inputs).eval,
        recover=RecoverConfig(**given),
        device="cpu",
        resume=resume,
    )


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def is_linear(name: str) -> bool:
    return name.split(".")[-2] in LINEARS and name.endswith(".weight")


@pytest.mark.parametrize("rotation", ["per_layer", "none"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_mask_is_kept_bitwise_and_nothing_but_kept_weights_changes(inputs, pruned, tmp_path, rotation, masked):
    recover.run_recover(recovery(inputs, pruned[rotation] / "checkpoint", masked=masked), tmp_path)
    before, after = tensors_of(pruned[rotation]), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert any("boundary" in name for name in after) == (rotation == "per_layer")
    for name, old in before.items():
        new = after[name]
        assert new.dtype == old.dtype
        if is_linear(name):
            assert torch.equal(new == 0, old == 0)
            assert not new[new == 0].signbit().any()
            assert (new != old).sum() > 0.9 * (old != 0).sum()
        else:
            assert torch.equal(new, old)
    configs = [json.loads((run / "checkpoint" / "config.json").read_text()) for run in (pruned[rotation], tmp_path)]
    assert {**configs[1], "drotator": None} == {**configs[0], "drotator": None}


def test_the_report_has_the_numbers_before_and_after_and_what_the_pruning_run_knew(inputs, pruned, tmp_path, capsys):
    value = recover.run_recover(recovery(inputs, pruned["per_layer"] / "checkpoint", epochs=4), tmp_path)
    report, origin = report_of(tmp_path), report_of(pruned["per_layer"])
    assert report["metrics"]["dense"] == origin["metrics"]["dense"]
    assert report["metrics"]["pruned"] == origin["metrics"]["pruned"]
    assert value == report["metrics"]["recovered"]["passages"] < 0.8 * report["metrics"]["pruned"]["passages"]
    assert report["sparsity_realised"] == report["provenance"]["sparsity_before"] == origin["sparsity_realised"] == 0.5
    assert report["provenance"]["sparsity_after"] == 0.5
    assert [report[name] for name in ("pruner", "sparsity", "rotation")] == ["wanda", "2of4", "per_layer"]
    assert report["provenance"]["recover.rank"] == 8
    assert report["seconds"].keys() == {"load", "train", "evaluate", "total"}
    assert load_report(tmp_path).final == report["metrics"]["recovered"]
    said = "LoRA of rank 8 on 16 x 32 tokens of local, 32 steps, merged under the mask"
    for text in ((tmp_path / name).read_text() for name in ("report.md", "checkpoint/README.md")):
        assert said in text
        assert f"{value:.2f}" in text
    assert "recovered" in capsys.readouterr().out
    metadata = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["drotator"]
    assert (metadata["pruner"], metadata["recovered"]) == ("wanda", said)
    assert metadata["metrics"] == report["metrics"]


def test_dense_metrics_that_were_measured_otherwise_are_not_shown(inputs, pruned, tmp_path):
    given = recovery(inputs, pruned["none"] / "checkpoint")
    given.eval = dataclasses.replace(given.eval, windows=3)
    recover.run_recover(given, tmp_path)
    assert report_of(tmp_path)["metrics"]["dense"] == {}


def test_the_loss_falls_and_every_step_is_in_the_metrics(inputs, pruned, tmp_path):
    recover.run_recover(recovery(inputs, pruned["none"] / "checkpoint", epochs=4), tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(32))
    losses = [step["loss"] for step in steps]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    rates = [step["learning_rate"] for step in steps]
    assert rates[:3] == [1e-2, 2e-2, 2e-2]
    assert rates[2:] == pytest.approx([2e-2 * (32 - step) / 30 for step in range(2, 32)])


class Interruption:
    """Stands for the progress line and interrupts after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, description: str, total: int) -> Interruption:
        return self

    def __enter__(self) -> Any:
        return self.advance

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, note: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted_after", [2, 5])
def test_a_resumed_run_ends_bitwise_as_if_never_stopped(inputs, pruned, tmp_path, monkeypatch, interrupted_after):
    given = recovery(inputs, pruned["per_layer"] / "checkpoint", save_every=3, epochs=2)
    recover.run_recover(given, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(recover, "progress", Interruption(interrupted_after))
        with pytest.raises(KeyboardInterrupt):
            recover.run_recover(given, tmp_path / "cut")
    assert not (tmp_path / "cut" / "checkpoint").exists()
    saved = len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines())
    assert saved == 3 * (interrupted_after // 3)
    given.resume = str(tmp_path / "cut")
    with monkeypatch.context() as patch:  # what was measured before is not measured again
        patch.setattr(recover.evaluation, "evaluate", lambda *_, **__: {"passages": 1.0})
        recover.run_recover(given, tmp_path / "cut")
    whole, cut = (tensors_of(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "cut" / "metrics.jsonl").read_text()
    reports = [report_of(tmp_path / name) for name in ("whole", "cut")]
    assert reports[0]["metrics"]["pruned"] == reports[1]["metrics"]["pruned"]
    assert reports[1]["seconds"].keys() == reports[0]["seconds"].keys()


def test_a_run_stopped_while_it_measured_goes_on_there_and_a_finished_one_is_only_read(inputs, pruned, tmp_path):
    given = recovery(inputs, pruned["none"] / "checkpoint")
    value = recover.run_recover(given, tmp_path)
    before = (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    report = report_of(tmp_path)
    (tmp_path / "report.json").unlink()
    given.resume = str(tmp_path)
    assert recover.run_recover(given, tmp_path) == value
    assert report_of(tmp_path)["metrics"] == report["metrics"]
    written = (tmp_path / "report.json").stat().st_mtime_ns
    assert recover.run_recover(given, tmp_path) == value
    assert (tmp_path / "report.json").stat().st_mtime_ns == written
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns == before


def test_a_damaged_state_is_told_with_what_to_do(inputs, pruned, tmp_path, monkeypatch):
    given = recovery(inputs, pruned["none"] / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(recover, "progress", Interruption(1))
        with pytest.raises(KeyboardInterrupt):
            recover.run_recover(given, tmp_path)
    (tmp_path / recover.STATE).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"training.safetensors is damaged .*: delete it, and resume trains from the"):
        recover.run_recover(given, tmp_path)


def test_a_checkpoint_that_has_changed_since_is_refused(inputs, pruned, tmp_path, monkeypatch):
    checkpoint = shutil.copytree(pruned["none"] / "checkpoint", tmp_path / "checkpoint")
    given = recovery(inputs, checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(recover, "progress", Interruption(1))
        with pytest.raises(KeyboardInterrupt):
            recover.run_recover(given, tmp_path / "run")
    file = checkpoint / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"other inputs: model.safetensors="):
        recover.run_recover(given, tmp_path / "run")


def test_a_checkpoint_that_stands_in_the_folder_is_never_replaced(inputs, pruned, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint is there already and is not replaced: give another hydra.run.di"):
        recover.run_recover(recovery(inputs, pruned["none"] / "checkpoint"), tmp_path)
    assert (tmp_path / "checkpoint" / "config.json").read_text() == "{}"
    untouched = tensors_of(pruned["none"])
    with pytest.raises(ValueError, match="holds a run with other settings"):
        recover.run_recover(recovery(inputs, pruned["none"] / "checkpoint"), pruned["none"])
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in tensors_of(pruned["none"]).items())


def test_a_fresh_process_loads_the_checkpoints_with_the_logits_of_the_models_in_memory(
    inputs, pruned, tmp_path, monkeypatch
):
    logits = []
    original = recover.train

    def train(model, training):
        original(model, training)
        with torch.no_grad():
            logits.append(model(TOKENS).logits)

    monkeypatch.setattr(recover, "train", train)
    for rotation, run in pruned.items():
        recover.run_recover(recovery(inputs, run / "checkpoint"), tmp_path / rotation)
    code = (
        "import torch; from tiny_runs import TOKENS; from transformers import AutoModelForCausalLM as Auto\n"
        "models = [Auto.from_pretrained(f'{run}/checkpoint', trust_remote_code=run != 'none') for run in RUNS]\n"
        "assert not any('drotator' in type(model).__module__.split('.')[0] for model in models)\n"
        "torch.save([model.eval()(TOKENS).logits.detach() for model in models], 'logits.pt')"
    )
    environment = process_environment(HF_HOME=str(tmp_path / "hub"))
    command = [sys.executable, "-c", f"RUNS = {list(pruned)}\n{code}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    before = AutoModelForCausalLM.from_pretrained(pruned["none"] / "checkpoint")(TOKENS).logits.detach()
    for loaded, expected in zip(torch.load(tmp_path / "logits.pt", weights_only=True), logits, strict=True):
        torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
        assert (loaded - before).abs().max() > 0.1


def half_pruned(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    """A tiny model with zeros in half of the weights of its linears, and the names of those."""
    model = tiny_model(family, dtype)
    names = [name for name, _ in model.named_parameters() if is_linear(name)]
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight[torch.rand(weight.shape) < 0.5] = 0
    return model, names


def with_random_adapters(model: Any, names: list[str], **given: Any) -> dict[str, Any]:
    adapters = add_adapters(model, names, RecoverConfig(**({"rank": 3, "dropout": 0.0} | given)))
    for module in adapters.values():
        torch.nn.init.normal_(module.lora_B[ADAPTER].weight, std=0.05)
    return adapters


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_masked_update_is_that_of_a_dense_reference_with_its_gradients(family):
    reference, _ = half_pruned(family)
    model, names = half_pruned(family)
    adapters = with_random_adapters(model, names, alpha=6)
    pairs = {
        name: tuple(part[ADAPTER].weight.detach().clone().requires_grad_() for part in (module.lora_A, module.lora_B))
        for name, module in adapters.items()
    }
    updated = {}
    for name, (A, B) in pairs.items():
        W = reference.get_parameter(name).detach()
        updated[name] = W + (W != 0) * (6 / 3) * (B @ A)
    tokens = some_tokens()
    expected = functional_call(reference, updated, (tokens,), {"labels": tokens})
    found = model(tokens, labels=tokens)
    assert (expected.logits - reference(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    expected.loss.backward()
    found.loss.backward()
    for name, module in adapters.items():
        for part, given in zip((module.lora_A, module.lora_B), pairs[name], strict=True):
            torch.testing.assert_close(part[ADAPTER].weight.grad, given.grad, rtol=1e-3, atol=1e-5)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


def test_without_the_mask_in_training_the_update_is_dense_and_merging_masks_it():
    model, names = half_pruned()
    adapters = with_random_adapters(model, names, masked=False)
    x = torch.randn(5, 32)
    module = adapters["model.layers.1.mlp.up_proj.weight"]
    assert not isinstance(module, MaskedLinear)
    W, update = module.base_layer.weight, module.get_delta_weight(ADAPTER)
    bias = module.base_layer.bias
    torch.testing.assert_close(module(x), x @ (W + update).mT + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged_weight(module), (W != 0) * (W + update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_weight_that_would_become_zero_stays_kept(dtype):
    module: Any = SimpleNamespace(
        lora_A={ADAPTER: torch.nn.Linear(4, 1, bias=False)},
        lora_B={ADAPTER: torch.nn.Linear(1, 2, bias=False)},
        scaling={ADAPTER: 2.0},
        get_base_layer=lambda: base,
    )
    base = torch.nn.Linear(4, 2, bias=False, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[0.5, 0.0, -0.0, 1.0], [0.25, 1.0, 0.0, -0.5]]))
        module.lora_A[ADAPTER].weight.copy_(torch.tensor([[0.5, 1.0, 1.0, 0.0]]))
        module.lora_B[ADAPTER].weight.copy_(torch.tensor([[-0.5], [0.0]]))
    merged = merged_weight(module)
    tiny = torch.finfo(dtype).smallest_normal
    assert merged.tolist() == [[tiny, 0.0, 0.0, 1.0], [0.25, 1.0, 0.0, -0.5]]
    assert not merged[merged == 0].signbit().any()


def test_micro_batches_add_up_to_the_batch_and_checkpointed_gradients_are_the_same(
    inputs, pruned, tmp_path, monkeypatch
):
    calls, losses = [], {}
    original = recover.checkpoint
    monkeypatch.setattr(recover, "checkpoint", lambda *args, **given: calls.append(1) or original(*args, **given))
    for name, given in {
        "batch": {"batch_size": 5},
        "micro": {"batch_size": 1, "accumulation": 5},
        "checkpointing": {"batch_size": 5, "gradient_checkpointing": True},
    }.items():
        given = recovery(inputs, pruned["per_layer"] / "checkpoint", dropout=0.0, warmup_steps=1, **given)
        assert given.num_steps == 4  # the last one has one window
        recover.run_recover(given, tmp_path / name)
        steps = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(step)["loss"] for step in steps]
    assert len(calls) == 4 * 3  # steps, layers
    assert losses["micro"] == pytest.approx(losses["batch"], rel=1e-4)
    assert losses["checkpointing"] == pytest.approx(losses["batch"], rel=1e-4)


def test_an_epoch_takes_every_window_once_in_an_order_of_its_own(inputs, tmp_path):
    given = recovery(inputs, tmp_path, batch_size=3, epochs=2)
    training = recover.Training(given, SimpleNamespace(), torch.arange(16)[:, None], SimpleNamespace())
    orders = [[int(i) for step in range(first, first + 6) for i in training.batch(step)] for first in (0, 6)]
    assert [sorted(order) for order in orders] == [list(range(16))] * 2
    assert orders[0] != orders[1]


def test_a_bfloat16_checkpoint_stays_one_and_its_adapters_are_trained_in_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("DROTATOR_CACHE", str(tmp_path / "cache"))
    inputs = make_inputs(tmp_path, dtype=torch.bfloat16)
    run_prune(settings(inputs, pruner="magnitude", rotation="none"), tmp_path / "run", baseline=False)
    recover.run_recover(recovery(inputs, tmp_path / "run" / "checkpoint"), tmp_path / "new")
    before, after = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "new")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert {tensor.dtype for tensor in load_file(tmp_path / "new" / recover.STATE).values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_keeps_the_mask_goes_on_where_it_stopped_and_lowers_the_perplexity(
    inputs, pruned, tmp_path, monkeypatch, dtype
):
    given = recovery(inputs, pruned["per_layer"] / "checkpoint", epochs=4, save_every=3, dtype=dtype)
    given.device = "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(recover, "progress", Interruption(7))
        with pytest.raises(KeyboardInterrupt):
            recover.run_recover(given, tmp_path)
    given.resume = str(tmp_path)
    recover.run_recover(given, tmp_path)
    before, after = tensors_of(pruned["per_layer"]), tensors_of(tmp_path)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before if is_linear(name))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 32
    metrics = report_of(tmp_path)["metrics"]
    assert metrics["recovered"]["passages"] < 0.8 * metrics["pruned"]["passages"]


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(inputs, pruned, tmp_path):
    given = recovery(inputs, pruned["none"] / "checkpoint", learning_rate=1e30, save_every=1)
    with pytest.raises(RuntimeError, match=r"The loss of step \d is (nan|inf). Lower recover.learning_rate."):
        recover.run_recover(given, tmp_path)
    saved = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert saved and all(map(math.isfinite, saved))
    assert not (tmp_path / "checkpoint").exists()


def words_of(inputs: Path, checkpoint: Path, *more: str) -> list[str]:
    text = ["calibration=local", f"calibration.path={inputs / 'text.txt'}", "calibration.seqlen=32"]
    few = ["calibration.num_samples=4", "recover.warmup_steps=1"]
    return ["recover", f"model.path={checkpoint}", *text, *few, *more]


def test_a_dense_model_is_refused_in_one_line(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recover.calibration, "calibration_windows", lambda *_: pytest.fail("something long started"))
    capfd.readouterr()
    assert cli.main(words_of(inputs, inputs / "model")) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"drotator: model.path={inputs / 'model'} is not pruned (0.00% zeros in its linears)")
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_run_is_recovered_on_the_command_line_and_measured_as_it_was(inputs, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words_of(inputs, pruned["none"] / "checkpoint"), f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    report = report_of(tmp_path / "run")
    assert report["metrics"]["pruned"] == report_of(pruned["none"])["metrics"]["pruned"]
    assert report["provenance"]["recover.masked"] is True


def of_another_family(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def in_float16(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))


def with_few_positions(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))


def quantised(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (of_another_family, "gpt2"),
        (in_float16, "is in float16, which is not trained in: set model.dtype=bfloat16 or float32"),
        (with_few_positions, "calibration.seqlen=32 is more than the 16 positions"),
        (quantised, "quantised"),
    ],
)
def test_what_cannot_be_recovered_is_refused_before_anything_is_made(inputs, pruned, tmp_path, damage, said):
    shutil.copytree(pruned["none"] / "checkpoint", tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=said):
        recover.run_recover(recovery(inputs, tmp_path / "checkpoint"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"warmup_steps": 8}, "recover.warmup_steps=8 is not allowed: less than the 8 steps that the text gives."),
        ({"rank": 0}, "recover.rank=0 is not allowed: 1 or more."),
        ({"dropout": 1.0}, "recover.dropout=1.0 is not allowed: 0 or more, and below 1."),
        ({"learning_rate": 0.0}, "recover.learning_rate=0.0 is not allowed: above 0."),
        ({"weight_decay": -1.0}, "recover.weight_decay=-1.0 is not allowed: 0 or more."),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, lora, said):
    with pytest.raises(ValueError, match=said):
        recovery(tmp_path, tmp_path, **lora)
    with pytest.raises(ValueError, match=r"model.dtype=float16 is not allowed: train in bfloat16 or float32."):
        recovery(tmp_path, tmp_path, dtype="float16")
