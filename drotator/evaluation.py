"""Measure a model: perplexity as the pruning papers measure it, and zero-shot accuracy through lm-eval."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import math
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drotator.checkpoint import load_checkpoint
from drotator.config import EvalConfig
from drotator.console import progress
from drotator.fetch import embedded_data, hub_error
from drotator.quiet import silent_libraries
from drotator.resources import float32_products
from drotator.results import Metrics
from drotator.texts import C4, C4_FILES, PASSAGES, WIKITEXT, adds_bos, c4_documents, encode, passages, wikitext2

log = logging.getLogger(__name__)

TEXTS = {
    "wikitext2": f"{WIKITEXT} wikitext-2-raw-v1 test",
    "c4": f"{C4} {C4_FILES['validation']}",
    "passages": f"{PASSAGES}, evaluation part",
}
C4_DOCUMENTS, C4_WINDOWS = 1100, 256
LOGITS_BYTES = 2**28  # of one forward pass; with 128k words in the vocabulary, 8 windows of 2048 would take 4 GiB
LOSS_TOKENS = 512  # tokens whose logits are float32 at a time

TASK_FILES = {  # where lm-eval keeps the five tasks: reading its whole index takes eight seconds
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EvalConfig, *, seed: int) -> Metrics:
    """Measure everything that settings ask for, on the device the model is on.

    Returns: perplexities by text, accuracies in percent by task, "<task>_acc", and "zero_shot_mean".
    Raises: ValueError if data is missing, RuntimeError if the model's outputs are not finite.
    """
    metrics: Metrics = {}
    with float32_products("high"):
        for name, windows in perplexity_windows(settings, tokenizer).items():
            metrics[name] = perplexity(model, windows, settings.batch_size, f"perplexity on {name}")
            log.info("perplexity on %s: %.3f (%d windows of %d tokens)", name, metrics[name], *windows.shape)
        if settings.tasks:
            metrics |= zero_shot(model, tokenizer, settings, seed)
            log.info("zero-shot accuracy: %.2f%% (mean of %d tasks)", metrics["zero_shot_mean"], len(settings.tasks))
    return metrics


def evaluate_checkpoint(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalConfig,
    *,
    seed: int,
    device: torch.device,
    dtype: str = "auto",
) -> Metrics:
    """Load a checkpoint and measure it; if nothing is asked for, it is not loaded."""
    if not settings.perplexity and not settings.tasks:
        return {}
    return evaluate(load_checkpoint(folder, dtype=dtype, device=device), tokenizer, settings, seed=seed)


def prepare(settings: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bring in all data that `evaluate` will read, so that what is missing or misspelt is known before the work."""
    perplexity_windows(settings, tokenizer)
    if settings.tasks:
        _load_tasks(settings)


def provenance(settings: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What report.json says of how the metrics were measured."""
    windows = perplexity_windows(settings, tokenizer)
    return {
        "seqlen": settings.seqlen,
        "windows": {name: len(tokens) for name, tokens in windows.items()},
        "evaluation_text": {name: TEXTS[name] for name in windows},
        "evaluation_tokens": {name: _digest(tokens) for name, tokens in windows.items()},
        "batch_size": settings.batch_size,
        "bos": adds_bos(tokenizer),
        "tasks": list(settings.tasks),
        "tasks_source": settings.source,
        "tasks_limit": settings.limit,
        "num_fewshot": 0,
    }


def perplexity_windows(settings: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """`perplexity_tokens` of every text in settings.perplexity."""
    return {name: perplexity_tokens(name, settings, tokenizer) for name in settings.perplexity}


def perplexity_tokens(name: str, settings: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Cut a text, tokenised in one piece, into windows that do not overlap; the rest at the end is dropped.

    Returns: (windows, seqlen) int64; settings.windows of them at most, if that is not 0.
    Raises: ValueError if the text is out of reach or shorter than one window.
    """
    tokens = _tokens(name, tokenizer)
    windows = len(tokens) // settings.seqlen
    if windows == 0:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, fewer than eval.seqlen={settings.seqlen}. Lower eval.seqlen."
        )
    if name == "c4":
        windows = min(windows, C4_WINDOWS)
    windows = min(windows, settings.windows or windows)
    return tokens[: windows * settings.seqlen].view(windows, settings.seqlen)


@lru_cache(maxsize=8)  # evaluate is called for the dense, the pruned and the rotated model
def _tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if name == "wikitext2":
        text = wikitext2("test")
    elif name == "c4":
        documents, _ = c4_documents("validation")
        text = " ".join(documents[:C4_DOCUMENTS])
    else:
        text = "\n\n".join(passages("evaluation"))
    return torch.tensor(encode(text, tokenizer), dtype=torch.int64)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int, description: str = "perplexity") -> float:
    """exp of the mean over windows of the mean loss of their seqlen - 1 predicted tokens, in float32 and float64.

    Args:
        windows: (windows, seqlen) int64.
        batch_size: windows in one forward pass, fewer where their logits would take more than LOGITS_BYTES.
    Raises: ValueError if the windows are longer than the model's context, RuntimeError if a loss is not finite.
    """
    seqlen = windows.shape[1]
    context = getattr(model.config, "max_position_embeddings", seqlen)
    if seqlen > context:
        raise ValueError(f"eval.seqlen={seqlen} is more than the {context} positions of the model. Lower eval.seqlen.")
    parameter = next(model.parameters())
    logits_bytes = seqlen * model.config.vocab_size * parameter.element_size()
    batches = windows.split(max(1, min(batch_size, LOGITS_BYTES // logits_bytes)))
    losses: list[Tensor] = []
    model.eval()
    with progress(description, len(batches)) as advance:
        for batch in batches:
            batch = batch.to(parameter.device)  # (b, seqlen)
            logits = model(input_ids=batch, use_cache=False).logits  # (b, seqlen, vocab_size)
            losses += [_mean_loss(row[:-1], tokens[1:]) for row, tokens in zip(logits, batch, strict=True)]
            advance("")
    loss = torch.stack(losses).cpu()  # (windows,) float64
    if not loss.isfinite().all():
        index = int((~loss.isfinite()).nonzero()[0])
        raise RuntimeError(f"{description}: the loss of window {index} is {loss[index].item()}; the model is broken.")
    return math.exp(loss.mean().item())


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of (tokens, vocab_size) logits, as a float64 scalar on their device."""
    parts = zip(logits.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True)
    losses = [torch.nn.functional.cross_entropy(part.float(), target, reduction="none") for part, target in parts]
    return torch.cat(losses).double().mean()


def zero_shot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EvalConfig, seed: int) -> Metrics:
    """Accuracies in percent through lm-eval: acc_norm where a task reports it, else acc; "<task>_acc" is always acc.

    Raises: ValueError if a task is unknown, reports no accuracy, or if its data is out of reach.
    """
    tasks = _load_tasks(settings)
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    with silent_libraries():
        reader = _Reader(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a padding token
            batch_size=settings.batch_size,
            add_bos_token=adds_bos(tokenizer),
        )
        # Not simple_evaluate: it lists the machine's packages and calls git, which takes seconds and prints on stderr.
        results = lm_eval.evaluate(
            lm=reader, task_dict={"tasks": tasks}, limit=settings.limit or None, bootstrap_iters=0, log_samples=False
        )["results"]
    metrics: Metrics = {}
    for name in settings.tasks:
        accuracy = 100 * results[name]["acc,none"]
        metrics[name] = 100 * results[name]["acc_norm,none"] if "acc_norm,none" in results[name] else accuracy
        metrics[f"{name}_acc"] = accuracy
    metrics["zero_shot_mean"] = sum(metrics[name] for name in settings.tasks) / len(settings.tasks)
    return metrics


class _Reader(HFLM):
    """lm-eval's wrapper, with our progress line for its requests."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        with progress("zero-shot tasks", math.ceil(len(requests) / self.batch_size)) as self._advance:
            return super().loglikelihood(requests, disable_tqdm=True)

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(*args, **kwargs)
        self._advance("")
        return logits


def _load_tasks(settings: EvalConfig) -> dict[str, Any]:
    """Load lm-eval's tasks with their data: name -> task."""
    folder = Path(lm_eval.tasks.__file__).parent
    if settings.source == "embedded":
        return _load_embedded_tasks(settings.tasks, folder)
    known = all(name in TASK_FILES for name in settings.tasks)
    paths = sorted({str((folder / TASK_FILES[name]).parent) for name in settings.tasks}) if known else None
    with silent_libraries():
        manager = TaskManager(include_path=paths, include_defaults=not known)
    return {name: _load_task(name, manager) for name in settings.tasks}


def _load_embedded_tasks(names: list[str], lm_eval_tasks: Path) -> dict[str, Any]:
    """Load lm-eval's own tasks, only that their data is the embedded data; of ARC that is the validation split."""
    for name in names:
        if name not in TASK_FILES:
            raise ValueError(f"eval.tasks: {name} is not in the embedded data, which has {', '.join(TASK_FILES)}.")
    data = embedded_data()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            task = {
                "include": str(lm_eval_tasks / TASK_FILES[name]),
                "task": name,
                "dataset_path": "arrow",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"validation": str(data / f"{name}.arrow")}},
                "training_split": None,
                "test_split": None,
            }
            (Path(folder) / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
        with silent_libraries():
            manager = TaskManager(include_path=folder, include_defaults=False)
        return {name: _load_task(name, manager) for name in names}


def _load_task(name: str, manager: TaskManager) -> Any:
    if name not in manager.all_subtasks:
        close = difflib.get_close_matches(name, manager.all_subtasks, n=3)
        advice = f"Did you mean {', '.join(close)}?" if close else "Give single tasks, no groups."
        raise ValueError(f"eval.tasks: lm-eval has no task {name}. {advice}")
    try:
        with silent_libraries():
            task = manager.load([name])["tasks"][name]
    except Exception as error:
        raise hub_error(f"eval.tasks: {name}", "its data", error) from error
    metrics = {metric["metric"] for metric in task.config.metric_list or []}
    if "acc" not in metrics:
        raise ValueError(f"eval.tasks: {name} reports {', '.join(sorted(metrics))}, no accuracy (acc). Leave it out.")
    return task
