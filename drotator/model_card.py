"""The README.md of a checkpoint: what was done to the model, the numbers, how to load it, and what not to expect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from drotator.config import PERPLEXITY_SETS

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- drotator
- pruned
---
# {model}, pruned with drotator

{summary} The terms of the original model's license apply to this one.

{settings}

{numbers}{heading}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(PATH, dtype="auto"{trust})
    tokenizer = AutoTokenizer.from_pretrained(PATH{trust})

{loading}

## What to expect

The weights are stored dense: what was removed is there as zeros, so the files are no smaller. Unstructured sparsity
makes nothing faster on common hardware. A 2:4 pattern can be faster on GPUs with sparse tensor cores, once the weights
are converted after loading (`torch.sparse.to_sparse_semi_structured`). Training, merging adapters or quantising the
model may fill the zeros again.
"""

ROTATED = """\
Before pruning, learned rotations that concentrate the importance of the weights were merged in the model
(DenoiseRotator, [arXiv 2505.23049](https://arxiv.org/abs/2505.23049))."""

UNROTATED = "The model was pruned as it is, without rotations."

CUSTOM_CODE = """\
Every decoder layer has a basis of its own, so between two layers stands one hidden_size x hidden_size matrix
(`model.layers.*.boundary.weight`). `modeling_rotated.py` in this folder adds it to the family's own classes, which is
why `trust_remote_code=True` is needed. Where drotator is installed, `drotator.checkpoint.load_checkpoint` does
without."""

LOADING = "## How to load it"

SPARSE24 = """\
    from drotator import load_sparse24

    model = load_sparse24(PATH)

This folder is an export by `drotator export`, not a checkpoint: `from_pretrained` does not load it. `load_sparse24`
gives bit by bit the weights of the checkpoint it was made from, dense in memory. For each pruned matrix the files hold
the two weights that are kept of every four inputs (`.values`) and two bits for the place of each (`.metadata`).
`sparse24.json` says in which file each tensor is.

## What to expect

The pruned matrices take 9/16 of their 16-bit size on disk, the other tensors what they took before. In memory the model
is as large and as fast as the checkpoint. The layout is drotator's own, not that of a sparse tensor core's kernels.
"""

PLAIN_CODE = "It is a plain model of its family: no code beyond transformers is needed."


def model_card(metadata: Mapping[str, object], *, has_custom_code: bool) -> str:
    """Return the text of README.md.

    Args:
        metadata: what was done. Plain values are listed; "rotation" and "model" are told in words too; "metrics" (as in
            report.json: {"dense": {name: value}, "pruned": {...}}) becomes a table; "recovered" says how it was tuned.
        has_custom_code: the checkpoint has boundary matrices.
    """
    settings = [(name, value) for name, value in metadata.items() if isinstance(value, str | int | float)]
    metrics = metadata.get("metrics")
    return CARD.format(
        model=metadata.get("model", "A model"),
        summary=(UNROTATED if metadata.get("rotation") == "none" else ROTATED)
        + (f"\nThen it was fine-tuned: {metadata['recovered']}." if "recovered" in metadata else ""),
        settings=_table(("setting", "value"), settings),
        numbers=f"## Numbers\n\n{_metrics_table(metrics)}\n\n" if isinstance(metrics, Mapping) and metrics else "",
        trust=", trust_remote_code=True" if has_custom_code else "",
        loading=CUSTOM_CODE if has_custom_code else PLAIN_CODE,
        heading=LOADING,
    )


def sparse24_card(card: str) -> str:
    """Return the README.md of a sparse24 export of a checkpoint with this card: the same model, loaded otherwise."""
    return f"{card.partition(LOADING)[0].rstrip()}\n\n{LOADING}\n\n{SPARSE24}".lstrip()


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out one row for each metric, one column for each model measured."""
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    rows = []
    for name in names:
        unit = "perplexity" if name in PERPLEXITY_SETS else "accuracy, %"
        cells = [f"{values[name]:.2f}" if name in values else "" for values in metrics.values()]
        rows.append((f"{name} ({unit})", *cells))
    return _table(("", *metrics), rows)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])
