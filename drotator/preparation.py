"""What a pruning run needs before its first layer: everything that can be wrong is loaded and checked here."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drotator import calibration
from drotator.architecture import LAYERS, ModelSource
from drotator.artifacts import RunFolder
from drotator.config import PruneConfig, RotationConfig
from drotator.dense import dense_metrics
from drotator.distributed import ALONE, World
from drotator.fetch import load_tokenizer, resolve_model
from drotator.memory import MemoryPlan, check_evaluation, plan_memory
from drotator.objectives import require_batches
from drotator.products import choose_products
from drotator.pruners import validate
from drotator.resources import Stopwatch, check_disk_space, choose_device
from drotator.results import Metrics

logger = logging.getLogger(__name__)

DISK_MARGIN = 1.05


@dataclass(frozen=True)
class Job:
    """What all runs of one command share. windows: (num_samples, seqlen) int64 calibration tokens."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor
    device: torch.device
    dense: Metrics
    seconds: dict[str, float]
    memory: MemoryPlan
    world: World = ALONE


def prepare(planned: list[tuple[PruneConfig, RunFolder]]) -> Job:
    """Load and check everything that can be wrong with the runs, then evaluate the dense model.

    Args:
        planned: the runs of one command; their settings differ in the rotation alone.
    """
    settings, run = planned[-1]
    world = run.world
    device = choose_device(settings.device, world)
    torch.manual_seed(settings.seed)
    watch = Stopwatch(device)
    with watch.measure("load"):
        folder = world.in_turn(lambda: resolve_model(settings.model.path, settings.model.revision))
        source = ModelSource.open(folder, settings.model.dtype)
        for inputs, names in source.spec.inputs.items():
            for name in names:
                validate(settings.sparsity, source.sizes.input_size(inputs), f"{LAYERS}.0.{name}")
        if settings.rotation.name != "none":
            require_batches(settings.optimizer.batches, source.sizes)
            choose_products(settings.optimizer, source.sizes, source.dtype, device)
        memory = plan_memory(settings, source, device, world)
        logger.info("memory: %s: activations on %s (offload=%s)", memory, memory.level, settings.offload)
        if memory.needs.layer > memory.free_device:
            logger.warning("a layer may not fit on the device: lower calibration.batch_size, or set device=cpu")
        written = sum(missing_bytes(to_do, source, one.rotation) for one, to_do in planned)
        written += sum(world.gather(memory.needs.activations)) if memory.level == "disk" else 0
        world.share(lambda: check_disk_space(run.path, written))
        if world.is_first and (settings.eval.perplexity or settings.eval.tasks):
            check_evaluation(model_bytes(source, settings.rotation), device)
        tokenizer = load_tokenizer(source.folder)
        windows = world.share(lambda: calibration.calibration_windows(settings.calibration, tokenizer))
        for _, to_do in planned:
            to_do.keep_inputs(source.folder, windows)
    with watch.measure("evaluate"):
        dense = world.share(lambda: dense_metrics(source, tokenizer, settings.eval, seed=settings.seed, device=device))
    return Job(source, tokenizer, windows, device, dense, watch.seconds, memory, world)


def missing_bytes(run: RunFolder, source: ModelSource, rotation: RotationConfig) -> int:
    """Estimate what the run will still write: layers, the checkpoint, and float32 rotations."""
    layer = sum(tensor.nbytes for tensor in source.skeleton.get_submodule(f"{LAYERS}.0").state_dict().values())
    left = sum(not run.layer_file(index).exists() for index in range(source.num_layers))
    R1 = 4 * source.sizes.hidden_size**2 if rotation.name != "none" else 0
    return int(DISK_MARGIN * (left * (layer + R1) + model_bytes(source, rotation)))


def model_bytes(source: ModelSource, rotation: RotationConfig) -> int:
    """Size of the rotated model's weights."""
    boundaries = len(rotation.boundaries(source.num_layers)) * source.sizes.hidden_size**2
    return sum(tensor.nbytes for tensor in source.skeleton.state_dict().values()) + boundaries * source.dtype.itemsize
