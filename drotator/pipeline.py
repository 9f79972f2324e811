"""`drotator prune`: from a folder of weights to a pruned checkpoint and its report. The loop over layers is here."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drotator import calibration, evaluation
from drotator.architecture import LAYERS, ModelSource, linear
from drotator.artifacts import RunFolder, versions
from drotator.checkpoint import update_metadata
from drotator.config import PruneConfig, describe
from drotator.console import progress
from drotator.dense import dense_metrics
from drotator.export import export_checkpoint, merged_rotation
from drotator.fetch import load_tokenizer, resolve_model
from drotator.plots import (
    plot_importance_curves,
    plot_importance_image,
    plot_layers,
    plot_objective,
    plot_perplexity,
)
from drotator.pruners import validate
from drotator.pruning import (
    DenseLayer,
    LayerContext,
    importance_of_gate,
    learn_rotation,
    merge,
    open_layer,
    prune_linears,
)
from drotator.report import load_report, write_report
from drotator.resources import (
    Stopwatch,
    check_disk_space,
    choose_device,
    device_name,
    peak_memory,
    reset_peak_memory,
)
from drotator.results import LayerResult, Metrics, RunReport, first_value
from drotator.rotation import Rotation, fold_norms
from drotator.statistics import ActivationStream
from drotator.summary import print_summary
from drotator.training import TrainedRotation

logger = logging.getLogger(__name__)

DISK_MARGIN = 1.05
STAGES = ("load", "calibrate", "rotate", "prune", "evaluate")


def run_prune(settings: PruneConfig, run_dir: Path, *, baseline: bool) -> float:
    """Prune a model and report on it; with `baseline` also without rotation, in a second run folder beside the first.

    Returns: what a sweep would minimise: the first perplexity, or minus the zero-shot mean, nan if nothing is measured.
    Raises: ValueError for what cannot work, before anything long starts. RuntimeError for what goes wrong on the way.
    """
    if settings.resume:
        run_dir = Path(settings.resume)
        if not (run_dir / "config.yaml").exists():
            raise ValueError(f"resume={settings.resume}: there is no run (no config.yaml) in that folder.")
    planned = [(settings, RunFolder.open(run_dir, describe(settings)))]
    if baseline:
        unrotated = dataclasses.replace(settings, rotation=dataclasses.replace(settings.rotation, name="none"))
        folder = run_dir.with_name(f"{run_dir.name}-plain")
        planned.insert(0, (unrotated, RunFolder.open(folder, describe(unrotated))))
    job = prepare(planned)
    plain = run_once(*planned[0], job) if baseline else None
    report = run_once(*planned[-1], job, plain)
    print_summary(report, plain)
    logger.info("run folder: %s", run_dir)
    return first_value(settings.eval.perplexity, report.metrics["pruned"])


@dataclass(frozen=True)
class Job:
    """What all runs of one command share. windows: (num_samples, seqlen) int64 calibration tokens."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor
    device: torch.device
    dense: Metrics
    seconds: dict[str, float]


def prepare(planned: list[tuple[PruneConfig, RunFolder]]) -> Job:
    """Load and check everything that can be wrong with the runs, then evaluate the dense model.

    Args:
        planned: the runs of one command; their settings differ in the rotation alone.
    """
    settings, run = planned[-1]
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    watch = Stopwatch(device)
    with watch.measure("load"):
        source = ModelSource.open(resolve_model(settings.model.path, settings.model.revision), settings.model.dtype)
        for inputs, names in source.spec.inputs.items():
            for name in names:
                validate(settings.sparsity, source.sizes.input_size(inputs), f"{LAYERS}.0.{name}")
        check_disk_space(run.path, sum(missing_bytes(to_do, source, one.rotation.name) for one, to_do in planned))
        tokenizer = load_tokenizer(source.folder)
        windows = calibration.calibration_windows(settings.calibration, tokenizer)
    with watch.measure("evaluate"):
        dense = dense_metrics(source, tokenizer, settings.eval, seed=settings.seed, device=device)
    return Job(source, tokenizer, windows, device, dense, watch.seconds)


def missing_bytes(run: RunFolder, source: ModelSource, rotation: str) -> int:
    """Estimate what the run will still write: layers, the checkpoint, and float32 rotations."""
    layer = sum(tensor.numel() for tensor in source.skeleton.get_submodule(f"{LAYERS}.0").state_dict().values())
    model = sum(tensor.numel() for tensor in source.skeleton.state_dict().values())
    left = sum(not run.layer_file(index).exists() for index in range(source.num_layers))
    R1 = source.sizes.hidden_size**2 if rotation != "none" else 0
    weights = left * layer + model + (source.num_layers * R1 if rotation == "per_layer" else 0)
    return int(DISK_MARGIN * (weights * source.dtype.itemsize + left * R1 * 4))


def run_once(settings: PruneConfig, run: RunFolder, job: Job, plain: RunReport | None = None) -> RunReport:
    """Do one run in its folder, or read its report if it is there already."""
    if (run.path / "report.json").exists():
        logger.info("%s is finished already", run.path)
        return load_report(run.path)
    reset_peak_memory(job.device)
    watch = Stopwatch(job.device)
    results = prune_layers(settings, job, run)
    names = {
        "model": settings.model.name,
        "pruner": settings.pruner.name,
        "sparsity": settings.sparsity.label,
        "rotation": settings.rotation.name,
        "objective": settings.objective.name,
        "optimizer": settings.optimizer.name,
    }
    is_rotated = settings.rotation.name != "none"
    with watch.measure("load"):
        export_checkpoint(settings.rotation.name, run, job.source, dict(names))
    with watch.measure("evaluate"):
        pruned = evaluation.evaluate_checkpoint(
            run.checkpoint, job.tokenizer, settings.eval, seed=settings.seed, device=job.device
        )
        update_metadata(run.checkpoint, {"metrics": {"dense": job.dense, "pruned": pruned}})
    seconds = dict.fromkeys(STAGES, 0.0)
    for part in (job.seconds, watch.seconds, *(result.seconds for result in results)):
        for stage, value in part.items():
            seconds[stage] += value
    report = RunReport(
        **names,
        seed=settings.seed,
        metrics={"dense": job.dense, "pruned": pruned},
        sparsity_realised=realised_sparsity(job.source, results),
        layers=results,
        seconds={**seconds, "total": sum(seconds.values())},
        peak_memory_bytes=largest([peak_memory(job.device), *(result.peak_memory_bytes for result in results)]),
        versions=versions(),
        provenance={
            **calibration.provenance(settings.calibration),
            **evaluation.provenance(settings.eval, job.tokenizer),
            "steps": settings.optimizer.steps,
            "learning_rate": settings.optimizer.learning_rate,
            "device": device_name(job.device),
            "dtype": job.source.dtype_name,
        },
    )
    columns = {"dense": job.dense, **({"plain": plain.metrics["pruned"]} if plain else {})}
    plot_perplexity(run.plots / "perplexity.png", columns | {"rotated" if is_rotated else "plain": pruned})
    plot_layers(run.plots / "layers.png", report, plain)
    if is_rotated:
        plot_objective(run.plots / "objective.png", results)
    write_report(run.path, report, baseline=plain)
    return report


def prune_layers(settings: PruneConfig, job: Job, run: RunFolder) -> list[LayerResult]:
    """Rotate and prune the layers one after another; those that the run folder holds are only read.

    Returns: one result for each layer.
    """
    if settings.rotation.name == "shared" and not run.has_rotations(job.source.num_layers):
        learn_shared_rotation(settings, job, run)
    results: list[LayerResult] = []

    def visit(context: LayerContext) -> tuple[Tensor | None, str]:
        index = context.index
        if run.layer_file(index).exists():
            state, result = run.load_layer(index)
            context.layer.load_state_dict(state)
            R1 = merged_rotation(settings.rotation.name, run, index, job.device)
        else:
            R1, result = prune_layer(context, settings, run)
            run.save_layer(index, context.layer.state_dict(), result)
        for warning in result.warnings:
            logger.warning("layer %d: %s", index, warning)
        results.append(result)
        run.write_metrics({"event": "layer", **asdict(done)} for done in results)
        return R1, layer_note(result)

    what = "pruning" if settings.rotation.name == "none" else "rotating and pruning"
    walk_layers(job, settings.calibration.batch_size, visit, f"{what} layers")
    return results


def walk_layers(
    job: Job, batch_size: int, visit: Callable[[LayerContext], tuple[Tensor | None, str]], description: str
) -> None:
    """Bring every decoder layer to the device in turn, let `visit` change it, and send the activations through it.

    visit: returns the R1 (d, d) that is merged in the layer, or None, and a note for the progress line.
    """
    stream = ActivationStream.start(job.source, job.windows, batch_size, job.device)
    layer, R1 = None, None
    with progress(description, job.source.num_layers) as advance:
        for index in range(job.source.num_layers):
            watch = Stopwatch(job.device)
            if layer is not None:
                with watch.measure("calibrate"):
                    stream.advance(layer, index - 1, R1)
            with watch.measure("load"):
                layer = job.source.layer(index, job.device)
            context = LayerContext(
                index, layer, job.source.spec, job.source.sizes, job.source.num_layers, stream, watch
            )
            R1, note = visit(context)
            advance(note)


def learn_shared_rotation(settings: PruneConfig, job: Job, run: RunFolder) -> None:
    """Learn one R1 for the model and R2 of each layer from the dense model's statistics, into the run folder."""
    layers: list[DenseLayer] = []

    def visit(context: LayerContext) -> tuple[None, str]:
        layers.append(open_layer(context, settings))
        return None, ""

    walk_layers(job, settings.calibration.batch_size, visit, "dense statistics")
    logger.info("learning one R1 for %d layers in %d steps", len(layers), settings.optimizer.steps)
    trained = learn_rotation(layers, settings)
    draw_importance(run, layers[len(layers) // 2], trained.rotation, settings)
    for index, (layer, R2) in enumerate(zip(layers, trained.rotation.R2.chunk(len(layers)), strict=True)):
        rotation = Rotation(trained.rotation.R1, R2)
        before, after = (layer.objective_at(at) for at in (None, rotation))
        run.save_rotation(
            index, dataclasses.replace(trained, rotation=rotation, objective_before=before, objective_after=after)
        )


def prune_layer(context: LayerContext, settings: PruneConfig, run: RunFolder) -> tuple[Tensor | None, LayerResult]:
    """Rotate (if asked) and prune one layer in place.

    Returns: the R1 (d, d) float64 that was merged, or None, and the layer's result.
    """
    reset_peak_memory(context.stream.device)
    trained: TrainedRotation | None = None
    R1, known = None, None
    if settings.rotation.name == "per_layer":
        dense = open_layer(context, settings)
        trained = learn_rotation([dense], settings)
        run.save_rotation(context.index, trained)
        if context.index == context.num_layers // 2:
            draw_importance(run, dense, trained.rotation, settings)
        R1 = merge(context, dense.weights, trained.rotation).R1
        H = dense.hessians.get("attention")
        known = None if H is None else (R1.mT @ H.double() @ R1).float()
    elif settings.rotation.name == "shared":
        trained = run.load_rotation(context.index)
        rotation = trained.rotation.to(context.stream.device)
        R1 = merge(context, fold_norms(context.layer, context.spec), rotation).R1
    linears, raised = prune_linears(context, settings.pruner, settings.sparsity, R1, known)
    return R1, LayerResult(
        index=context.index,
        objective_before=trained.objective_before if trained else 0.0,
        objective_after=trained.objective_after if trained else 0.0,
        orthogonality=trained.orthogonality if trained else 0.0,
        linears=linears,
        seconds=dict(context.watch.seconds),
        objective_history=trained.history if trained else [],
        damping=raised,
        peak_memory_bytes=peak_memory(context.stream.device),
        warnings=[
            *(trained.warnings if trained else []),
            *(f"{name}: damping raised to {damping:g}" for name, damping in raised.items()),
        ],
    )


def draw_importance(run: RunFolder, dense: DenseLayer, rotation: Rotation, settings: PruneConfig) -> None:
    """Plot the importance of one linear's weights before and after the rotation."""
    before, after = (importance_of_gate(dense, at, settings).cpu() for at in (None, rotation))
    title = f"layer {dense.context.index}, {dense.context.spec.gate}"
    plot_importance_image(run.plots / "importance_image.png", before, after, title)
    plot_importance_curves(run.plots / "importance_curves.png", before, after, title)


def layer_note(result: LayerResult) -> str:
    """One line on a finished layer: objective, mean relative error."""
    errors = [linear.relative_error for linear in result.linears.values()]
    error = f"error {sum(errors) / len(errors):.4f}"
    if not result.objective_history:
        return error
    return f"objective {result.objective_before:.4g} -> {result.objective_after:.4g}, {error}"


def realised_sparsity(source: ModelSource, results: list[LayerResult]) -> float:
    """Part of exact zeros in all pruned linears of the model."""
    layer = source.skeleton.get_submodule(f"{LAYERS}.0")
    sizes = {name: linear(layer, name).weight.numel() for name in source.spec.linears}
    zeros = sum(sizes[name] * found.sparsity for result in results for name, found in result.linears.items())
    return zeros / (len(results) * sum(sizes.values()))


def largest(records: list[dict[str, int]]) -> dict[str, int]:
    return {name: max(record[name] for record in records) for name in records[0]}
