"""What happens to one decoder layer: its rotation is learned and merged, its linears are pruned.

Every function takes a dense or merged layer and typed settings; the loop over layers is in pipeline.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from drotator.architecture import LayerSizes, LayerSpec, linear
from drotator.config import PruneConfig, PrunerConfig, SparsityConfig
from drotator.distributed import ALONE, World
from drotator.energies import column_energy, output_weights
from drotator.objectives import (
    INPUT_OF,
    LayerProblem,
    Objective,
    build_objective,
    chosen_salience,
    needed_hessians,
    with_gradients,
)
from drotator.permutation import search_order
from drotator.products import choose_products
from drotator.pruners import PRUNERS, relative_error, sparsity_of
from drotator.pruners.solve import solve_on_mask
from drotator.resources import Stopwatch
from drotator.results import LinearResult
from drotator.rotation import (
    Rotation,
    fold_norms,
    inverse_transpose,
    merge_rotation,
    reorder_intermediate,
    rotate_value_rows,
)
from drotator.statistics import ActivationStream, collect_hessians, collect_sensitivities
from drotator.training import TrainedRotation, train_rotation

LEAST_WEIGHT = 1e-6
"""Of an output, as a part of the mean: an output that nothing reads would else be divided by zero."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say of what a RuntimeError is. A device that is out of memory is left as it is: the pipeline answers it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"{what}: {error}") from error


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

    def collect(
        self, wanted: Collection[str], R1: Tensor | None = None, *, keep_attention: bool = False
    ) -> dict[str, Tensor]:
        """H of the wanted inputs, (d_in, d_in) float32; see `collect_hessians`."""
        with self.watch.measure("calibrate"):
            return collect_hessians(
                self.layer, self.spec, self.stream, self.index, wanted, R1, keep_attention=keep_attention
            )

    def sensitivities(self, seed: int) -> dict[str, Tensor]:
        """What an error in each output of a linear does to the dense layer's output; see `collect_sensitivities`."""
        with self.watch.measure("calibrate"):
            return collect_sensitivities(self.layer, self.spec, self.sizes, self.stream, self.index, seed)


@dataclass(frozen=True)
class DenseLayer:
    """A layer with folded norms before it is rotated. weights: as `fold_norms` returns them.

    sensitivities: by module name, where the pruner's mask weighs the outputs by them; else empty.
    """

    context: LayerContext
    weights: Mapping[str, Tensor]
    problem: LayerProblem
    order: Tensor | None
    sensitivities: Mapping[str, Tensor]


def open_layer(context: LayerContext, settings: PruneConfig) -> DenseLayer:
    """Fold the norms, and collect what the objective reads from the dense layer.

    With a search for the order of the intermediate channels, the layer is put in that order too.
    """
    layer, spec = context.layer, context.spec
    weights = fold_norms(layer, spec)
    salience = chosen_salience(settings.objective, settings.pruner.name)
    wanted = needed_hessians(settings.objective, salience)
    hessians = context.collect(wanted) if wanted else {}
    order = None
    if settings.rotation.permute in ("intermediate", "both"):
        S = importance(weights[spec.down].float(), hessians.get("down"), None, settings)
        order = search_order([S.mT / S.sum()], settings.sparsity, settings.seed)
        reorder_intermediate(layer, spec, weights, order)
        if "down" in hessians:
            hessians["down"] = hessians["down"][order][:, order]
    by_objective, by_mask = settings.objective.is_weighed, settings.mask_is_weighed
    sensitivities = context.sensitivities(settings.seed) if by_objective or by_mask else {}
    stored = linear(layer, spec.gate).weight
    products = choose_products(settings.optimizer, context.sizes, stored.dtype, stored.device)
    problem = LayerProblem.of_layer(
        weights, spec, context.sizes, hessians, sensitivities if by_objective else {}, products
    )
    return DenseLayer(context, weights, problem, order, sensitivities if by_mask else {})


def importance(W: Tensor, H: Tensor | None, R: Tensor | None, settings: PruneConfig) -> Tensor:
    """Importance of a linear's weights with the settings' salience, (d_out, d_in), in the dense basis or in that of R.

    Args:
        H: (d_in, d_in) in the dense basis; None where the salience does not look at the inputs.
        R: (d_in, d_in), merged in the linear's inputs.
    """
    S = (W if R is None else W @ R).square()
    if H is None:
        return S
    salience = chosen_salience(settings.objective, settings.pruner.name)
    return S * column_energy(H, R, salience, settings.pruner.damping)


def objective_of(problem: LayerProblem, settings: PruneConfig, world: World = ALONE) -> Objective:
    """The objective that the settings ask for, of one layer; this process's term of it."""
    salience, damping = chosen_salience(settings.objective, settings.pruner.name), settings.pruner.damping
    value_map, batches = settings.rotation.value_map, settings.optimizer.batches
    return build_objective(settings.objective, salience, settings.sparsity, problem, damping, value_map, world, batches)


def starting_rotation(
    problem: LayerProblem, num_layers: int, settings: PruneConfig, previous: Tensor | None = None
) -> Rotation:
    """Where training starts. R2 is (num_layers k, h, h), the identity.

    Args:
        previous: (d, d), the R1 to start from: what the layers before have learned. Without it R1 starts from the
            identity, or from a permutation of the residual channels.
    """
    W = problem.weights["query"]
    start = Rotation.identity(problem.sizes, W.device)
    R1 = start.R1 if previous is None else previous.to(W)
    if previous is None and settings.rotation.permute in ("residual", "both"):
        importances = []
        for name in ("query", "key", "value", "gate", "up"):
            S = importance(problem.weights[name], problem.hessians.get(INPUT_OF[name]), None, settings)
            importances.append(S.mT / S.sum())
        R1 = R1[:, search_order(importances, settings.sparsity, settings.seed)]
    return Rotation(R1, start.R2.repeat(num_layers, 1, 1), value_map=settings.rotation.value_map)


def learn_rotation(
    objectives: Sequence[Objective],
    start: Rotation,
    settings: PruneConfig,
    world: World = ALONE,
    *,
    can_capture: bool = True,
    precision: str = "highest",
) -> TrainedRotation:
    """Learn one R1 for all the layers given, and the R2 of each; R2 of the result is (layers k, h, h).

    Every process of the world has its term of the objectives and of their gradients, and takes the same steps along
    the sum; what the first one has learned counts.
    """
    trained = train_rotation(
        with_gradients(objectives, world),
        start,
        settings.optimizer,
        learns=(settings.rotation.R1, settings.rotation.R2),
        can_capture=all(world.gather(can_capture)),
        precision=precision,
        world=world,
    )
    for R in (trained.rotation.R1, trained.rotation.R2):
        world.broadcast_(R)
    return trained


def learn_layer(dense: DenseLayer, settings: PruneConfig, previous: Tensor | None = None) -> TrainedRotation:
    """Learn the rotation of one layer alone; its objective before is that without rotation.

    Args:
        previous: see `starting_rotation`.
    Raises: RuntimeError that names the layer.
    """
    context = dense.context
    world = context.stream.world
    with context.watch.measure("rotate"):
        with naming(f"Layer {context.index}"):
            start = starting_rotation(dense.problem, 1, settings, previous)
            objective = objective_of(dense.problem, settings, world)
            trained = learn_rotation([objective], start, settings, world, precision=dense.problem.precision)
        with torch.no_grad():
            identity = Rotation.identity(context.sizes, context.stream.device)
            before = float(world.all_reduce_(objective(identity.R1, identity.R2)))
    rotation = dataclasses.replace(trained.rotation, order=dense.order)
    return dataclasses.replace(trained, rotation=rotation, objective_before=before)


def merge(context: LayerContext, weights: Mapping[str, Tensor], rotation: Rotation) -> Rotation:
    """Merge the rotation in the layer. Returns it as merged: orthogonal in float64, but for an invertible R2."""
    with context.watch.measure("rotate"):
        polished = rotation.polished()
        merge_rotation(context.layer, context.spec, context.sizes, polished, weights)
    return polished


def importance_of_gate(problem: LayerProblem, R1: Tensor | None, settings: PruneConfig) -> Tensor:
    """Importance of gate_proj's weights, (m, d), in the dense basis or in that of R1."""
    W = problem.weights["gate"]
    return importance(W, problem.hessians.get("mlp"), None if R1 is None else R1.to(W), settings)


@torch.no_grad()
def prune_linears(
    context: LayerContext,
    pruner: PrunerConfig,
    sparsity: SparsityConfig,
    R1: Tensor | None,
    known: Tensor | None,
    R2: Tensor | None = None,
    sensitivities: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, LinearResult], dict[str, float]]:
    """Prune the layer's linears in place, in the order of the forward pass, with statistics collected again after each.

    Args:
        R1: (d, d) merged in the layer, or None.
        known: (d, d) H of the inputs of attention in the layer's present basis, if it is known already.
        R2: (k, h, h) merged in the layer, or None. The error of v is that of its outputs before R2, which may stretch.
        sensitivities: by module name, of the layer before it was rotated, for masks that weigh the outputs by them.
    Returns: the result of every linear, and the damping by linear where it had to be raised.
    Raises: RuntimeError that names the layer and the linear.
    """
    results: dict[str, LinearResult] = {}
    raised: dict[str, float] = {}
    for inputs, names in context.spec.inputs.items():
        if known is not None and inputs == "attention":
            H = known
        else:  # once query, key and value are pruned, attention stays what it is
            H = context.collect((inputs,), R1, keep_attention=inputs == "output")[inputs]
        with context.watch.measure("prune"):
            scales = [row_scale(name, context, sensitivities, R2) for name in names]
            found, damping = prune_readers(context, names, H, pruner, sparsity, R2, scales)
        results |= found
        if damping > pruner.damping:
            raised |= dict.fromkeys(names, damping)
    return results, raised


def prune_readers(
    context: LayerContext,
    names: Sequence[str],
    H: Tensor,
    pruner: PrunerConfig,
    sparsity: SparsityConfig,
    R2: Tensor | None,
    scales: Sequence[Tensor | None],
) -> tuple[dict[str, LinearResult], float]:
    """Prune those of the layer's linears that read the same inputs, in place.

    Args:
        H: (d_in, d_in), of their inputs.
        R2, scales: see `prune_linears` and `row_scale`.
    Returns: the result of each, and the damping that was used.
    """
    modules, damping = [linear(context.layer, name) for name in names], 0.0
    dense = [module.weight.to(torch.float32, copy=True) for module in modules]
    if pruner.name != "none":
        with naming(f"Layer {context.index}, {', '.join(names)}"):
            weights, damping = prune_weights(dense, H, scales, sparsity, pruner, context.stream.world)
        for module, weight in zip(modules, weights, strict=True):
            module.weight.copy_(weight)
        del weights, weight
    results = {}
    for name, module, before in zip(names, modules, dense, strict=True):
        after = module.weight.float()
        if R2 is not None and name == context.spec.value:
            undo = torch.linalg.inv(R2).to(before)
            before, after = (rotate_value_rows(rows, undo) for rows in (before, after))
        error = float(relative_error(before, after, H))
        results[name] = LinearResult(sparsity=sparsity_of(module.weight), relative_error=error)
    return results, damping


def prune_weights(
    dense: Sequence[Tensor],
    H: Tensor,
    scales: Sequence[Tensor | None],
    sparsity: SparsityConfig,
    pruner: PrunerConfig,
    world: World,
) -> tuple[list[Tensor], float]:
    """Prune weights that read the same inputs, (d_out, d_in) each, and fit what is left where that is asked for.

    With N:M no row knows of another: each process of the world prunes its share of them with the whole H. Unstructured
    masks are compared or counted over each whole matrix, so that every process prunes all of it.

    Args:
        scales: of each, see `row_scale`.
    Returns: the weights, +0.0 where removed, the same in every process; the damping that was used.
    """
    parts = [world.part(len(W)) if sparsity.is_grouped else slice(None) for W in dense]
    rows = [W[part] for W, part in zip(dense, parts, strict=True)]
    scales = [None if scale is None else scale[part] for scale, part in zip(scales, parts, strict=True)]
    scaled = [W if scale is None else W * scale for W, scale in zip(rows, scales, strict=True)]
    pruned = PRUNERS[pruner.name](scaled, H, sparsity, pruner)
    del scaled
    weights, damping = [], 0.0
    for W, scale, whole in zip(rows, scales, dense, strict=True):
        weight, mask, damping = pruned.pop(0)
        weight = weight if scale is None else weight / scale
        if pruner.solve_steps:
            weight = solve_on_mask(W, weight, mask, H, damping=pruner.damping, steps=pruner.solve_steps)
        weights.append(world.gather_rows(weight, len(whole)) if sparsity.is_grouped else weight)
    return weights, damping


def row_scale(
    name: str, context: LayerContext, sensitivities: Mapping[str, Tensor], R2: Tensor | None
) -> Tensor | None:
    """What the rows of a linear are multiplied by, so that equal errors in them do equal harm to the layer's output.

    Returns: (d_out, 1), > 0: the root of the weight of each output in its present basis, as a part of their mean. None
        where all count alike.
    """
    G = sensitivities.get(name)
    if G is not None and name == context.spec.value:
        identity = torch.eye(G.shape[-1], device=G.device).expand_as(G)
        G = output_weights(G, identity if R2 is None else inverse_transpose(R2.to(G)))
    if G is None or G.ndim == 0:
        return None
    parts = G / G.mean().clamp_min(torch.finfo(G.dtype).tiny)  # nothing reads any of them: all count alike
    return parts.clamp_min(LEAST_WEIGHT).sqrt()[:, None]
