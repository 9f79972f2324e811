"""`drotator prune`: from a folder of weights to a pruned checkpoint and its report. The loop over layers is here."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from drotator import calibration, evaluation
from drotator.architecture import LAYERS, LayerSpec, ModelSource, linear
from drotator.artifacts import RunFolder, folder_to_use, versions
from drotator.checkpoint import update_metadata
from drotator.config import PruneConfig, RotationConfig, describe
from drotator.console import progress
from drotator.distributed import World
from drotator.export import export_checkpoint, merged_rotation
from drotator.importance import ImportanceSummary, summarise
from drotator.objectives import LayerProblem
from drotator.offload import Offload
from drotator.plots import (
    plot_importance_curves,
    plot_importance_image,
    plot_layers,
    plot_objective,
    plot_perplexity,
)
from drotator.preparation import Job, prepare
from drotator.products import choose_products, name_of
from drotator.pruning import (
    LayerContext,
    importance_of_gate,
    learn_layer,
    learn_rotation,
    merge,
    open_layer,
    prune_linears,
    starting_rotation,
)
from drotator.reconstruction import reconstruct_layer
from drotator.report import load_report, write_report
from drotator.resources import Stopwatch, device_name, peak_memory, reset_peak_memory
from drotator.results import LayerResult, RunReport, details_of, first_value
from drotator.rotation import Rotation, fold_norms, reorder_intermediate
from drotator.sharing import ProblemStore
from drotator.statistics import ActivationStream
from drotator.summary import print_summary
from drotator.training import TrainedRotation

logger = logging.getLogger(__name__)

STAGES = ("load", "calibrate", "rotate", "prune", "evaluate")


def run_prune(settings: PruneConfig, run_dir: Path, *, baseline: bool) -> float:
    """Prune a model and report on it; with `baseline` also without rotation, in a second run folder beside the first.

    Processes that torch.distributed has joined all call this, with the same settings, and share the work.

    Returns: what a sweep would minimise: the first perplexity, or minus the zero-shot mean, nan if nothing is measured.
    Raises: ValueError for what cannot work, before anything long starts. RuntimeError for what goes wrong on the way.
    """
    world = World.current()
    run_dir = folder_to_use(settings.resume, run_dir, world)
    planned = [(settings, RunFolder.open(run_dir, describe(settings), world))]
    if baseline:
        unrotated = dataclasses.replace(settings, rotation=RotationConfig(name="none"))
        folder = run_dir.with_name(f"{run_dir.name}-plain")
        planned.insert(0, (unrotated, RunFolder.open(folder, describe(unrotated), world)))
    job = prepare(planned)
    plain = run_once(*planned[0], job) if baseline else None
    report = run_once(*planned[-1], job, plain)
    print_summary(report, plain)
    logger.info("run folder: %s", run_dir)
    return first_value(settings.eval.perplexity, report.metrics["pruned"])


def run_once(settings: PruneConfig, run: RunFolder, job: Job, plain: RunReport | None = None) -> RunReport:
    """Do one run in its folder, or read its report if it is there already."""
    if finished := job.world.share(lambda: finished_report(run)):
        return finished
    reset_peak_memory(job.device)
    results = prune_layers(settings, job, run)
    memory = largest(job.world.gather(peak_memory(job.device)))
    return job.world.share(lambda: conclude(settings, RunFolder(run.path), job, results, memory, plain))


def finished_report(run: RunFolder) -> RunReport | None:
    """The report that stands in the run folder."""
    if not (run.path / "report.json").exists():
        return None
    logger.info("%s is finished already", run.path)
    return load_report(run.path)


def conclude(
    settings: PruneConfig,
    run: RunFolder,
    job: Job,
    results: list[LayerResult],
    memory: dict[str, int],
    plain: RunReport | None,
) -> RunReport:
    """Make the checkpoint from the run folder, measure it and report.

    Args:
        memory: peak bytes so far, on the host and on the device.
    """
    watch = Stopwatch(job.device)
    names = {
        "model": settings.model.name,
        "pruner": settings.pruner.name,
        "sparsity": settings.sparsity.label,
        "rotation": settings.rotation.name,
        "objective": settings.objective.name,
        "optimizer": settings.optimizer.name,
    }
    is_rotated, stored = settings.rotation.name != "none", (job.source.sizes, job.source.dtype, job.device)
    with watch.measure("load"):
        export_checkpoint(settings.rotation, run, job.source, dict(names), job.device)
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
        peak_memory_bytes=largest([memory, peak_memory(job.device), *(result.peak_memory_bytes for result in results)]),
        versions=versions(),
        provenance={
            **calibration.provenance(settings.calibration),
            **evaluation.provenance(settings.eval, job.tokenizer),
            "steps": settings.optimizer.steps,
            "learning_rate": settings.optimizer.learning_rate,
            **details_of(settings),
            "optimizer.products": name_of(choose_products(settings.optimizer, *stored)) if is_rotated else "",
            "device": device_name(job.device),
            "processes": job.world.size,
            "offload": job.memory.level,
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

    Where the device's memory does not suffice, it goes on with the activations kept farther from it.

    Returns: one result for each layer.
    Raises: RuntimeError that says what to set if nothing more can be moved away.
    """
    levels = job.memory.levels
    if job.world.size > 1:
        levels = levels[:1]  # where one process fails, the others are in the midst of a layer
    for level, following in zip_longest(levels, levels[1:]):
        offload = Offload(level, run.scratch("activations"))
        offload.clear()
        try:
            return prune_layers_with(offload, settings, job, run)
        except torch.OutOfMemoryError as error:
            failure = str(error).partition(". ")[0]
        finally:
            offload.clear()
        gc.collect()  # the layer that failed is gone before it is begun again
        if following:
            logger.warning("%s. Going on with offload=%s.", failure, following)
    raise RuntimeError(
        f"{failure}. Before the run {job.memory}. Lower calibration.batch_size, or set offload=host, offload=disk or "
        f"device=cpu, and go on with resume={run.path}."
    )


def prune_layers_with(offload: Offload, settings: PruneConfig, job: Job, run: RunFolder) -> list[LayerResult]:
    """`prune_layers` with the activations kept in one place. Raises: torch.OutOfMemoryError."""
    source, rotation = job.source, settings.rotation
    stream = ActivationStream.start(
        source, job.windows, settings.calibration.batch_size, job.device, offload, job.world
    )
    if settings.reconstruct.name != "none":
        stream.dense = stream.hidden.copy()
    results: list[LayerResult] = []
    before: tuple[nn.Module, Tensor | None] | None = None
    what = "pruning" if rotation.name == "none" else "rotating and pruning"
    with progress(f"{what} layers", source.num_layers) as advance:
        for group in rotation.runs(source.num_layers):
            for index in group:
                watch = Stopwatch(job.device)
                if before is not None:
                    with watch.measure("calibrate"):
                        stream.advance(before[0], index - 1, before[1])
                    before = None  # the next layer takes its place on the device
                if index == group[0] and len(group) > 1 and not run.has_rotations(group):
                    learn_shared_rotation(group, stream, watch, settings, job, run)
                context = open_context(index, stream, watch, job)
                if stream.dense is not None:
                    inputs = stream.dense if settings.reconstruct.target == "model" else stream.hidden
                    with watch.measure("calibrate"):
                        stream.advance_dense(context.layer, index, inputs)
                if run.has_layer(index):
                    state, result = run.load_layer(index)
                    context.layer.load_state_dict(state)
                    R1 = merged_rotation(rotation.name, run, index, job.device)
                else:
                    R1, result = prune_layer(context, settings, run, is_alone=len(group) == 1)
                    run.save_layer(index, context.layer.state_dict(), result)
                before = context.layer, R1
                del context
                for warning in result.warnings:
                    logger.warning("layer %d: %s", index, warning)
                results.append(result)
                run.write_metrics({"event": "layer", **asdict(done)} for done in results)
                advance(layer_note(result))
    return results


def open_context(index: int, stream: ActivationStream, watch: Stopwatch, job: Job) -> LayerContext:
    """Bring a dense layer to the device."""
    source = job.source
    with watch.measure("load"):
        layer = source.layer(index, job.device)
    return LayerContext(index, layer, source.spec, source.sizes, source.num_layers, stream, watch)


def learn_shared_rotation(
    group: range, stream: ActivationStream, watch: Stopwatch, settings: PruneConfig, job: Job, run: RunFolder
) -> None:
    """Learn one R1 for a run of layers, and R2 of each, into the run folder.

    The layers' statistics are those of the dense layers on what the pruned ones before the run put out.
    """
    ahead = stream.fork()
    store = ProblemStore(run.scratch("problems"), settings, job.source.sizes, job.device, job.world)
    orders: list[Tensor | None] = []
    with progress("statistics of dense layers", len(group)) as advance:
        for index in group:
            dense = open_layer(open_context(index, ahead, watch, job), settings)
            store.append(dense.problem)
            orders.append(dense.order)
            if index != group[-1]:
                with watch.measure("calibrate"):
                    ahead.advance(dense.context.layer, index, None)
            del dense  # before the next one fills the device
            advance("")
    logger.info("learning one R1 for %d layers in %d steps", len(group), settings.optimizer.steps)
    with watch.measure("rotate"):
        first = store.problem(0)
        start = starting_rotation(first, len(group), settings, previous_rotation(run, group[0], settings))
        precision = first.precision
        del first  # it may have been read for this alone
        trained = learn_rotation(store, start, settings, job.world, can_capture=store.is_resident, precision=precision)
        identity = Rotation.identity(job.source.sizes, job.device)
        learned = []
        for position, (R2, order) in enumerate(zip(trained.rotation.R2.chunk(len(group)), orders, strict=True)):
            rotation, objective = dataclasses.replace(trained.rotation, R2=R2, order=order), store[position]
            if run.world.is_first and group[position] == job.source.num_layers // 2:
                summaries = importances_summarised(store.problem(position), rotation, settings)
                draw_importance(run, group[position], job.source.spec, *summaries)
            with torch.no_grad():
                terms = (objective(at.R1, at.R2) for at in (identity, rotation))
                values = [float(job.world.all_reduce_(term)) for term in terms]
            learned.append(
                dataclasses.replace(trained, rotation=rotation, objective_before=values[0], objective_after=values[1])
            )
    store.clear()  # while there are no rotations yet: a run that is killed here learns them, and clears, again
    for index, one in zip(group, learned, strict=True):
        run.save_rotation(index, one)


def previous_rotation(run: RunFolder, index: int, settings: PruneConfig) -> Tensor | None:
    """The R1 that training starts from at layer `index`: the layer before's as it was learned, or None."""
    if index == 0 or not settings.optimizer.warm_start:
        return None
    return run.load_rotation(index - 1).rotation.R1


def prune_layer(
    context: LayerContext, settings: PruneConfig, run: RunFolder, *, is_alone: bool
) -> tuple[Tensor | None, LayerResult]:
    """Rotate (if asked) and prune one layer in place.

    Args:
        is_alone: the layer's rotation is its own and is learned here; else it lies in the run folder.
    Returns: the R1 (d, d) float64 that was merged, or None, and the layer's result.
    """
    reset_peak_memory(context.stream.device)
    trained: TrainedRotation | None = None
    merged: Rotation | None = None
    known = None
    sensitivities: Mapping[str, Tensor] = {}
    if settings.rotation.name != "none" and is_alone:
        dense = open_layer(context, settings)
        sensitivities = dense.sensitivities
        trained = learn_layer(dense, settings, previous_rotation(run, context.index, settings))
        run.save_rotation(context.index, trained)
        if run.world.is_first and context.index == context.num_layers // 2:
            summaries = importances_summarised(dense.problem, trained.rotation, settings)
            draw_importance(run, context.index, context.spec, *summaries)
        merged = merge(context, dense.weights, trained.rotation)
        H = dense.problem.hessians.get("attention")
        known = None if H is None else (merged.R1.mT @ H.double() @ merged.R1).float()
        del dense, H  # their memory is wanted by the pruner
    elif settings.rotation.name != "none":
        trained = run.load_rotation(context.index)
        rotation = trained.rotation.to(context.stream.device)
        weights = fold_norms(context.layer, context.spec)
        if rotation.order is not None:
            reorder_intermediate(context.layer, context.spec, weights, rotation.order)
        sensitivities = context.sensitivities(settings.seed) if settings.mask_is_weighed else {}
        merged = merge(context, weights, rotation)
    elif settings.mask_is_weighed:
        sensitivities = context.sensitivities(settings.seed)
    R1, R2 = (merged.R1, merged.R2) if merged else (None, None)
    linears, raised = prune_linears(context, settings.pruner, settings.sparsity, R1, known, R2, sensitivities)
    reconstruction = {}
    if settings.reconstruct.name != "none":
        context.stream.attention = None  # it is tuned too
        with context.watch.measure("prune"):
            reconstruction = asdict(
                reconstruct_layer(
                    context.layer, context.spec, context.stream, context.index, R1, settings.reconstruct, settings.seed
                )
            )
    return R1, LayerResult(
        index=context.index,
        objective_before=trained.objective_before if trained else 0.0,
        objective_after=trained.objective_after if trained else 0.0,
        orthogonality=trained.orthogonality if trained else 0.0,
        linears=linears,
        seconds=dict(context.watch.seconds),
        objective_history=trained.history if trained else [],
        damping=raised,
        reconstruction=reconstruction,
        peak_memory_bytes=largest(context.stream.world.gather(peak_memory(context.stream.device))),
        warnings=[
            *(trained.warnings if trained else []),
            *(f"{name}: damping raised to {damping:g}" for name, damping in raised.items()),
        ],
    )


def importances_summarised(
    problem: LayerProblem, rotation: Rotation, settings: PruneConfig
) -> tuple[ImportanceSummary, ImportanceSummary]:
    """Summaries of the importance of gate_proj's weights before and after the rotation."""
    return (
        summarise(importance_of_gate(problem, None, settings)),
        summarise(importance_of_gate(problem, rotation.R1, settings)),
    )


def draw_importance(
    run: RunFolder, index: int, spec: LayerSpec, before: ImportanceSummary, after: ImportanceSummary
) -> None:
    """Plot the importance of one linear's weights before and after the rotation.

    Matplotlib leaves what its callers hold, and so what this is given, to the collector of cycles: no large tensors.
    """
    title = f"layer {index}, {spec.gate}"
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
