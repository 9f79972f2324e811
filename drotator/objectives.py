"""Objectives: how much importance is out of place in a layer, as a differentiable function of its rotations.

d = hidden_size, m = intermediate_size, h = head_dim, k = num_key_value_heads, q = query heads of each of them.
Importance S of a weight W_ij: W_ij^2 (magnitude), times (H)_jj (wanda), over (H^-1)_jj (obs), over U_jj^2 with
H^-1 = U^T U (sequential_obs); design: one factor for each input column, so S = W^2 * energy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drotator.architecture import LayerSizes, LayerSpec
from drotator.config import ObjectiveConfig, SparsityConfig
from drotator.distributed import ALIGNED, ALONE, World
from drotator.energies import column_energy, energy_moments, output_weights, rotated_energy
from drotator.products import Factor, Products, factor_of, sixteen_bits
from drotator.rotated_scores import ALL_COLUMNS, Columns, Moments, RotatedWeight, rotated_scores
from drotator.rotation import inverse_transpose, rotate_output_columns, rotate_value_rows
from drotator.scores import ENTROPY_ALONG_BOTH, entropy_along, importance_score, removal

Objective = Callable[..., Tensor]
"""(R1, R2, batch=None) -> scalar float32, differentiable. batch: (1,) int64, number of one of the batches whose mean is
the objective; None: the objective itself."""

ObjectiveWithGradients = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""(R1, R2, batch=None) -> loss, dL/dR1, dL/dR2."""

PRUNER_SALIENCE = {"magnitude": "magnitude", "wanda": "wanda", "sparsegpt": "obs", "admm": "obs", "none": "wanda"}
PRUNER_SALIENCE_OF_ERROR = {**PRUNER_SALIENCE, "sparsegpt": "wanda", "admm": "wanda"}


def chosen_salience(settings: ObjectiveConfig, pruner: str) -> str:
    """The salience asked for; with auto the paper's for entropy, and for pruning_error the one that measured best.

    SparseGPT's own, sequential_obs, gives the same perplexity as wanda there and takes twice the time.
    """
    if settings.salience != "auto":
        return settings.salience
    table = PRUNER_SALIENCE if settings.name == "entropy" else PRUNER_SALIENCE_OF_ERROR
    return table[pruner]


@dataclass(frozen=True)
class LayerProblem:
    """Weights of a layer with folded norms, and the moments of its inputs. All float32, on one device.

    weights: by LayerSpec field name, (d_out, d_in). hessians: by input, (d_in, d_in), undamped.
    sensitivities: by LayerSpec field name, what an error in each output does to the layer's output; see
        `collect_sensitivities`. Empty: every linear counts by the part of its own output's energy.
    products: dtype in which the large weights are multiplied by R1; None: their own.
    """

    weights: Mapping[str, Tensor]
    hessians: Mapping[str, Tensor]
    sizes: LayerSizes
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict)
    products: Products = None

    @property
    def precision(self) -> str:
        """Of the float32 products beside them; see `float32_products`."""
        return "highest" if self.products is None else "high"

    @classmethod
    def of_layer(
        cls,
        weights: Mapping[str, Tensor],
        spec: LayerSpec,
        sizes: LayerSizes,
        hessians: Mapping[str, Tensor],
        sensitivities: Mapping[str, Tensor] | None = None,
        products: Products = None,
    ) -> LayerProblem:
        """weights, sensitivities: by module name, as `fold_norms` and `collect_sensitivities` return them."""
        by_field = {name: getattr(spec, name) for name in INPUT_OF}
        found = sensitivities or {}
        return cls(
            {name: weights[module].float() for name, module in by_field.items()},
            hessians,
            sizes,
            {name: found[module] for name, module in by_field.items() if module in found},
            products,
        )


INPUT_OF = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "output": "output",
    "gate": "mlp",
    "up": "mlp",
    "down": "down",
}


def needed_hessians(settings: ObjectiveConfig, salience: str) -> tuple[str, ...]:
    """Inputs whose H the objective reads.

    The entropy does not read `down`: it takes that linear's columns alone, and a factor common to a column cancels.
    """
    if salience == "magnitude":
        return ()
    return ("attention", "output", "mlp") if settings.name == "entropy" else ("attention", "output", "mlp", "down")


def build_objective(
    settings: ObjectiveConfig,
    salience: str,
    sparsity: SparsityConfig,
    problem: LayerProblem,
    damping: float,
    value_map: str = "orthogonal",
    world: World = ALONE,
    batches: int = 1,
) -> Objective:
    """Return the layer's objective as a function of (R1, R2), and of the batch where it has several.

    Of several processes each has a term of it, and their gradients add up to the objective's. A process rotates and
    scores its part of every linear's outputs (for the entropy of down: inputs), and computes the energies of its
    columns of R1, which are gathered, so that all have to evaluate together. The entropy, which takes both rows and
    columns of v and o, rotates these two whole in every process.

    entropy (paper): over the rows of query, key, gate, up; the columns of down; both of value and output.
    pruning_error: of each linear the importance that the mask will remove, over tr(W H W^T), which no rotation changes.

    Batches: every importance belongs to one output, so that a part of the outputs estimates the objective, in a part of
    the time. Batch i has every `batches`-th output from i on of query, key, gate, up, output and down (for the entropy,
    inputs of down), counted `batches` times, and value whole; the entropy, whose terms of output need all of it, takes
    that whole too. The energies are those of all inputs.

    With an invertible R2 = M, of each key/value head: W_v becomes M^T W_v, W_o becomes W_o N with N = M^-T, and the
    moments of o's inputs M^T H M. An error E' in the merged W_v is E = N E' in the dense one. tr(W_o H W_o^T) is as
    before, and so is what E' costs if it is weighed by what o makes of it, tr(G E H_v E^T) = tr(N^T G N E' H_v E'^T);
    tr(W_v H_v W_v^T), which counts every output alike, is not, and could be had for nothing by a map that shrinks v.
    So v's outputs count by G, moments (k, h, h): row i by (N^T G N)_ii, over tr(G W_v H_v W_v^T), which no map changes.
    G is what the sensitivities say of v; without them `reader_moments`, o's own weights.

    Args:
        value_map: what R2 may be; see `Rotation`.
        world: the processes that call this, and what it returns, together.
        batches: divides the numbers of outputs and, for the entropy, down's inputs; see `require_batches`.
    """
    assert value_map == "orthogonal" or salience != "magnitude", "PruneConfig refuses it: o's importance can be scaled"
    W, sizes = problem.weights, problem.sizes
    G = dict(problem.sensitivities)
    if value_map == "invertible":
        G.setdefault("value", reader_moments(W["output"], sizes))
    norms = {name: _norm(W[name], problem.hessians.get(INPUT_OF[name]), salience, G.get(name)) for name in INPUT_OF}
    if problem.sensitivities:  # errors of different linears are then comparable, and only their sum is normalised
        norms = dict.fromkeys(norms, torch.stack(list(norms.values())).sum())
    is_entropy = settings.name == "entropy"
    counts_vary = "value" in G and not is_entropy
    head, unit, products = sizes.head_dim, ALIGNED * batches, problem.products
    own_columns = None if world.size == 1 else world.part(sizes.hidden_size, unit)

    def counts(name: str) -> Tensor:
        """What each output counts; for the entropy no scale does."""
        return G.get(name, norms[name].new_ones(())).expand(len(W[name])) / norms[name]

    def reading(*names: str) -> Factor:
        rows = [world.own(W[name], 0, unit) for name in names]
        each = [world.own(counts(name), 0, unit) for name in names]
        return factor_of(rows, each, products, batches, is_scale_free=is_entropy)

    def writing_down() -> Factor:
        """For the entropy, which takes each column alone, this process's part of them and of that a batch, else all."""
        if is_entropy:
            return factor_of([world.own(W["down"].mT, 0, unit)], None, products, batches, is_scale_free=True)
        each = counts("down")[0].expand(sizes.intermediate_size)
        if salience != "magnitude":
            each = each * column_energy(problem.hessians["down"], None, salience, damping)
        return factor_of([W["down"].mT], [each], products)

    def turned_twice(name: str) -> RotatedWeight:
        """What R2 rotates too: its outputs times the root of what each counts, but for v's where that varies."""
        has_counts = not is_entropy and not (name == "value" and counts_vary)
        counted = W[name] * counts(name).sqrt().unsqueeze(-1) if has_counts else W[name]
        if name == "value" and not is_entropy:
            counted = world.own(counted, 0, head)
        rows = counted if name == "value" else counted.mT
        factor = factor_of([rows], None, sixteen_bits(products), is_scale_free=True)
        return RotatedWeight(factor.of_batch(None), None, writes=name == "output")

    query_key, gate_up, of_down = reading("query", "key"), reading("gate", "up"), writing_down()
    value, output = turned_twice("value"), turned_twice("output")
    along_inputs = [entropy_along(dim) if is_entropy else removal(sparsity, dim) for dim in (0, 1)]
    moments = {
        inputs: energy_moments(problem.hessians[inputs], salience, damping)
        for inputs in ("attention", "mlp", "output")
        if inputs in problem.hessians and salience != "magnitude"
    }
    rounded_moments = {inputs: moments[inputs].to(sixteen_bits(products)) for inputs in moments if inputs != "output"}

    def energy(inputs: str, R1: Tensor) -> Tensor | Moments | None:
        if salience == "magnitude":
            return None
        if salience == "sequential_obs":  # a Cholesky factor has no parts
            return rotated_energy(moments[inputs], R1, salience)
        return Moments(rounded_moments[inputs], salience == "obs")

    def output_energy(R2_of_queries: Tensor) -> Tensor | None:
        if salience == "magnitude":
            return None
        if value_map == "orthogonal":
            return rotated_energy(moments["output"], R2_of_queries, salience)
        # H is damped in the basis that the pruner sees, which only an orthogonal map makes the same as in any other.
        half = rotate_value_rows(problem.hessians["output"], R2_of_queries)
        return column_energy(rotate_value_rows(half.mT, R2_of_queries), None, salience, damping)

    def evaluate_batch(R1: Tensor, R2: Tensor, batch: Tensor | None) -> Tensor:
        R2_of_reader = R2 if value_map == "orthogonal" else inverse_transpose(R2)
        heads, columns = (R2, ALL_COLUMNS) if is_entropy else (world.own(R2), Columns(own_columns, batches, batch))
        weights = (
            RotatedWeight(query_key.of_batch(batch), along_inputs[0], energy=0),
            RotatedWeight(gate_up.of_batch(batch), along_inputs[0], energy=1),
            RotatedWeight(
                of_down.of_batch(batch if is_entropy else None),
                along_inputs[0 if is_entropy else 1],
                writes=True,
                by_column=is_entropy,
            ),
            value,
            output,
        )
        energies = [energy(inputs, R1) for inputs in ("attention", "mlp")]
        score, (attention_energy, _), (of_value, of_output) = rotated_scores(
            R1, energies, weights, products, columns, world, unit
        )
        of_value = rotate_output_columns(of_value, heads.to(of_value.dtype), 1)
        of_output = rotate_output_columns(of_output, R2_of_reader.to(of_output.dtype), sizes.queries_per_group)
        if counts_vary:
            varying = world.own(output_weights(G["value"], R2_of_reader), 0, head) / norms["value"]
            of_value = of_value * varying.clamp_min(torch.finfo(varying.dtype).tiny).sqrt().to(of_value.dtype)
        E = output_energy(R2.repeat_interleave(sizes.queries_per_group, dim=0))
        if not is_entropy:
            score = score + importance_score(of_output, E, along_inputs[1], 1)
            return batches * score + importance_score(of_value, attention_energy, along_inputs[0], 0)
        whole = []
        for T, of_inputs, dim in ((of_value, attention_energy, 0), (of_output, E, 1)):
            if world.size == 1:
                whole.append(importance_score(T, of_inputs, ENTROPY_ALONG_BOTH, dim))
                continue
            whole.append(importance_score(world.own(T, 1 - dim), of_inputs, entropy_along(dim), dim))
            own = None if of_inputs is None else world.own(of_inputs)
            whole.append(importance_score(world.own(T, dim), own, entropy_along(1 - dim), dim))
        return batches * score + torch.stack(whole).sum()

    def evaluate(R1: Tensor, R2: Tensor, batch: Tensor | None = None) -> Tensor:
        if batch is not None or batches == 1:
            return evaluate_batch(R1, R2, batch)
        numbers = torch.arange(batches, device=R1.device)
        return torch.stack([evaluate_batch(R1, R2, number) for number in numbers.split(1)]).mean()

    return evaluate


def require_batches(batches: int, sizes: LayerSizes) -> None:
    """Raises: ValueError if the outputs of a linear cannot be dealt to so many batches of the same size."""
    counts = (sizes.hidden_size, sizes.intermediate_size, sizes.num_key_value_heads * sizes.head_dim)
    if any(count % batches for count in counts):
        raise ValueError(
            f"optimizer.batches={batches} does not divide the outputs of all linears "
            f"({', '.join(map(str, counts))}): set it to 1 or 2."
        )


def with_gradients(objectives: Sequence[Objective], world: World = ALONE) -> ObjectiveWithGradients:
    """Sum one objective for each layer over (R1, R2), R2 (layers k, h, h), layer after layer, and over all processes.

    Only one layer's intermediates exist at a time.
    """

    def evaluate(R1: Tensor, R2: Tensor, batch: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        total, of_R1, of_R2 = R1.new_zeros(()), list[Tensor](), list[Tensor]()
        for objective, R2_layer in zip(objectives, R2.chunk(len(objectives)), strict=True):
            leaves = (R1.detach().requires_grad_(), R2_layer.detach().requires_grad_())
            with torch.enable_grad():
                loss = objective(*leaves, batch)
            gradients = torch.autograd.grad(loss, leaves)
            total += loss.detach()
            of_R1 = [G + gradients[0] for G in of_R1] or [gradients[0]]
            of_R2.append(gradients[1])
        G1, G2, total = world.sums([*of_R1, torch.cat(of_R2), total])  # in this order: both matrices stay aligned
        return total, G1, G2

    return evaluate


def reader_moments(W: Tensor, sizes: LayerSizes) -> Tensor:
    """Sum W_o^T W_o over the query heads of each group, (k, h, h): what o makes of v's outputs, tokens apart.

    Args:
        W: (d, k q h), of o.
    """
    heads = W.unflatten(1, (sizes.num_key_value_heads, sizes.queries_per_group, sizes.head_dim))
    return torch.einsum("dgqi,dgqj->gij", heads, heads)


def _norm(W: Tensor, H: Tensor | None, salience: str, G: Tensor | None) -> Tensor:
    """tr(G W H W^T), with H = I where the importance does not look at the inputs. The same in every basis."""
    read = W if H is None or salience == "magnitude" else W @ H
    if G is None or G.ndim == 0:
        energy = (W * read).sum() * (1 if G is None else G)
    elif G.ndim == 1:
        energy = (G * (W * read).sum(1)).sum()
    else:
        blocks = G.reshape(-1, *G.shape[-2:])
        energy = (blocks @ W.unflatten(0, (len(blocks), -1)) * read.unflatten(0, (len(blocks), -1))).sum()
    return energy.clamp_min(torch.finfo(W.dtype).tiny)  # a linear of zeros has nothing to lose
