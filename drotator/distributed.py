"""The processes that work on one run together, each on a GPU of its own or on the CPU.

A `World` is what the pipeline sees of them. A process that works alone is a World of size 1, in which everything here
gives back what it was given: no place that calls it asks how many there are.

Split over the processes: the windows of every calibration batch, the rows of every linear while it is pruned, the
outputs of every linear whose importances a step of training looks at. The same on all: weights, moments, rotations. The
first one alone touches the run folder, evaluates and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from drotator.processes import place

Item = TypeVar("Item")
CPU = torch.device("cpu")
ALIGNED = 16
"""Shares of a matrix are multiples of it: products of 8 bits want that, and those of 16 bits are slow without."""


@dataclass(frozen=True)
class World:
    """Every process calls the same of these methods in the same order.

    rank: of this process. size: how many there are. local_rank: rank among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> World:
        """The processes that torch.distributed has joined, or this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), place().local_rank)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, count: int, unit: int = 1) -> slice:
        """This process's share of `count` things in a row; shares differ by one unit at most and may be empty."""
        units = -(-count // unit)
        start, stop = (min(count, unit * (units * rank // self.size)) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def own(self, tensor: Tensor, dim: int = 0, unit: int = 1) -> Tensor:
        """This process's part of a tensor along a dimension, a view."""
        if self.size == 1:
            return tensor
        part = self.part(tensor.shape[dim], unit)
        return tensor.narrow(dim, part.start, part.stop - part.start)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, in which it then has the same bits.

        On a GPU it is queued on the current stream and never waits for the device, so that a CUDA graph can hold it
        once it has run before (the first call makes the communicator).
        """
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sums(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sum of each of some tensors of one dtype over all processes, which are sent together."""
        if self.size == 1:
            return tensors
        flat = self.all_reduce_(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of the first process."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather_rows(self, rows: Tensor, count: int, unit: int = 1) -> Tensor:
        """Put together `count` rows of which each process has its `part`. Exact: to each row zeros are added.

        Differentiable: what the processes make of the rows is taken as terms of one sum.
        """
        if self.size == 1:
            return rows
        whole: Tensor = _Gathered.apply(rows, count, unit, self)
        return whole

    def gather(self, item: Item) -> list[Item]:
        """What each process has, in the order of ranks; small things of the host."""
        found: list[Item] = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(found, item)
        return found

    def share(self, function: Callable[[], Item]) -> Item:
        """Let the first process alone call the function; the others wait for what it returns. No GPU tensors."""
        if self.size == 1:
            return function()
        box = [function() if self.is_first else None]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]  # type: ignore[return-value]

    def in_turn(self, function: Callable[[], Item]) -> Item:
        """Call the function in the first process, and then in the others: what fills a cache is done once."""
        if self.is_first:
            result = function()
        self.barrier()
        return result if self.is_first else function()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.all_reduce_(torch.zeros(1))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, unit: int, world: World) -> Tensor:
        ctx.unit, ctx.world = unit, world
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[world.part(count, unit)] = rows
        return world.all_reduce_(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        total = ctx.world.all_reduce_(grad.clone(memory_format=torch.contiguous_format))
        return ctx.world.own(total, unit=ctx.unit), None, None, None


ALONE = World()
