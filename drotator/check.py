"""`drotator check`: does merging rotations leave the model's function as it was? On the user's own model."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from drotator import calibration
from drotator.architecture import ModelSource
from drotator.artifacts import RunFolder
from drotator.checkpoint import load_checkpoint
from drotator.config import CheckConfig, EvalConfig, PruneConfig, PrunerConfig, RotationConfig, describe
from drotator.console import console
from drotator.export import export_checkpoint
from drotator.fetch import load_tokenizer, resolve_model
from drotator.folders import write_text
from drotator.memory import plan_memory
from drotator.pipeline import prune_layers
from drotator.preparation import Job, missing_bytes
from drotator.resources import check_disk_space, choose_device
from drotator.results import LayerResult
from drotator.rotation import Rotation, fold_norms, merge_rotation
from drotator.training import TrainedRotation

logger = logging.getLogger(__name__)

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""What rounding may change, as a part of the logits' scale: the dtype's precision times the depth of a model."""
NUM_WINDOWS = 2


@dataclass(frozen=True)
class Difference:
    """largest: of all logits, before against after merging. scale: the largest logit's magnitude before."""

    rotation: str
    dtype: str
    largest: float
    scale: float
    limit: float

    @property
    def relative(self) -> float:
        return self.largest / self.scale

    @property
    def is_within(self) -> bool:
        return self.relative <= self.limit


def run_check(settings: CheckConfig, run_dir: Path) -> float:
    """Compare the dense model's logits with those after random and after learned rotations were merged.

    In float32 and in the dtype that the checkpoint would be stored in; prints a table and writes check.json.

    Returns: the largest difference as a part of the logits' scale.
    Raises: RuntimeError if it is more than rounding explains.
    """
    device = choose_device(settings.device)
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    folder = resolve_model(settings.model.path, settings.model.revision)
    tokenizer = load_tokenizer(folder)
    windows = calibration.calibration_windows(settings.calibration, tokenizer)
    stored = ModelSource.open(folder, settings.model.dtype).dtype
    found = []
    for dtype in dict.fromkeys((torch.float32, stored)):
        source = ModelSource.open(folder, str(dtype).removeprefix("torch."))
        given = as_learned(settings)
        job = Job(source, tokenizer, windows, device, {}, {}, plan_memory(given, source, device))
        dense = logits(folder, windows, dtype, device)
        for name, rotate in (("random", rotate_randomly), ("learned", rotate_as_learned)):
            with tempfile.TemporaryDirectory(dir=run_dir, prefix=f".{name}-") as temporary:
                run = RunFolder.open(Path(temporary), describe(settings))
                check_disk_space(run.path, missing_bytes(run, source, RotationConfig()))
                rotate(given, job, run)
                export_checkpoint(RotationConfig(), run, source, {})
                merged = logits(run.checkpoint, windows, dtype, device)
            largest, scale = float((merged - dense).abs().max()), float(dense.abs().max())
            found.append(Difference(name, str(dtype).removeprefix("torch."), largest, scale, LIMITS[dtype]))
    console().print(table(found))
    records = [asdict(difference) | {"relative": difference.relative} for difference in found]
    write_text(run_dir / "check.json", json.dumps(records, indent=2) + "\n")
    if wrong := [difference for difference in found if not difference.is_within]:
        raise RuntimeError(
            f"merging {wrong[0].rotation} rotations changes the logits by {wrong[0].relative:.2g} of their scale in "
            f"{wrong[0].dtype}, more than the {wrong[0].limit:g} that rounding explains. Do not prune this model."
        )
    return max(difference.relative for difference in found)


@torch.no_grad()
def logits(folder: Path, windows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits (windows, seqlen, vocab_size) float32, on the CPU, of the first calibration windows."""
    model = load_checkpoint(folder, dtype=str(dtype).removeprefix("torch."), device=device)
    return torch.cat([model(window[None].to(device)).logits.float().cpu() for window in windows[:NUM_WINDOWS]])


def rotate_randomly(settings: PruneConfig, job: Job, run: RunFolder) -> None:
    """Fill the run folder with dense layers that carry random rotations."""
    generator = torch.Generator().manual_seed(settings.seed)
    for index in range(job.source.num_layers):
        layer = job.source.layer(index)
        rotation = Rotation.random(job.source.sizes, generator).to(dtype=torch.float32)
        weights = fold_norms(layer, job.source.spec)
        merge_rotation(layer, job.source.spec, job.source.sizes, rotation.polished(), weights)
        run.save_rotation(index, TrainedRotation(rotation, 0.0, 0.0, rotation.orthogonality()))
        nothing = LayerResult(
            index=index, objective_before=0.0, objective_after=0.0, orthogonality=0.0, linears={}, seconds={}
        )
        run.save_layer(index, layer.state_dict(), nothing)


def as_learned(settings: CheckConfig) -> PruneConfig:
    """The settings of a `drotator prune` that learns rotations and prunes nothing."""
    return PruneConfig(
        model=settings.model,
        pruner=PrunerConfig(name="none"),
        sparsity=settings.sparsity,
        rotation=RotationConfig(name="per_layer"),
        objective=settings.objective,
        optimizer=settings.optimizer,
        calibration=settings.calibration,
        eval=EvalConfig(perplexity=[], tasks=[]),
        seed=settings.seed,
    )


def rotate_as_learned(settings: PruneConfig, job: Job, run: RunFolder) -> None:
    """Fill the run folder with dense layers that carry rotations learned as `drotator prune` learns them."""
    prune_layers(settings, job, run)


def table(found: list[Difference]) -> Table:
    shown = Table(title="Logits before and after merging")
    for heading in ("rotations", "dtype", "largest difference", "logits' scale", "ratio", "limit", ""):
        shown.add_column(heading, justify="left" if heading in ("rotations", "dtype") else "right")
    for difference in found:
        shown.add_row(
            difference.rotation,
            difference.dtype,
            f"{difference.largest:.2e}",
            f"{difference.scale:.3g}",
            f"{difference.relative:.1e}",
            f"{difference.limit:g}",
            "ok" if difference.is_within else "TOO LARGE",
        )
    return shown
