"""Objectives: how much importance is out of place in a layer, as a differentiable function of its rotations.

d = hidden_size, m = intermediate_size, h = head_dim, k = num_key_value_heads, q = query heads of each of them.
Importance S of a weight W_ij: W_ij^2 (magnitude), times (H)_jj (wanda), over (H^-1)_jj (obs), over U_jj^2 with
H^-1 = U^T U (sequential_obs); design: one factor for each input column, so S = W^2 * energy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drotator.architecture import LayerSizes, LayerSpec
from drotator.config import ObjectiveConfig, SparsityConfig
from drotator.distributed import ALIGNED, ALONE, World
from drotator.rotation import inverse_transpose, rotate_output_columns, rotate_value_rows
from drotator.scores import (
    ALL_COLUMNS,
    Columns,
    RotatedWeight,
    entropy_along,
    importance_score,
    removal,
    rotated_scores,
)

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
    products: torch.dtype | None = None

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
        products: torch.dtype | None = None,
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


def damped(H: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I. The mean of the diagonal is the same in every basis."""
    return H + damping * H.diagonal().mean() * torch.eye(len(H), device=H.device, dtype=H.dtype)


def column_energy(H: Tensor, R: Tensor | None, salience: str, damping: float) -> Tensor:
    """Factor of every input column in S = W^2 * energy, in the basis R.

    Args:
        H: (n, n) float32 or float64, undamped moments in the original basis.
        R: (n, n) orthogonal, or None for the original basis; (n / h, h, h) stands for a block-diagonal one.
            Differentiable.
        salience: wanda: (R^T H R)_jj. obs: 1 / (R^T H^-1 R)_jj. sequential_obs: 1 / U_jj^2 with R^T H^-1 R = U^T U.
    Returns: (n,), > 0.
    Source: DenoiseRotator section 3.3; SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    return rotated_energy(energy_moments(H, salience, damping), R, salience)


def energy_moments(H: Tensor, salience: str, damping: float) -> Tensor:
    """What of H does not change with R: H for wanda, its damped inverse for obs, damped H for sequential_obs."""
    if salience == "wanda":
        return H
    H = damped(H, damping)
    return torch.cholesky_inverse(_cholesky(H)).contiguous() if salience == "obs" else H  # TF32 products want rows


def rotated_energy(M: Tensor, R: Tensor | None, salience: str) -> Tensor:
    """`column_energy` from its `energy_moments` M."""
    if salience != "sequential_obs":
        diagonal = M.diagonal() if R is None else _rotated_diagonal(M, R)
        return diagonal if salience == "wanda" else 1 / diagonal
    # H = V V^T with V upper triangular gives U = V^-1, so 1 / U_jj = V_jj: no inverse is formed.
    if R is not None:
        R = torch.block_diag(*R) if R.ndim == 3 else R
        M = R.mT @ M @ R
    return _cholesky(M.flip(0, 1)).diagonal().flip(0).square()


def _rotated_diagonal(M: Tensor, R: Tensor) -> Tensor:
    """diag(R^T M R) of a symmetric M, (n, n), of which a block-diagonal R sees the blocks alone."""
    if R.ndim == 3:
        blocks = M.unflatten(1, (len(R), -1)).unflatten(0, (len(R), -1)).diagonal(dim1=0, dim2=2)
        M = blocks.permute(2, 0, 1)
    diagonal: Tensor = _RotatedDiagonal.apply(M, R)
    return diagonal.flatten()


class _RotatedDiagonal(torch.autograd.Function):
    """Of a symmetric M that does not change: the product M R gives the value and the gradient, 2 M R diag(grad)."""

    @staticmethod
    def forward(ctx: Any, M: Tensor, R: Tensor) -> Tensor:
        read = M @ R
        ctx.save_for_backward(read)
        return (R * read).sum(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (read,) = ctx.saved_tensors
        return None, read * (2 * grad).unsqueeze(-2)


def _cholesky(H: Tensor) -> Tensor:
    """Lower Cholesky factor, all nan if H is not positive definite: asking for an error would wait for the device."""
    factor, info = torch.linalg.cholesky_ex(H)
    return torch.where(info == 0, factor, torch.nan)


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
    down_energy = None
    if salience != "magnitude" and "down" in problem.hessians:
        down_energy = column_energy(problem.hessians["down"], None, salience, damping)

    is_entropy = settings.name == "entropy"
    by_output = entropy_along(0) if is_entropy else removal(sparsity)
    by_input = entropy_along(1) if is_entropy else by_output

    counts_vary = "value" in G and not is_entropy

    def counted(name: str) -> Tensor:
        """W with its outputs times the root of what each counts, but for v's where that varies with R2."""
        if is_entropy or (name == "value" and counts_vary):
            return W[name]
        counts = G.get(name, norms[name].new_ones(())) / norms[name]
        return W[name] * counts.sqrt().unsqueeze(-1)

    unit = ALIGNED * batches
    own_columns = None if world.size == 1 else world.part(sizes.hidden_size, unit)

    def reading(*names: str) -> Tensor:
        joined = torch.cat([world.own(counted(name), 0, unit).to(problem.products) for name in names])
        return dealt(joined.mT, 1, batches)

    query_key, gate_up = reading("query", "key"), reading("gate", "up")
    of_down = counted("down").mT
    if is_entropy:
        of_down = world.own(of_down, 0, unit)
        down_energy = None if down_energy is None else dealt(world.own(down_energy, 0, unit), 0, batches)
    of_down = dealt(of_down.to(problem.products), 0, batches if is_entropy else 1)
    head = sizes.head_dim
    of_heads = counted("value") if is_entropy else world.own(counted("value"), 0, head)
    value = RotatedWeight(of_heads.to(problem.products).mT.contiguous(), None)
    output = RotatedWeight(counted("output").to(problem.products).mT.contiguous(), None, writes=True)
    moments = {
        inputs: energy_moments(problem.hessians[inputs], salience, damping)
        for inputs in ("attention", "mlp", "output")
        if inputs in problem.hessians and salience != "magnitude"
    }

    def energy(inputs: str, R: Tensor) -> Tensor | None:
        if salience == "magnitude":
            return None
        if salience == "sequential_obs" or R.ndim == 3:  # a Cholesky factor has no parts, and blocks take no time
            return rotated_energy(moments[inputs], R, salience)
        own = rotated_energy(moments[inputs], world.own(R, 1, unit), salience)
        return world.gather_rows(own, R.shape[1], unit)

    def output_energy(R2_of_queries: Tensor) -> Tensor | None:
        if value_map == "orthogonal":
            return energy("output", R2_of_queries)
        # H is damped in the basis that the pruner sees, which only an orthogonal map makes the same as in any other.
        half = rotate_value_rows(problem.hessians["output"], R2_of_queries)
        return column_energy(rotate_value_rows(half.mT, R2_of_queries), None, salience, damping)

    def evaluate_batch(R1: Tensor, R2: Tensor, batch: Tensor | None) -> Tensor:
        R2_of_reader = R2 if value_map == "orthogonal" else inverse_transpose(R2)
        of_queries, of_readers = (R.repeat_interleave(sizes.queries_per_group, dim=0) for R in (R2, R2_of_reader))
        attention_energy, mlp_energy, heads = energy("attention", R1), energy("mlp", R1), R2
        columns, energy_of_down = ALL_COLUMNS, down_energy
        if not is_entropy:
            columns, heads = Columns(own_columns, batches, batch), world.own(R2)
        elif down_energy is not None:
            energy_of_down = one_of(down_energy, batch)
        down = RotatedWeight(one_of(of_down, batch if is_entropy else None), by_input, True, is_entropy)
        readers = (RotatedWeight(one_of(hands, batch), by_output) for hands in (query_key, gate_up))
        energies = (attention_energy, mlp_energy, energy_of_down, None, None)
        score, of_value, of_output = rotated_scores(R1, energies, (*readers, down, value, output), columns)
        of_value = rotate_output_columns(of_value, heads.to(of_value.dtype), 1)
        of_output = rotate_value_rows(of_output, of_readers.to(of_output.dtype))
        if counts_vary:
            counts = world.own(output_weights(G["value"], R2_of_reader), 0, head) / norms["value"]
            of_value = of_value * counts.clamp_min(torch.finfo(counts.dtype).tiny).sqrt().to(of_value.dtype)
        if not is_entropy:
            score = score + importance_score(of_output, output_energy(of_queries), by_output)
            return batches * score + importance_score(of_value, attention_energy, by_output)
        whole = []
        for T, E in ((of_value, attention_energy), (of_output, output_energy(of_queries))):
            whole.append(importance_score(world.own(T, 1), E, by_output))
            whole.append(importance_score(world.own(T), None if E is None else world.own(E), by_input))
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


def dealt(W: Tensor, dim: int, batches: int) -> Tensor:
    """Deal the slices of W along a dimension out to batches, like cards: (batches, ...), each contiguous."""
    return W.unflatten(dim, (-1, batches)).movedim(dim + 1, 0).contiguous()


def one_of(hands: Tensor, batch: Tensor | None) -> Tensor:
    """One of what was `dealt`, chosen on the device; without a batch there is only one."""
    return hands[0] if batch is None else hands.index_select(0, batch)[0]


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


def output_weights(G: Tensor, R: Tensor | None) -> Tensor:
    """Weight of each output of a linear: diag(R^T G R), or what G says where the outputs are not rotated.

    Args:
        G: () the same for all outputs; (d_out,) one for each; (n, n) or (k, h, h) moments of what the outputs do.
        R: (n, n) or (k, h, h), the basis of what reads the outputs: their rotation, M^-T for outputs mapped by M^T.
    Returns: () or (d_out,).
    """
    if G.ndim < 2 or R is None:
        return G
    weights: Tensor = _RotatedDiagonal.apply(G, R)
    return weights.flatten()


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
