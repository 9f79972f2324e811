"""Runs of the whole pipeline on a tiny model: its folder, its text, and the settings of a run that takes a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_text import byte_tokenizer, embedded_data_in_cache, tiny_llama, words
from torch import Tensor

from drotator.config import (
    CalibrationConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PruneConfig,
    PrunerConfig,
    ReconstructConfig,
    RotationConfig,
    SparsityConfig,
)

ROOT = Path(__file__).resolve().parent.parent
HUB = ROOT.parent / "shared" / "hub"
TOKENS = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1))

WORDS = [
    "model=local",
    "calibration=local",
    "calibration.num_samples=3",
    "calibration.seqlen=32",
    "calibration.batch_size=2",
    "eval=embedded",
    "eval.tasks=[]",
    "eval.seqlen=32",
    "eval.windows=4",
    "objective=pruning_error",
    "optimizer=riemannian_adam",
    "optimizer.steps=5",
]
"""The words of `settings` on a command line, but for paths, pruner and rotation."""


def make_inputs(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save a tiny model with tied embeddings and its tokenizer in folder/model, and text.txt; fill the cache."""
    sizes = {"head_dim": 12, "tie_word_embeddings": True, "num_hidden_layers": 3, **changes}
    tiny_llama(**sizes).to(dtype).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(words(0, 200))
    passages = [(f"title {i}", words(1000 * i)) for i in range(1, 9)]
    embedded_data_in_cache(passages, [words(10_000 * i) for i in range(1, 9)], folder / "tables")
    return folder


Option = str | dict[str, Any]
"""A group's option by its name, or all that is set in the group."""


def settings(
    inputs: Path,
    *,
    pruner: Option = "sparsegpt",
    rotation: Option = "per_layer",
    objective: Option = "pruning_error",
    reconstruct: Option = "none",
    sparsity: dict[str, Any] | None = None,
    steps: int = 5,
    optimizer: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    **more: Any,
) -> PruneConfig:
    """The settings that the command line `words_of` composes."""
    given = {"name": "embedded", "source": "embedded", "perplexity": ["passages"], "tasks": [], "limit": 20}
    return PruneConfig(
        model=ModelConfig(path=str(inputs / "model")),
        pruner=PrunerConfig(**in_words(pruner)),
        sparsity=SparsityConfig(**(sparsity or {"ratio": 0.0, "keep": 2, "group": 4})),
        rotation=RotationConfig(**in_words(rotation)),
        objective=ObjectiveConfig(**in_words(objective)),
        optimizer=OptimizerConfig(
            **({"name": "riemannian_adam", "steps": steps, "learning_rate": 0.01} | (optimizer or {}))
        ),
        calibration=CalibrationConfig(
            dataset="local", path=str(inputs / "text.txt"), num_samples=3, seqlen=32, batch_size=2
        ),
        eval=EvalConfig(**(given | {"seqlen": 32, "windows": 4} | (evaluation or {}))),
        reconstruct=ReconstructConfig(**in_words(reconstruct)),
        **more,
    )


def in_words(option: Option) -> dict[str, Any]:
    return {"name": option} if isinstance(option, str) else option


def words_of(inputs: Path, *more: str) -> list[str]:
    return ["prune", *WORDS, f"model.path={inputs / 'model'}", f"calibration.path={inputs / 'text.txt'}", *more]


def process_environment(**more: str) -> dict[str, str]:
    """For a process that finds drotator and these modules, and computes with one thread, as the tests do."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HYDRA_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **more}


def drotator(*words: str, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m drotator WORDS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "drotator", *words],
        env=process_environment(**environment),
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        timeout=timeout,
    )


@contextmanager
def serving(*roots: Path) -> Iterator[str]:
    """Serve the loopback hub, and what is in `roots`; gives its address."""
    words = [str(HUB / "serve.py"), "--port", "0", *(word for root in roots for word in ("--root", str(root)))]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.terminate()
    server.wait()
    server.stdout.close()


def weights(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run: layers, rotations and checkpoint, by file and name."""
    found = {}
    for part in ("layers", "rotations", "checkpoint"):
        for path in sorted((run / part).glob("*.safetensors")):
            found |= {f"{part}/{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def report_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report.json").read_text()))
