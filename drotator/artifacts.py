"""The run folder: what a run leaves on disk, and how the same command goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drotator.distributed import ALONE, World
from drotator.folders import fingerprint, write_text
from drotator.results import LayerResult, LinearResult
from drotator.rotation import Rotation
from drotator.training import TrainedRotation

PACKAGES = ("drotator", "torch", "transformers", "datasets", "lm-eval", "hydra-core", "safetensors")
FREE_TO_CHANGE = ("resume", "baseline", "device", "offload", "recover.save_every")
"""Settings that a resumed run may change: they do not decide what a weight becomes."""
MAX_NAMED = 4
PARTS = ("layers", "rotations", "plots")
"""Folders of a pruning run."""


class RunFolder:
    """One run's files. Each is written to a temporary name and renamed, so that what is there is whole.

    Of the processes of a world the first one reads and writes, and the others are told what was read: all of them call
    the same methods.
    """

    def __init__(self, path: Path, world: World = ALONE) -> None:
        self.path = path
        self.world = world
        self.checkpoint = path / "checkpoint"
        self.plots = path / "plots"

    @classmethod
    def open(
        cls, path: Path, settings: dict[str, Any], world: World = ALONE, parts: Sequence[str] = PARTS
    ) -> RunFolder:
        """Create the folder with its `parts`, or open one that was made with the same settings.

        Raises: ValueError if the folder cannot be written, or holds a run with other settings (which are named), or a
            checkpoint that is no run's.
        """
        run = cls(path, world)
        world.share(lambda: run._begin(settings, parts))
        return run

    def _begin(self, settings: dict[str, Any], parts: Sequence[str]) -> None:
        path = self.path
        try:
            is_new = not (path / "config.yaml").exists()
            if is_new and self.checkpoint.exists() and (self.checkpoint.is_file() or any(self.checkpoint.iterdir())):
                raise ValueError(
                    f"{self.checkpoint} is there already and is not replaced: give another hydra.run.dir=FOLDER."
                )
            for part in parts:
                (path / part).mkdir(parents=True, exist_ok=True)
            if is_new:
                write_text(path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            else:
                self._compare(settings)
            write_text(path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"The run folder {path} cannot be written: {error.strerror or error}.") from error

    def _compare(self, settings: dict[str, Any]) -> None:
        try:
            old = flatten(dict(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{self.path / 'config.yaml'} is damaged: start a new run without resume.") from error
        self._refuse("other settings", changes(old, flatten(settings), free=FREE_TO_CHANGE))

    def _refuse(self, what: str, changed: list[str]) -> None:
        if changed:
            more = f", and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
            raise ValueError(
                f"{self.path} holds a run with {what}: {', '.join(changed[:MAX_NAMED])}{more}. "
                "Give them as they were, or start a new run without resume."
            )

    def keep_inputs(self, model_folder: Path, windows: Tensor) -> None:
        """Note in inputs.json which weight files and which calibration tokens the run is made of.

        Raises: ValueError if the run was begun with others (which are named).
        """
        self.world.share(lambda: self._keep_inputs(model_folder, windows))

    def _keep_inputs(self, model_folder: Path, windows: Tensor) -> None:
        tokens = f"{'x'.join(map(str, windows.shape))}, {hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12]}"
        inputs = {file.name: fingerprint(file) for file in sorted(model_folder.glob("*.safetensors"))}
        inputs["calibration tokens"] = tokens
        path = self.path / "inputs.json"
        if not path.exists():
            write_text(path, json.dumps(inputs, indent=2) + "\n")
            return
        try:
            old = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged: start a new run without resume.") from error
        self._refuse("other inputs", changes(old, inputs))

    def scratch(self, name: str) -> Path:
        """A folder for files that only this process reads."""
        return self.path / (name if self.world.is_first else f"{name}-{self.world.rank}")

    def layer_file(self, index: int) -> Path:
        return self.path / "layers" / f"{index:03d}.safetensors"

    def rotation_file(self, index: int) -> Path:
        return self.path / "rotations" / f"{index:03d}.safetensors"

    def save_layer(self, index: int, state: dict[str, Tensor], result: LayerResult) -> None:
        """Save a finished layer: its state dict, and its result in the file's metadata."""
        if self.world.is_first:
            save_tensors(self.layer_file(index), state, {"result": json.dumps(asdict(result))})

    def has_layer(self, index: int) -> bool:
        return self.world.share(self.layer_file(index).exists)

    def load_layer(self, index: int) -> tuple[dict[str, Tensor], LayerResult]:
        state, record = self.world.share(lambda: load_tensors(self.layer_file(index), "result"))
        linears = {name: LinearResult(**linear) for name, linear in record.pop("linears").items()}
        return state, LayerResult(linears=linears, **record)

    def has_rotations(self, layers: Iterable[int]) -> bool:
        return self.world.share(lambda: all(self.rotation_file(index).exists() for index in layers))

    def save_rotation(self, index: int, trained: TrainedRotation) -> None:
        """Save R1 and R2 as learned, float32; in the file's metadata what R2 may be, and how the training went."""
        if not self.world.is_first:
            return
        record = {f.name: getattr(trained, f.name) for f in fields(trained) if f.name != "rotation"}
        record["value_map"] = trained.rotation.value_map
        tensors = {name: tensor for name, tensor in vars(trained.rotation).items() if isinstance(tensor, Tensor)}
        save_tensors(self.rotation_file(index), tensors, {"training": json.dumps(record)})

    def load_rotation(self, index: int) -> TrainedRotation:
        """The layer's rotation as it was learned; its `polished()` is the one that was merged."""
        tensors, record = self.world.share(lambda: load_tensors(self.rotation_file(index), "training"))
        value_map = record.pop("value_map", "orthogonal")  # older files do not say
        return TrainedRotation(Rotation(**tensors, value_map=value_map), **record)

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        if self.world.is_first:
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def folder_to_use(resume: str, run_dir: Path, world: World = ALONE) -> Path:
    """The folder of the run to go on with, or `run_dir` for a new one. Raises: ValueError if there is no such run."""
    if not resume:
        return run_dir
    if not world.share((Path(resume) / "config.yaml").exists):
        raise ValueError(f"resume={resume}: there is no run (no config.yaml) in that folder.")
    return Path(resume)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors 0.8 lets nobody but the owner read it
    os.replace(partial, path)


def load_tensors(path: Path, record: str, *, remedy: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors, and the metadata entry `record`.

    Args:
        remedy: what to do about a file that cannot be read, if it is no layer's.
    Raises: ValueError that names the file if it is missing or damaged, and what to delete.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = json.loads((stored.metadata() or {})[record])
            return {name: stored.get_tensor(name) for name in stored.keys()}, metadata  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        remedy = remedy or f"delete {path.name} in layers and in rotations there, and resume makes both again"
        raise ValueError(f"{path} {problem}: {remedy}.") from error


def changes(old: dict[str, Any], new: dict[str, Any], *, free: Sequence[str] = ()) -> list[str]:
    """What differs, but for the names that are free to, as "name=new (was old)"."""
    return [
        f"{name}={new.get(name)} (was {old.get(name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in free
    ]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that decide the numbers, and of the git commit where there is one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, check=False)
        if git.returncode == 0:
            found["commit"] = git.stdout.strip()
    return found


def environment() -> dict[str, Any]:
    """Where the run happens: versions, machine, GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda or "",
    }
