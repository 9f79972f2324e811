"""Which weights stay: keep-masks with exact counts, and what every pruner returns.

Legend: d_out, d_in = outputs and inputs of a linear. A mask is True where a weight is KEPT. Importance is of any float
dtype and comparable within the set that it is ranked in; the largest survive, and of equal ones those that come first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drotator.config import SparsityConfig

MAX_COMPARED = 32  # members of a group; the pairs to compare grow as its square


class PrunedLinear(NamedTuple):
    """A linear after pruning.

    weight: (d_out, d_in) dtype and device of the weight given, exactly +0.0 where a weight was removed.
    mask: (d_out, d_in) bool, True = kept.
    damping: what was added to the diagonal of H, as a part of its mean; 0.0 where the pruner inverts no Hessian.
    """

    weight: Tensor
    mask: Tensor
    damping: float


def validate(sparsity: SparsityConfig, d_in: int, name: str) -> None:
    """Refuse a group that does not divide the inputs of the linear called `name`. Raises: ValueError."""
    if sparsity.is_grouped and d_in % sparsity.group:
        raise ValueError(
            f"sparsity={sparsity.label} needs d_in divisible by {sparsity.group}, but {name} has d_in={d_in}. "
            f"Choose a group that divides it, or sparsity=50."
        )


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise RuntimeError that names the tensor, its shape and the count where a value is NaN or infinite."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        shape = " x ".join(map(str, tensor.shape))
        raise RuntimeError(
            f"{name} ({shape}) is not finite in {bad} of its {tensor.numel()} values. "
            f"Check the checkpoint for damage, or run the layers with model.dtype=float32."
        )


def num_removed(sparsity: SparsityConfig, d_out: int, d_in: int) -> int:
    """Count the weights that a (d_out, d_in) linear loses: all groups' share, or the ratio rounded once."""
    if sparsity.is_grouped:
        return d_out * (d_in // sparsity.group) * (sparsity.group - sparsity.keep)
    return round(sparsity.ratio * (d_out * d_in))


def grouped_mask(importance: Tensor, keep: int, group: int) -> Tensor:
    """Keep the `keep` largest of every `group` consecutive inputs.

    Each weight is ranked by comparing it with the rest of its group: no sort, and no more memory than one copy of the
    importances and a few bytes a weight.

    Args: importance: (d_out, d_in), d_in divisible by group.
    Returns: (d_out, d_in) bool.
    """
    groups = importance.reshape(-1, group)
    if group > MAX_COMPARED:
        return _largest(groups, torch.full((len(groups),), keep, device=groups.device), keep).reshape(importance.shape)
    members = groups.T.contiguous()  # (group, groups), so that one comparison runs over all groups
    # How many are ahead: at first all that come later, then each pair is settled, and a tie is the earlier one's.
    ahead = torch.arange(group - 1, -1, -1, dtype=torch.uint8, device=members.device)[:, None].repeat(1, len(groups))
    for distance in range(1, group):
        earlier_wins = (members[:-distance] >= members[distance:]).view(torch.uint8)
        ahead[:-distance] -= earlier_wins
        ahead[distance:] += earlier_wins
    return (ahead < keep).T.reshape(importance.shape)


def row_mask(importance: Tensor, removed: int) -> Tensor:
    """Remove the `removed` smallest in all, compared within rows, every row an equal share to within one weight.

    Args: importance: (d_out, d_in); removed: 0 to d_out * d_in.
    Returns: (d_out, d_in) bool.
    Source: Wanda, arXiv 2306.11695, section 3 (comparison per output).
    """
    d_out, d_in = importance.shape
    bounds = torch.arange(d_out + 1, device=importance.device) * removed // d_out
    return _largest(importance, d_in - bounds.diff(), d_in - removed // d_out)


def matrix_mask(importance: Tensor, removed: int) -> Tensor:
    """Remove the `removed` smallest of the whole matrix.

    Args: importance: (d_out, d_in); removed: 0 to d_out * d_in.
    Returns: (d_out, d_in) bool.
    """
    kept = importance.numel() - removed
    row = importance.reshape(1, -1)
    return _largest(row, torch.full((1,), kept, device=row.device), kept).reshape(importance.shape)


def _largest(importance: Tensor, kept: Tensor, most: int) -> Tensor:
    """Mark the kept[i] largest of row i by a threshold, counting those that are equal to it so that counts stay exact.

    torch.topk and not torch.kthvalue, which walks a row with one block of threads on a GPU (pytorch#75599).

    Args:
        importance: (rows, n), finite.
        kept: (rows,) int64, each `most` or one less: then too the most-th largest bounds what stays.
        most: 0 to n, known to the host so that nothing waits for the device.
    """
    top = importance.topk(max(most, 1), dim=1, sorted=False).values
    threshold = top.amin(dim=1, keepdim=True)
    equal_kept = kept - (top > threshold).sum(dim=1)
    equal = importance == threshold
    return (importance > threshold) | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= equal_kept[:, None]))


def apply_mask(W: Tensor, mask: Tensor) -> Tensor:
    """Return W with +0.0 where the mask is False (a product would leave -0.0, vllm#13198)."""
    return torch.where(mask, W, 0)


def sparsity_of(weight: Tensor) -> float:
    """Measure the part of a weight that is exactly zero."""
    return (weight.numel() - int(weight.count_nonzero())) / weight.numel()
