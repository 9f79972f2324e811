"""The paper's optimization step as its released code formulates it, for `drotator bench bench.paper=true` alone.

Each linear by itself in bfloat16; R^T H R is formed whole for every linear that reads it, R2 as a dense block-diagonal
matrix; the rotations are QR factors of free matrices, and autograd goes through all of it at every step. Written anew
from the description of its cost, without torch.compile (the released code compiles the importances) and without CUDA
graphs. Source: DenoiseRotator, sections 3.3 and 3.4, and the released code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
