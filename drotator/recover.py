"""`drotator recover`: LoRA fine-tuning of a pruned checkpoint that keeps its mask, from its folder to a new one.

Only the adapters of the pruned linears are trained: embeddings, norms, head and boundary matrices stay as they are.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drotator import calibration, evaluation
from drotator.architecture import LAYERS, layer_spec
from drotator.artifacts import RunFolder, folder_to_use, load_tensors, save_tensors, versions
from drotator.checkpoint import (
    MODEL_TYPE_PREFIX,
    check_checkpoint,
    load_checkpoint,
    read_metadata,
    update_metadata,
    weight_files,
    write_checkpoint,
)
from drotator.config import RecoverCommandConfig, describe
from drotator.console import progress
from drotator.fetch import load_tokenizer, resolve_model
from drotator.folders import open_shard, read_json
from drotator.lora import add_adapters, merged_weight
from drotator.plots import plot_perplexity
from drotator.report import load_report, write_report
from drotator.resources import (
    Stopwatch,
    check_disk_space,
    choose_device,
    device_name,
    float32_products,
    peak_memory,
    reset_peak_memory,
)
from drotator.results import DETAILS, Metrics, RunReport, first_value
from drotator.summary import NAMES, columns_of, print_summary

logger = logging.getLogger(__name__)

STATE = "training.safetensors"
DISK_MARGIN = 1.05
LEAST_SPARSITY = 0.05  # a dense model has zeros too: 1% when it has been in 8 bits
GRADIENT_NORM = 1.0


def run_recover(settings: RecoverCommandConfig, run_dir: Path) -> float:
    """Train adapters on a pruned checkpoint, merge them under its mask into RUN/checkpoint, and report on it.

    Returns: what a sweep would minimise: the first perplexity, or minus the zero-shot mean, nan if nothing is measured.
    Raises: ValueError for what cannot work, before anything long starts. RuntimeError for what goes wrong on the way.
    """
    run_dir = folder_to_use(settings.resume, run_dir)
    device = choose_device(settings.device)
    watch = Stopwatch(device)
    with watch.measure("load"):
        source = PrunedModel.open(settings)
        run = RunFolder.open(run_dir, describe(settings), parts=["plots"])
        if (run.path / "report.json").exists():
            logger.info("%s is finished already", run.path)
            report = load_report(run.path)
        else:
            check_room(run, source)
            tokenizer = load_tokenizer(source.folder)
            windows = calibration.calibration_windows(settings.calibration, tokenizer)
            run.keep_inputs(source.folder, windows)
            evaluation.prepare(settings.eval, tokenizer)
            report = None
    if report is None:
        reset_peak_memory(device)
        training = Training(settings, run, windows, watch)
        if (run.checkpoint / "config.json").is_file():
            training.read()
        else:
            recover_checkpoint(source, tokenizer, training)
        report = report_on(source, tokenizer, training)
    print_summary(report)
    logger.info("run folder: %s", run.path)
    return first_value(settings.eval.perplexity, report.metrics["recovered"])


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """A checkpoint as its files tell it. weights: names of the pruned linears' weights; sparsity: part of zeros."""

    folder: Path
    config: dict[str, Any]
    metadata: dict[str, Any]
    weights: tuple[str, ...]
    sparsity: float

    @classmethod
    def open(cls, settings: RecoverCommandConfig) -> PrunedModel:
        """Read a checkpoint's config and count its zeros.

        Raises: ValueError for a family without a table entry, quantised, newer, incomplete or damaged files, a model
            that is not pruned, a dtype that cannot be trained in, or windows longer than the model's context.
        """
        folder = resolve_model(settings.model.path, settings.model.revision)
        config, metadata = read_json(folder / "config.json"), read_metadata(folder)
        spec = layer_spec(str(config.get("model_type", "unknown")).removeprefix(MODEL_TYPE_PREFIX), folder)
        if config.get("quantization_config") is not None:
            raise ValueError(f"{folder} holds quantised weights; give the float checkpoint.")
        if settings.model.dtype == "auto" and config.get("dtype", config.get("torch_dtype")) == "float16":
            raise ValueError(f"{folder} is in float16, which is not trained in: set model.dtype=bfloat16 or float32.")
        seqlen, context = settings.calibration.seqlen, config.get("max_position_embeddings", math.inf)
        if seqlen > context:
            raise ValueError(
                f"calibration.seqlen={seqlen} is more than the {context} positions of the model. Lower it."
            )
        layers = range(int(config["num_hidden_layers"]))
        weights = tuple(f"{LAYERS}.{index}.{name}.weight" for index in layers for name in spec.linears)
        check_checkpoint(folder)
        sparsity = stored_sparsity(folder, weights)
        if sparsity < LEAST_SPARSITY:
            zeros = f"{100 * sparsity:.2f}% zeros in its linears"
            raise ValueError(
                f"model.path={settings.model.path} is not pruned ({zeros}), so there is no mask to keep: "
                "give the checkpoint of a pruning run."
            )
        return cls(folder=folder, config=config, metadata=metadata, weights=weights, sparsity=sparsity)


def stored_sparsity(folder: Path, weights: Sequence[str]) -> float:
    """Part of exact zeros in these weights of a checkpoint. Raises: ValueError if a file or weight is missing."""
    missing, zeros, size = set(weights), 0, 0
    for path in weight_files(folder):
        with open_shard(path) as stored:
            for name in missing.intersection(stored.keys()):
                weight = stored.get_tensor(name)
                zeros += int((weight == 0).sum())
                size += weight.numel()
                missing.remove(name)
    if missing:
        raise ValueError(f"The checkpoint {folder} is incomplete: {min(missing)} is missing.")
    return zeros / size


def check_room(run: RunFolder, source: PrunedModel) -> None:
    """Refuse a disk without room for the new checkpoint."""
    if not (run.path / STATE).exists():
        check_disk_space(run.path, int(DISK_MARGIN * sum(path.stat().st_size for path in weight_files(source.folder))))


@dataclass
class Training:
    """How far a run is. windows: (num_samples, seqlen) int64; before: metrics of the checkpoint as it was given.

    losses: mean loss of every step that was made; with the adapters and the moments of Adam they are in the file STATE.
    """

    settings: RecoverCommandConfig
    run: RunFolder
    windows: Tensor
    watch: Stopwatch
    before: Metrics = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def has_started(self) -> bool:
        return (self.run.path / STATE).exists()

    def save(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write STATE, from which `restore` goes on bitwise, and the losses so far to metrics.jsonl."""
        tensors = {f"weight {name}": parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            tensors |= {f"{part} {name}": tensor for part, tensor in optimizer.state[parameter].items()}
        record = {"before": self.before, "losses": self.losses, "seconds": self.watch.seconds}
        save_tensors(self.run.path / STATE, tensors, {"training": json.dumps(record)})
        self.run.write_metrics(
            {"event": "step", "step": step, "loss": loss, "learning_rate": self.learning_rate(step)}
            for step, loss in enumerate(self.losses)
        )

    def read(self) -> dict[str, Tensor]:
        """Take over the metrics and losses of STATE and add its seconds to this process's; return its tensors."""
        again = "delete it, and resume trains from the start"
        tensors, record = load_tensors(self.run.path / STATE, "training", remedy=again)
        self.before, self.losses = record["before"], record["losses"]
        for stage, value in record["seconds"].items():
            self.watch.seconds[stage] = self.watch.seconds.get(stage, 0.0) + value
        return tensors

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Put adapters and moments back as they were saved."""
        tensors = self.read()
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(parameters.items()):
                parameter.copy_(tensors.pop(f"weight {name}"))
                parts = [key for key in tensors if key.endswith(f" {name}")]
                moments |= {index: {key.removesuffix(f" {name}"): tensors.pop(key) for key in parts}} if parts else {}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})

    def learning_rate(self, step: int) -> float:
        """A linear rise over the warm-up, then a linear fall to 0."""
        warmup, steps = self.settings.recover.warmup_steps, self.settings.num_steps
        part = (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
        return self.settings.recover.learning_rate * part

    def batch(self, step: int) -> Tensor:
        """The windows of a step: every epoch takes each window once, in an order of its own."""
        size, steps = self.settings.windows_per_step, self.settings.num_steps // self.settings.recover.epochs
        epoch, place = divmod(step, steps)
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        order = torch.randperm(len(self.windows), generator=generator)
        return self.windows[order[size * place : size * (place + 1)]]


def recover_checkpoint(source: PrunedModel, tokenizer: PreTrainedTokenizerBase, training: Training) -> None:
    """Measure the pruned model, train it from where the run stands, and write RUN/checkpoint."""
    settings, run, watch = training.settings, training.run, training.watch
    with watch.measure("load"):
        model = load_checkpoint(source.folder, dtype=settings.model.dtype, device=watch.device)
    if not training.has_started and (settings.eval.perplexity or settings.eval.tasks):
        with watch.measure("evaluate"):
            training.before = evaluation.evaluate(model, tokenizer, settings.eval, seed=settings.seed)
    torch.manual_seed(settings.seed)
    adapters = add_adapters(model, source.weights, settings.recover)
    train(model, training)
    with watch.measure("load"):
        logger.info("writing %s", run.checkpoint)
        write_checkpoint(
            run.checkpoint,
            model_folder=source.folder,
            tensors=recovered_tensors(source, adapters, model.dtype),
            boundaries=source.config.get("boundary_layers") or (),
            untie=False,
            metadata=source.metadata | {"recovered": in_words(settings)},
        )


def train(model: PreTrainedModel, training: Training) -> None:
    """Make the steps that are left, saving on the way; what is trained is every parameter that asks for a gradient.

    Raises: RuntimeError if the loss is not finite.
    """
    settings, device = training.settings.recover, training.watch.device
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if training.has_started:
        training.restore(parameters, optimizer)
    else:
        training.save(parameters, optimizer)
    model.train()
    if settings.gradient_checkpointing:
        # Not by transformers, whose method for it has another name from one version to the next.
        for layer in model.get_submodule(LAYERS).children():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    start, steps = len(training.losses), training.settings.num_steps
    logger.info("training %d parameters, step %d of %d", sum(map(Tensor.numel, parameters.values())), start, steps)
    with progress("recovering, steps", steps - start) as advance, float32_products("high"):
        for step in range(start, steps):
            with training.watch.measure("train"):
                torch.manual_seed(training.settings.seed + step)  # of dropout: no state of it has to be saved
                batch = training.batch(step)
                loss = torch.zeros((), device=device)
                for part in batch.to(device).split(training.settings.calibration.batch_size):
                    output = model(input_ids=part, labels=part, use_cache=False)
                    weighted = output.loss * (len(part) / len(batch))
                    weighted.backward()
                    loss += weighted.detach()
                torch.nn.utils.clip_grad_norm_(parameters.values(), GRADIENT_NORM)
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate(step)
                optimizer.step()
                optimizer.zero_grad()
                training.losses.append(loss.item())
            if not math.isfinite(training.losses[-1]):
                raise RuntimeError(f"The loss of step {step} is {loss.item()}. Lower recover.learning_rate.")
            if (step + 1) % settings.save_every == 0 or step + 1 == steps:
                training.save(parameters, optimizer)
            advance(f"loss {training.losses[-1]:.3f}")
    model.eval()


def recovered_tensors(
    source: PrunedModel, adapters: Mapping[str, Linear], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the new checkpoint by its name: merged where there is an adapter, else as it was.

    Raises: RuntimeError for a merged weight that is not finite, or has other zeros than the checkpoint's.
    """
    for path in weight_files(source.folder):
        with open_shard(path) as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dict
                tensor = stored.get_tensor(name).to(dtype)
                if name in adapters:
                    merged = merged_weight(adapters[name]).cpu()
                    if not (merged.isfinite().all() and torch.equal(merged == 0, tensor == 0)):
                        raise RuntimeError(f"{name} is not finite, or lost its mask: nothing is written.")
                    tensor = merged
                yield name, tensor


def report_on(source: PrunedModel, tokenizer: PreTrainedTokenizerBase, training: Training) -> RunReport:
    """Measure the new checkpoint, and write the report. The run that pruned the model is asked for what it knows."""
    settings, run, watch = training.settings, training.run, training.watch
    with watch.measure("evaluate"):
        recovered = evaluation.evaluate_checkpoint(
            run.checkpoint, tokenizer, settings.eval, seed=settings.seed, device=watch.device
        )
    measured = evaluation.provenance(settings.eval, tokenizer)
    pruned = source.folder.parent / "report.json"
    origin = load_report(pruned) if pruned.is_file() else None
    known = origin.provenance if origin else {}
    is_comparable = origin is not None and all(known.get(name) == value for name, value in measured.items())
    dense = origin.metrics.get("dense", {}) if origin and is_comparable else {}
    metrics = {"dense": dense, "pruned": training.before, "recovered": recovered}
    update_metadata(run.checkpoint, {"metrics": {name: values for name, values in metrics.items() if values}})
    sparsity = stored_sparsity(run.checkpoint, source.weights)
    names = {name: str(source.metadata.get(name, "unknown")) for name in NAMES}
    report = RunReport(
        **names,
        seed=settings.seed,
        metrics=metrics,
        sparsity_realised=sparsity,
        layers=[],
        seconds={**watch.seconds, "total": sum(watch.seconds.values())},
        peak_memory_bytes=peak_memory(watch.device),
        versions=versions(),
        provenance={
            **{name: known[name] for name in ("steps", *DETAILS) if name in known},
            **calibration.provenance(settings.calibration),
            **measured,
            "recovered": in_words(settings),
            "recovered_from": str(source.folder),
            **{f"recover.{name}": value for name, value in describe(settings.recover).items()},
            "sparsity_before": source.sparsity,
            "sparsity_after": sparsity,
            "device": device_name(watch.device),
            "dtype": read_json(run.checkpoint / "config.json")["dtype"],
        },
    )
    plot_perplexity(run.plots / "perplexity.png", columns_of(report, None))
    write_report(run.path, report)
    return report


def in_words(settings: RecoverCommandConfig) -> str:
    """What was done, in one line, for the model card and the report."""
    text, lora = settings.calibration, settings.recover
    return (
        f"LoRA of rank {lora.rank} on {text.num_samples} x {text.seqlen} tokens of {text.dataset}, "
        f"{settings.num_steps} steps, merged under the mask"
    )
