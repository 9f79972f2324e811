"""What happens to one decoder layer: its rotation is learned and merged, its linears are pruned.

Every function takes a dense or merged layer and typed settings; the loop over layers is in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drotator.architecture import LayerSizes, LayerSpec, linear
from drotator.config import PruneConfig, PrunerConfig, SparsityConfig
from drotator.objectives import (
    LayerProblem,
    Objective,
    build_objective,
    chosen_salience,
    column_energy,
    needed_hessians,
    with_gradients,
)
from drotator.pruners import PRUNERS, relative_error, sparsity_of
from drotator.resources import Stopwatch
from drotator.results import LinearResult
from drotator.rotation import Rotation, fold_norms, merge_rotation
from drotator.statistics import ActivationStream, collect_hessians
from drotator.training import TrainedRotation, train_rotation


@dataclass(frozen=True)
class LayerContext:
    """A layer on its way through the pipeline: the module, its place, and the activations that enter it."""

    index: int
    layer: nn.Module
    spec: LayerSpec
    sizes: LayerSizes
    num_layers: int
    stream: ActivationStream
    watch: Stopwatch

    def collect(self, wanted: Collection[str], R1: Tensor | None = None) -> dict[str, Tensor]:
        """H of the wanted inputs, (d_in, d_in) float32; see `collect_hessians`."""
        with self.watch.measure("calibrate"):
            return collect_hessians(self.layer, self.spec, self.stream, self.index, wanted, R1)


@dataclass(frozen=True)
class DenseLayer:
    """A layer with folded norms before it is rotated. weights: as `fold_norms` returns them. hessians: by input."""

    context: LayerContext
    weights: Mapping[str, Tensor]
    hessians: Mapping[str, Tensor]
    objective: Objective

    @torch.no_grad()
    def objective_at(self, rotation: Rotation | None) -> float:
        """The layer's objective at a rotation, or without one."""
        rotation = rotation or Rotation.identity(self.context.sizes, self.context.stream.device)
        return float(self.objective(rotation.R1, rotation.R2))


def open_layer(context: LayerContext, settings: PruneConfig) -> DenseLayer:
    """Fold the norms, collect what the objective reads from the dense layer, and build it."""
    weights = fold_norms(context.layer, context.spec)
    salience = chosen_salience(settings.objective, settings.pruner.name)
    wanted = needed_hessians(settings.objective, salience)
    hessians = context.collect(wanted) if wanted else {}
    problem = LayerProblem.of_layer(weights, context.spec, context.sizes, hessians)
    objective = build_objective(settings.objective, salience, settings.sparsity, problem, settings.pruner.damping)
    return DenseLayer(context, weights, hessians, objective)


def learn_rotation(layers: Sequence[DenseLayer], settings: PruneConfig) -> TrainedRotation:
    """Learn one R1 for all the layers given, and the R2 of each; R2 of the result is (layers k, h, h)."""
    context = layers[0].context
    start = Rotation.identity(context.sizes, context.stream.device)
    start = Rotation(start.R1, start.R2.repeat(len(layers), 1, 1))
    with context.watch.measure("rotate"):
        try:
            return train_rotation(with_gradients([layer.objective for layer in layers]), start, settings.optimizer)
        except RuntimeError as error:
            raise RuntimeError(f"Layer {context.index}: {error}") from error


def merge(context: LayerContext, weights: Mapping[str, Tensor], rotation: Rotation) -> Rotation:
    """Merge the rotation in the layer. Returns it as merged: orthogonal in float64."""
    with context.watch.measure("rotate"):
        polished = rotation.polished()
        merge_rotation(context.layer, context.spec, context.sizes, polished, weights)
    return polished


def importance_of_gate(dense: DenseLayer, rotation: Rotation | None, settings: PruneConfig) -> Tensor:
    """Importance of gate_proj's weights, (m, d), in the dense basis or in that of the rotation: for the plots."""
    W = dense.weights[dense.context.spec.gate].float()
    R1 = None if rotation is None else rotation.R1.to(W)
    H = dense.hessians.get("mlp")
    S = (W if R1 is None else W @ R1).square()
    if H is None:
        return S
    salience = chosen_salience(settings.objective, settings.pruner.name)
    return S * column_energy(H, R1, salience, settings.pruner.damping)


@torch.no_grad()
def prune_linears(
    context: LayerContext,
    pruner: PrunerConfig,
    sparsity: SparsityConfig,
    R1: Tensor | None,
    known: Tensor | None,
) -> tuple[dict[str, LinearResult], dict[str, float]]:
    """Prune the layer's linears in place, in the order of the forward pass, with statistics collected again after each.

    Args:
        R1: (d, d) merged in the layer, or None.
        known: (d, d) H of the inputs of attention in the layer's present basis, if it is known already.
    Returns: the result of every linear, and the damping by linear where it had to be raised.
    Raises: RuntimeError that names the layer and the linear.
    """
    results: dict[str, LinearResult] = {}
    raised: dict[str, float] = {}
    for inputs, names in context.spec.inputs.items():
        H = known if known is not None and inputs == "attention" else context.collect((inputs,), R1)[inputs]
        with context.watch.measure("prune"):
            for name in names:
                module = linear(context.layer, name)
                W = module.weight.to(torch.float32, copy=True)
                if pruner.name != "none":
                    try:
                        pruned = PRUNERS[pruner.name](W, H, sparsity, pruner)
                    except RuntimeError as failure:
                        raise RuntimeError(f"Layer {context.index}, {name}: {failure}") from failure
                    module.weight.copy_(pruned.weight)
                    if pruned.damping > pruner.damping:
                        raised[name] = pruned.damping
                error = relative_error(W, module.weight.float(), H)
                results[name] = LinearResult(sparsity=sparsity_of(module.weight), relative_error=float(error))
    return results, raised
