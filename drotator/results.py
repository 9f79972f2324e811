"""The results of a run as typed data; `report.json` is `RunReport` written as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

Metrics = dict[str, float]
"""Perplexities by data set, accuracies in percent by task, and "zero_shot_mean"."""


@dataclass(kw_only=True, slots=True)
class LinearResult:
    """sparsity: part of exact zeros; relative_error: tr((W-W')H(W-W')^T) / tr(W H W^T) in the rotated basis."""

    sparsity: float
    relative_error: float


@dataclass(kw_only=True, slots=True)
class LayerResult:
    """What happened to one decoder layer.

    orthogonality: max |R^T R - I| over the layer's rotations as training returned them: before the last polish in
        float64, but after the one that training in rounded products ends with.
    objective_history: the objective at every step, `objective_before` first. Empty without rotation.
    reconstruction: relative error of the layer's output before and after its weights were tuned, where they were.
    damping: the damping used for each Hessian, as a part of its mean diagonal, where it had to be raised.
    """

    index: int
    objective_before: float
    objective_after: float
    orthogonality: float
    linears: dict[str, LinearResult]
    seconds: dict[str, float]
    objective_history: list[float] = field(default_factory=list)
    damping: dict[str, float] = field(default_factory=dict)
    reconstruction: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class RunReport:
    """Everything that report.json holds.

    metrics: {"dense": Metrics, "pruned": Metrics}, and "recovered" in the report of `drotator recover`, whose "pruned"
    is the checkpoint before, and which has no layers.
    """

    model: str
    pruner: str
    sparsity: str
    rotation: str
    objective: str
    optimizer: str
    seed: int
    metrics: dict[str, Metrics]
    sparsity_realised: float
    layers: list[LayerResult]
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    versions: dict[str, str]
    provenance: dict[str, object]

    @property
    def final(self) -> Metrics:
        """Metrics of the model that the run left."""
        return self.metrics.get("recovered", self.metrics.get("pruned", {}))


DETAILS = (
    "objective.salience",
    "objective.weights",
    "optimizer.warm_start",
    "rotation.groups",
    "rotation.R1",
    "rotation.R2",
    "rotation.permute",
    "rotation.value_map",
    "pruner.solve_steps",
    "pruner.weights",
    "reconstruct.name",
    "reconstruct.target",
    "reconstruct.epochs",
)
"""Settings that a report names in its provenance beside those of the contract, all of them with one default."""


def details_of(settings: object) -> dict[str, object]:
    """The values of DETAILS in the settings of a run."""
    return {name: attrgetter(name)(settings) for name in DETAILS}


def first_value(perplexities: Sequence[str], metrics: Metrics) -> float:
    """What a sweep would minimise: the first perplexity, or minus the zero-shot mean; nan if nothing is measured."""
    return metrics[perplexities[0]] if perplexities else -metrics.get("zero_shot_mean", math.nan)
