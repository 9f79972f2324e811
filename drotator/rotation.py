"""Rotations of a decoder layer: what they are, how they are merged, what stands between two layers.

d = hidden_size, h = head_dim, k = num_key_value_heads. Hidden states are rows: rotated hidden states are x R1, so a
linear that reads them becomes W R1 and one that writes them R1^T W (DenoiseRotator, arXiv 2505.23049, section 3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drotator.architecture import LayerSizes, LayerSpec, linear

POLISH_STEPS = 8
POLISHED = 1e-12
INVERSE_STEPS = 24
"""Enough for float32 where the least singular value of a matrix is above a thousandth of its Frobenius norm."""
CONDITION_LIMIT = 1e3
"""Condition number of an invertible R2 from which on the weights it is merged in round too coarsely."""


@dataclass(frozen=True)
class Rotation:
    """What is merged in a layer and leaves its function as it was.

    R1: (d, d), of the residual stream. R2: (k, h, h), one for each key/value head. Float32 or 64.
    order: (m,) int64, the order in which the MLP's intermediate channels are put, or None to leave them.
    value_map: "orthogonal": R1 and R2 are. "invertible": R1 is, and R2 is any map with an inverse: nothing stands
    between v and o but sums over tokens, which commute with it, so that W_o R2^-T undoes R2^T W_v.
    """

    R1: Tensor
    R2: Tensor
    order: Tensor | None = None
    value_map: str = "orthogonal"

    @classmethod
    def identity(cls, sizes: LayerSizes, device: torch.device | str = "cpu") -> Rotation:
        R1 = torch.eye(sizes.hidden_size, device=device)
        R2 = torch.eye(sizes.head_dim, device=device).repeat(sizes.num_key_value_heads, 1, 1)
        return cls(R1, R2)

    @classmethod
    def random(cls, sizes: LayerSizes, generator: torch.Generator) -> Rotation:
        """Draw Haar-distributed rotations, float64 on the CPU."""
        k, h, d = sizes.num_key_value_heads, sizes.head_dim, sizes.hidden_size
        gaussian = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (d, *[h] * k))
        R1, *heads = (torch.linalg.qr(matrix).Q for matrix in gaussian)
        return cls(R1, torch.stack(heads))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Rotation:
        R1, R2 = (R.to(device=device, dtype=dtype) for R in (self.R1, self.R2))
        order = None if self.order is None else self.order.to(device)
        return dataclasses.replace(self, R1=R1, R2=R2, order=order)

    @property
    def is_orthogonal(self) -> bool:
        return self.value_map == "orthogonal"

    @property
    def output_map(self) -> Tensor:
        """R2^-T, (k, h, h), what W_o is multiplied by; R2 itself where it is orthogonal."""
        return self.R2 if self.is_orthogonal else torch.linalg.inv(self.R2).mT

    def orthogonality(self) -> float:
        """Largest entry of |R^T R - I| over the matrices that have to be orthogonal, computed in float64."""
        checked = (self.R1, self.R2) if self.is_orthogonal else (self.R1,)
        return max(float((R.double().mT @ R.double() - eye_like(R).double()).abs().max()) for R in checked)

    def condition(self) -> float:
        """Largest condition number of R2's matrices, nan if one is not finite, computed in float64."""
        if not self.R2.isfinite().all():
            return math.nan
        return float(torch.linalg.cond(self.R2.double()).max())

    def polished(self) -> Rotation:
        """Return the rotation in float64: the nearest orthogonal matrices, an invertible R2 as it is.

        Raises: RuntimeError if they are not near, or R2 is nearly singular.
        """
        R2 = self.R2.double()
        if self.is_orthogonal:
            R2 = polar(R2, POLISH_STEPS)
        elif not (condition := self.condition()) < CONDITION_LIMIT:
            raise RuntimeError(
                f"the map between v and o is nearly singular: its condition number is {condition:.2g}, "
                f"over {CONDITION_LIMIT:g}. Lower optimizer.learning_rate, or use rotation.value_map=orthogonal"
            )
        polished = dataclasses.replace(self, R1=polar(self.R1.double(), POLISH_STEPS), R2=R2)
        if not polished.orthogonality() < POLISHED:
            raise RuntimeError(f"a rotation is not orthogonal: |R^T R - I| = {self.orthogonality():.2g}")
        return polished


def eye_like(R: Tensor) -> Tensor:
    return torch.eye(R.shape[-1], device=R.device, dtype=R.dtype)


class _Inverse(torch.autograd.Function):
    """Inverse by Newton steps X <- X (2 I - M X) from M^T / |M|^2; d(M^-1) = -M^-1 dM M^-1.

    They square the error I - M X, whose norm is 1 - (s_min / |M|)^2 at the start. For more than 16 matrices, or of more
    than 128 rows, torch 2.11 gives an LU factorization to MAGMA, which waits for the device.
    """

    @staticmethod
    def forward(ctx: Any, M: Tensor) -> Tensor:
        X = M.mT / M.square().sum((-2, -1), keepdim=True)
        for _ in range(INVERSE_STEPS):
            X = 2 * X - X @ (M @ X)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        return -X.mT @ grad @ X.mT


def inverse_transpose(M: Tensor) -> Tensor:
    """Return M^-T of well-conditioned M, (..., h, h). Differentiable, and never waits for the device."""
    inverse: Tensor = _Inverse.apply(M)
    return inverse.mT


def polar(R: Tensor, steps: int) -> Tensor:
    """Pull (..., n, n) to its orthogonal polar factor by cubic Newton-Schulz steps, `steps` at most; singular values
    below sqrt(3). A step squares what is missing: it ends when that is below the root of what can be told from I.
    """
    enough = torch.finfo(R.dtype).eps ** 0.5
    for _ in range(steps):
        missing = eye_like(R) - R.mT @ R
        R = R + 0.5 * R @ missing
        if missing.abs().max() * R.shape[-1] < enough:  # of which the largest row sum bounds the norm
            break
    return R


@torch.no_grad()
def fold_norms(layer: nn.Module, spec: LayerSpec) -> dict[str, Tensor]:
    """Move the gains of the layer's norms into the linears that follow; the gains become 1.

    Returns: the weights of all pruned linears by name, before they are rounded to the layer's dtype: float64 for a
        float64 layer, float32 otherwise, which is exact for bfloat16 and float16 weights.
    """
    weights = {}
    for name in spec.linears:
        weight = linear(layer, name).weight
        weights[name] = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for norm_name, linear_names in spec.norms.items():
        gain = layer.get_submodule(norm_name).get_parameter("weight")
        for name in linear_names:
            weight = linear(layer, name).weight
            folded = weight.double() * gain.double()
            weights[name].copy_(folded)
            weight.copy_(folded)
        gain.fill_(1.0)
    return weights


@torch.no_grad()
def reorder_intermediate(layer: nn.Module, spec: LayerSpec, weights: dict[str, Tensor], order: Tensor) -> None:
    """Put the MLP's intermediate channels in another order, in the layer and in what `fold_norms` returned of it."""
    for name in (spec.gate, spec.up):
        module = linear(layer, name)
        weights[name] = weights[name][order]
        module.weight.copy_(module.weight[order])
        if module.bias is not None:
            module.bias.copy_(module.bias[order])
    weights[spec.down] = weights[spec.down][:, order]
    linear(layer, spec.down).weight.copy_(linear(layer, spec.down).weight[:, order])


@torch.no_grad()
def merge_rotation(
    layer: nn.Module, spec: LayerSpec, sizes: LayerSizes, rotation: Rotation, weights: Mapping[str, Tensor]
) -> None:
    """Merge R1 and R2 in the weights and biases of a layer whose norms are folded.

    The layer then maps x R1 to y R1 where it mapped x to y. Products are float64, rounded once to the layer's dtype.

    Args:
        weights: what `fold_norms` returned.
    """
    rotation = rotation.to(dtype=torch.float64)
    R1, R2 = rotation.R1, rotation.R2
    for name in (spec.query, spec.key, spec.value, spec.gate, spec.up):
        weight = weights[name].double() @ R1
        linear(layer, name).weight.copy_(rotate_value_rows(weight, R2) if name == spec.value else weight)
    for name in (spec.output, spec.down):
        writer = linear(layer, name)
        weight = R1.mT @ weights[name].double()
        if name == spec.output:
            weight = rotate_output_columns(weight, rotation.output_map, sizes.queries_per_group)
        writer.weight.copy_(weight)
        if writer.bias is not None:
            writer.bias.copy_(writer.bias.double() @ R1)
    value = linear(layer, spec.value)
    if value.bias is not None:
        value.bias.copy_(rotate_value_rows(value.bias.double()[:, None], R2)[:, 0])


def rotate_value_rows(W: Tensor, R2: Tensor) -> Tensor:
    """Rows of key/value head g by R2_g^T: (k h, n) -> (k h, n)."""
    k, h, _ = R2.shape
    return torch.einsum("ghi,ghn->gin", R2, W.reshape(k, h, -1)).reshape(W.shape)


def rotate_output_columns(W: Tensor, R2: Tensor, queries_per_group: int) -> Tensor:
    """Columns of every query head by the matrix of its group: (n, k q h) -> (n, k q h), q = queries_per_group."""
    turned: Tensor = _ByHeads.apply(W.contiguous(), R2.repeat_interleave(queries_per_group, dim=0))
    return turned


class _ByHeads(torch.autograd.Function):
    """Columns of head i, (n, h), times R_i; einsum would copy large weights to bring the heads to the front."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(W, R)
        return _by_heads(W, R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        W, R = ctx.saved_tensors
        grad = grad.contiguous()
        return _by_heads(grad, R.mT), _heads(W, R).mT @ _heads(grad, R)


def _heads(W: Tensor, R: Tensor) -> Tensor:
    """(n, heads h) -> (heads, n, h), a view."""
    return W.view(len(W), len(R), R.shape[-1]).transpose(0, 1)


def _by_heads(W: Tensor, R: Tensor) -> Tensor:
    turned = torch.empty_like(W)
    torch.bmm(_heads(W, R), R, out=_heads(turned, R))
    return turned


def boundary_weight(R1_before: Tensor, R1_after: Tensor) -> Tensor:
    """Weight of the linear between two layers, (d, d) float64: rows x become x R1_before^T R1_after."""
    return R1_after.double().mT @ R1_before.double()
