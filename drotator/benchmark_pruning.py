"""`drotator bench kind=pruning`: what a rotation step, Hessians, the pruner and the whole pipeline cost.

Everything that is timed is what `drotator prune` calls, at the model's shapes; weights, tokens and moments are random.
Several processes share the work as they do there.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from drotator import bounds
from drotator.architecture import LAYERS, LayerCall, ModelSource
from drotator.artifacts import RunFolder
from drotator.bounds import Work
from drotator.config import EvalConfig, ModelConfig, PruneConfig, describe
from drotator.distributed import ALONE, World
from drotator.measurement import Bench, Timing, duration, time_call, wall_seconds
from drotator.memory import plan_memory
from drotator.objectives import INPUT_OF, LayerProblem, chosen_salience, require_batches
from drotator.offload import Batches
from drotator.optimizers import OPTIMIZERS, retract
from drotator.paper_formulation import SALIENCES, STEPS, paper_step, sparsegpt_by_columns
from drotator.pipeline import run_once
from drotator.preparation import Job, missing_bytes
from drotator.products import FLOAT8, choose_products, sixteen_bits
from drotator.pruners import validate
from drotator.pruners.sparsegpt import prune_sparsegpt
from drotator.pruners.sweep_kernel import is_available
from drotator.pruning import LayerContext, learn_rotation, objective_of, open_layer, prune_weights, starting_rotation
from drotator.resources import Stopwatch, check_disk_space, float32_products, peak_memory, reset_peak_memory
from drotator.results import RunReport
from drotator.shapes import random_moments, random_weight, write_random_model
from drotator.statistics import ActivationStream, collect_hessians

logger = logging.getLogger(__name__)

TRAININGS = 3
"""How often a training of each length is timed."""
LAYER_STAGES = ("load", "calibrate", "rotate", "prune")


def check_pruning(bench: Bench) -> None:
    """Raises: ValueError if the settings exclude each other, or the sparsity does not fit the shapes."""
    source = bench.source
    for name in objectives(bench):
        settings_of(bench, name)
    require_batches(bench.settings.optimizer.batches, source.sizes)
    for inputs, names in source.spec.inputs.items():
        for name in names:
            validate(bench.settings.sparsity, source.sizes.input_size(inputs), f"{LAYERS}.0.{name}")


def run_pruning(bench: Bench, run_dir: Path) -> None:
    """Measure all parts, the rotation step first."""
    if bench.settings.rotation.name != "none":
        with folder_of_all(bench.world, run_dir, ".layer-") as folder:
            bench_steps(bench, folder)
        bench_updates(bench)
    bench_moments(bench)
    if bench.settings.pruner.name != "none":
        bench_pruner(bench)
    if bench.settings.bench.layers:
        with folder_of_all(bench.world, run_dir, ".pipeline-") as folder:
            bench_pipeline(bench, folder)


@contextmanager
def folder_of_all(world: World, parent: Path, prefix: str) -> Iterator[Path]:
    """A folder that the first process makes, and removes when all are done with it."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) if world.is_first else nullcontext("") as name:
        yield Path(world.share(lambda: name))
        world.barrier()


def random_model(bench: Bench, folder: Path, num_layers: int) -> ModelSource:
    """A model of some layers, written to folder/model by the first process."""

    def write() -> None:
        write_random_model(folder / "model", bench.source, num_layers, device=bench.device, seed=bench.settings.seed)

    bench.world.share(write)
    return ModelSource.open(folder / "model")


def objectives(bench: Bench) -> list[str]:
    return list(dict.fromkeys(bench.settings.bench.objectives)) or [bench.settings.objective.name]


def settings_of(bench: Bench, objective: str, path: str = "random") -> PruneConfig:
    """The settings of `drotator prune` for a model in the folder `path`."""
    given = bench.settings
    return PruneConfig(
        model=ModelConfig(name=given.model.name, path=path, dtype=bench.source.dtype_name),
        pruner=given.pruner,
        sparsity=given.sparsity,
        rotation=given.rotation,
        objective=dataclasses.replace(given.objective, name=objective),
        optimizer=given.optimizer,
        calibration=given.calibration,
        eval=EvalConfig(name="none", perplexity=[], tasks=[]),
        offload=given.offload,
        seed=given.seed,
    )


def random_windows(bench: Bench, source: ModelSource, num_samples: int) -> Tensor:
    """Random tokens, (num_samples, calibration.seqlen) int64."""
    generator = torch.Generator().manual_seed(bench.settings.seed)
    size = (num_samples, bench.settings.calibration.seqlen)
    return torch.randint(source.config.vocab_size, size, generator=generator)


def bench_steps(bench: Bench, folder: Path) -> None:
    """One step of training for every objective, beside the paper's, and what it comes to for the model."""
    given, device, sizes, num_layers = bench.settings, bench.device, bench.source.sizes, bench.source.num_layers
    source = random_model(bench, folder, 1)
    windows = random_windows(bench, source, given.calibration.batch_size)
    paper: float | None = None
    for name in objectives(bench):
        settings = settings_of(bench, name)
        stream = ActivationStream.start(source, windows, given.calibration.batch_size, device, world=bench.world)
        context = LayerContext(0, source.layer(0, device), source.spec, sizes, 1, stream, Stopwatch(device))
        problem = open_layer(context, settings).problem
        del stream, context
        if given.bench.paper and paper is None:
            paper = time_paper(bench, problem).milliseconds
        timing, set_up = time_step(problem, settings, given.bench.steps, device, bench.world)
        reads_moments = chosen_salience(settings.objective, settings.pruner.name) != "magnitude"
        batches, in_float8 = given.optimizer.batches, problem.products == FLOAT8
        work = bounds.rotation_step(sizes, reads_moments=reads_moments, batches=batches, in_float8=in_float8)
        details = [*(["float8"] if in_float8 else []), *([f"1 of {batches} batches"] if batches > 1 else [])]
        row = bench.add(
            ", ".join(["rotation step", name, given.optimizer.name, *details]),
            timing,
            work,
            objective=name,
            optimizer=given.optimizer.name,
            paper=paper,
        )
        times = given.optimizer.steps * num_layers
        if not times:
            continue
        total = Timing(times * row.milliseconds + num_layers * set_up, timing.peak_bytes)
        row = bench.add(
            f"rotations of the model, {given.optimizer.steps} steps",
            total,
            work * times,
            objective=name,
            optimizer=given.optimizer.name,
            paper=None if paper is None else STEPS * num_layers * paper,
        )
        bench.note(
            f"Rotations of the model ({name}): {given.optimizer.steps} steps of {num_layers} layers, and "
            f"{duration(set_up)} a layer to set up a training: {duration(row.milliseconds)}."
        )
    if paper is not None:
        bench.note(
            f"Paper's formulation (entropy, adam_qr, no compilation, no CUDA graph): {duration(paper)} a step; "
            f"{STEPS} steps of {num_layers} layers: {duration(STEPS * num_layers * paper)}."
        )


def time_step(
    problem: LayerProblem, settings: PruneConfig, steps: int, device: torch.device, world: World = ALONE
) -> tuple[Timing, float]:
    """Time a step as the training loop takes it: trainings of two lengths, and the difference over their steps.

    Returns: one step, and the milliseconds of a training beside its steps (capture of a CUDA graph, the history).
    """
    objective = objective_of(problem, settings, world)
    start = starting_rotation(problem, 1, settings)

    def milliseconds(num_steps: int) -> float:
        asked = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, steps=num_steps))
        return 1e3 * wall_seconds(
            lambda: learn_rotation([objective], start, asked, world, precision=problem.precision), device
        )

    few, many = steps, 2 * steps  # after one step alone R1 is so near to I that polishing it takes less time
    milliseconds(few)
    reset_peak_memory(device)
    both = [(milliseconds(few), milliseconds(many)) for _ in range(TRAININGS)]
    short, long = (statistics.median(times) for times in zip(*both, strict=True))
    # Of a step too short for the clock, the whole training is the bound from above.
    step = (long - short) / steps if long > short else long / (many + 1)
    peak = peak_memory(device)["device" if device.type == "cuda" else "host"]
    return Timing(step, peak), max(long - (many + 1) * step, 0.0)


def time_paper(bench: Bench, problem: LayerProblem) -> Timing:
    """Time a step of the paper's formulation on the same weights and moments."""
    given = bench.settings
    salience = chosen_salience(dataclasses.replace(given.objective, name="entropy"), given.pruner.name)
    salience = salience if salience in SALIENCES else "obs"
    if salience != "magnitude" and not problem.hessians:
        salience = "magnitude"
    return time_call(paper_step(problem, salience, given.pruner.damping), bench.device)


def bench_updates(bench: Bench) -> None:
    """What the optimizer does with a gradient of R1, alone and launched one kernel after another."""
    given, device, sizes = bench.settings, bench.device, bench.source.sizes
    generator = torch.Generator(device).manual_seed(given.seed)
    G, U = (torch.randn(sizes.hidden_size, sizes.hidden_size, generator=generator, device=device) for _ in range(2))
    U = (U - U.mT) * (0.05 / sizes.hidden_size**0.5)
    R = torch.eye(sizes.hidden_size, device=device)
    products = sixteen_bits(choose_products(given.optimizer, sizes, bench.source.dtype, device))
    precision = "highest" if products is None else "high"
    optimizer = OPTIMIZERS[given.optimizer.name](R, given.optimizer.learning_rate, products=products)
    half = torch.full((), 0.5, device=device)
    with torch.no_grad(), float32_products(precision):
        timing = time_call(lambda: optimizer.update(G, half), device)
        name = f"update of R1, {given.optimizer.name}"
        bench.add(name, timing, bounds.rotation_update(sizes), optimizer=given.optimizer.name)
        bench.add(
            "retraction of R1", time_call(lambda: retract(R, U, 0.05, products), device), bounds.retraction(sizes)
        )


class _Reader(nn.Module):
    """Stands for a layer: hands what it is given to the module of that name, where moments are collected."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.name = name
        module: nn.Module = self
        *outer, last = name.split(".")
        for part in outer:
            module.add_module(part, nn.Identity())
            module = module.get_submodule(part)
        module.add_module(last, nn.Linear(size, 1, device="meta"))  # which is asked for its size, and never run

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.get_submodule(self.name)(hidden)
        return found


def bench_moments(bench: Bench) -> None:
    """Accumulation of H from activations that are there, for each width of inputs, and for a layer's calibration."""
    given, device, source = bench.settings, bench.device, bench.source
    generator = torch.Generator(device).manual_seed(given.seed)
    batch, seqlen = given.calibration.batch_size, given.calibration.seqlen
    num_batches = given.calibration.num_samples / batch
    found: dict[int, Timing] = {}
    for inputs in source.spec.inputs:
        size = source.sizes.input_size(inputs)
        if size in found:
            continue
        x = bench.world.own(torch.randn(batch, seqlen, size, generator=generator, device=device).to(source.dtype))
        hidden = Batches(device, batches=[x] if len(x) else [])
        stream = ActivationStream(hidden, {len(x): LayerCall(({},))}, device, world=bench.world)
        reader = _Reader(source.spec.inputs[inputs][0], size)

        def collect(reader: nn.Module = reader, stream: ActivationStream = stream, inputs: str = inputs) -> object:
            return collect_hessians(reader, source.spec, stream, 0, (inputs,))

        found[size] = time_call(collect, device, world=bench.world)
        work = bounds.moments(size, batch * seqlen)
        bench.add(f"Hessian of {size} inputs, {batch * seqlen} tokens", found[size], work)
    times = [found[source.sizes.input_size(inputs)] for inputs in source.spec.inputs]
    tokens = given.calibration.num_samples * seqlen
    total = Timing(num_batches * sum(one.milliseconds for one in times), max(one.peak_bytes for one in times))
    bench.add(f"Hessians of a layer, {tokens} tokens", total, bounds.moments_of_layer(source.sizes, tokens))


def bench_pruner(bench: Bench) -> None:
    """The pruner on the seven linears of a layer, their H given. Beside SparseGPT's kernel its plain sweep, and with
    bench.paper what its paper does."""
    given, device, sizes = bench.settings, bench.device, bench.source.sizes
    generator = torch.Generator(device).manual_seed(given.seed)
    shapes = bounds.linear_shapes(sizes)
    H = {d_in: random_moments(d_in, generator) for _, d_in in shapes.values()}
    weights = {name: random_weight(name, torch.Size(shape), generator) for name, shape in shapes.items()}
    readers = [[W for name, W in weights.items() if INPUT_OF[name] == inputs] for inputs in bounds.INPUTS]
    name, work = given.pruner.name, bounds.pruning(sizes, given.pruner)

    def prune() -> None:
        for of_same in readers:
            unscaled = [None] * len(of_same)
            prune_weights(of_same, H[of_same[0].shape[1]], unscaled, given.sparsity, given.pruner, bench.world)

    def own_rows(of_same: list[Tensor]) -> list[Tensor]:
        return [bench.world.own(W) if given.sparsity.is_grouped else W for W in of_same]

    def prune_plainly() -> None:
        for of_same in readers:
            moments = H[of_same[0].shape[1]]
            prune_sparsegpt(own_rows(of_same), moments, given.sparsity, given.pruner, may_use_kernel=False)

    def prune_by_columns() -> None:
        for of_same in readers:
            for W in own_rows(of_same):
                sparsegpt_by_columns(W.clone(), H[W.shape[1]], given.sparsity, given.pruner)

    timing = time_call(prune, device, world=bench.world)
    if name != "sparsegpt":
        bench.add(f"{name}, 7 linears", timing, work)
        return
    slower = {}
    if is_available(weights["query"].T, given.pruner.block_size):
        slower["plain sweep"] = time_call(prune_plainly, device, warm_up=False)
    else:
        bench.note("SparseGPT's Triton kernel does not run here: its plain sweep was timed.")
    if given.bench.paper:
        slower["column by column"] = time_call(prune_by_columns, device, warm_up=False)
    slowest = max(slower, key=lambda label: slower[label].milliseconds, default="")
    faster_than = (slowest, slower[slowest].milliseconds) if slower else None
    bench.add(f"{name}, 7 linears", timing, work, faster_than=faster_than)
    for label, other in slower.items():
        bench.add(f"{name}, {label}", other, work)


def bench_pipeline(bench: Bench, folder: Path) -> None:
    """The pipeline itself on a model of a few such layers: seconds of its stages, and what they come to for all layers.

    A layer counts as the mean of those after the first, which has no layer before it to run; of all of them where they
    are learned together, in the first one's time.
    """
    given, device, num_layers = bench.settings, bench.device, bench.settings.bench.layers
    report, source = prune_random_model(bench, folder)
    sizes = source.sizes
    calibrated = given.calibration
    tokens = calibrated.num_samples * calibrated.seqlen
    is_rotated = given.rotation.name != "none"
    in_float8 = choose_products(given.optimizer, sizes, source.dtype, device) == FLOAT8
    least = {
        "load": Work(bytes=bounds.layer_bytes(sizes)),
        "calibrate": bounds.moments_of_layer(sizes, tokens)
        + bounds.forward(sizes, calibrated.num_samples, calibrated.seqlen),
        "rotate": bounds.rotation_step(sizes, batches=given.optimizer.batches, in_float8=in_float8)
        * (given.optimizer.steps if is_rotated else 0),
        "prune": Work() if given.pruner.name == "none" else bounds.pruning(sizes, given.pruner),
    }
    peak = max(layer.peak_memory_bytes["device" if device.type == "cuda" else "host"] for layer in report.layers)
    counted = report.layers if given.rotation.name == "shared" else (report.layers[1:] or report.layers)
    seconds = {stage: statistics.fmean(layer.seconds.get(stage, 0.0) for layer in counted) for stage in LAYER_STAGES}
    whole = Work()
    for work in least.values():
        whole += work
    parts = {stage: (1e3 * seconds[stage], least[stage]) for stage in LAYER_STAGES if seconds[stage]}
    parts["all stages"] = (1e3 * sum(seconds.values()), whole)
    of_layers = sum(sum(layer.seconds.values()) for layer in report.layers)
    around = (report.seconds["total"] - of_layers) / num_layers  # reading embeddings, writing the checkpoint
    all_layers = bench.source.num_layers
    for what, times in (("layer", 1), (f"model of {all_layers} layers", all_layers)):
        for stage, (milliseconds, work) in parts.items():
            if work.seconds(bench.peaks):
                more = 1e3 * around if stage == "all stages" and what != "layer" else 0.0
                bench.add(
                    f"{what}: {stage}",
                    Timing(times * (milliseconds + more), peak),
                    work * times,
                    objective=given.objective.name,
                    optimizer=given.optimizer.name,
                )
    bench.note(
        f"Pipeline: measured on {calibrated.num_samples} x {calibrated.seqlen} random tokens and {num_layers} of "
        f"{all_layers} layers. Rows of the model are extrapolated; all stages hold {duration(1e3 * around)} a layer "
        f"for the checkpoint, and no evaluation."
    )


def prune_random_model(bench: Bench, folder: Path) -> tuple[RunReport, ModelSource]:
    """Write a random model and a run of `drotator prune` on it to `folder`; nothing is evaluated."""
    given, device, world = bench.settings, bench.device, bench.world
    source = random_model(bench, folder, given.bench.layers)
    settings = settings_of(bench, given.objective.name, str(source.folder))
    run = RunFolder.open(folder / "run", describe(settings), world)
    check_disk_space(run.path, missing_bytes(run, source, settings.rotation))
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"word": 0}, unk_token="word")))
    windows = random_windows(bench, source, given.calibration.num_samples)
    memory = plan_memory(settings, source, device, world)
    return run_once(settings, run, Job(source, nothing, windows, device, {}, {}, memory, world)), source
