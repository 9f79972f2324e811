"""The paper's optimization step, and SparseGPT, as their released code formulates them, for `drotator bench
bench.paper=true` alone.

The step: each linear by itself in bfloat16; R^T H R is formed whole for every linear that reads it, R2 as a dense
block-diagonal matrix; the rotations are QR factors of free matrices, and autograd goes through all of it at every step.
Written anew from the description of its cost, without torch.compile (the released code compiles the importances) and
without CUDA graphs. Source: DenoiseRotator, sections 3.3 and 3.4, and the released code.

SparseGPT: each linear by itself, and one column after another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drotator.config import PrunerConfig, SparsityConfig
from drotator.energies import damped
from drotator.objectives import INPUT_OF, LayerProblem

LEARNING_RATE = 0.01
STEPS = 2000
SALIENCES = ("magnitude", "wanda", "obs")


def paper_step(problem: LayerProblem, salience: str, damping: float) -> Callable[[], Tensor]:
    """Return a function that takes one step of Adam and returns the entropy before it, () bfloat16.

    Args:
        problem: with moments of the inputs of attention, o and the MLP, unless the salience is magnitude.
        salience: one of SALIENCES.
    """
    sizes = problem.sizes
    device = problem.weights["query"].device
    weights = {name: weight.bfloat16() for name, weight in problem.weights.items()}
    read = {inputs: H for inputs, H in problem.hessians.items() if inputs != "down"}
    moments = {inputs: _factor(H, salience, damping).bfloat16() for inputs, H in read.items()}
    A = torch.eye(sizes.hidden_size, device=device, requires_grad=True)
    heads = [torch.eye(sizes.head_dim, device=device, requires_grad=True) for _ in range(sizes.num_key_value_heads)]
    optimizer = torch.optim.Adam([A, *heads], lr=LEARNING_RATE)

    def energy(name: str, R: Tensor) -> Tensor | float:
        if salience == "magnitude":
            return 1.0
        diagonal = (R.mT @ moments[INPUT_OF[name]] @ R).diagonal().abs()
        return diagonal if salience == "wanda" else 1 / diagonal

    def loss() -> Tensor:
        R1 = torch.linalg.qr(A).Q.bfloat16()
        small = [torch.linalg.qr(head).Q.bfloat16() for head in heads]
        of_values = torch.block_diag(*small)
        of_queries = torch.block_diag(*(R2 for R2 in small for _ in range(sizes.queries_per_group)))
        total = _entropy((R1.mT @ weights["down"]).square().mT)  # a factor common to a column cancels
        for name in ("query", "key", "gate", "up"):
            total = total + _entropy((weights[name] @ R1).square() * energy(name, R1))
        for S in (
            (of_values.mT @ weights["value"] @ R1).square() * energy("value", R1),
            (R1.mT @ weights["output"] @ of_queries).square() * energy("output", of_queries),
        ):
            total = total + _entropy(S) + _entropy(S.mT)
        return total

    @torch.enable_grad()
    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_([A, *heads], 1.0)
        optimizer.step()
        return value.detach()

    return step


def _factor(H: Tensor, salience: str, damping: float) -> Tensor:
    if salience != "obs":
        return H
    return torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H), device=H.device))


def _entropy(S: Tensor) -> Tensor:
    """Sum of the entropies of the rows, by autograd, with zeros kept out of the logarithm."""
    p = S / S.sum(1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    p = torch.where(p > 0, p, 1)
    return -(p * p.log()).sum()


@torch.no_grad()
def sparsegpt_by_columns(W: Tensor, H: Tensor, sparsity: SparsityConfig, settings: PrunerConfig) -> Tensor:
    """Prune W, (d_out, d_in), by its inputs' H, (d_in, d_in) without dead inputs: the weights that are left, in place.

    Source: SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(H, settings.damping)))
    U = torch.linalg.cholesky(inverse, upper=True)
    gain = U.diagonal().pow(-2)
    for start in range(0, len(H), settings.block_size):
        stop = min(start + settings.block_size, len(H))
        block, errors = W[:, start:stop], torch.zeros_like(W[:, start:stop])
        gone = torch.zeros_like(block, dtype=torch.bool)
        if not sparsity.is_grouped:
            importance = (block.square() * gain[start:stop]).flatten()
            gone.view(-1)[importance.argsort()[: round(sparsity.ratio * len(importance))]] = True
        for j in range(start, stop):
            if sparsity.is_grouped and (j - start) % sparsity.group == 0:
                members = slice(j, j + sparsity.group)
                least = (W[:, members].square() * gain[members]).topk(sparsity.group - sparsity.keep, largest=False)
                gone[:, j - start : j - start + sparsity.group].scatter_(1, least.indices, True)
            error = torch.where(gone[:, j - start], W[:, j], 0) / U[j, j]
            W[:, j:stop] -= error.outer(U[j, j:stop])
            errors[:, j - start] = error
        block[gone] = 0
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W
