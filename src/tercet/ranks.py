"""The processes that train together, as the rest of the package sees them; one process alone is a group of one.

Nothing here asks for a process group: without one every call answers for this process alone.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class Ranks:
    """A group of processes that call the same things in the same order.

    Attributes:
        rank: this process, from 0.
        world: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """The processes of `group`; None: all that were started together."""
        joined = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if joined else 0
        self.world = dist.get_world_size(group) if joined else 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def apart(self) -> Ranks:
        """The same processes with a channel of their own (host memory), for calls from another thread."""
        if self.world == 1:
            return self
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # an int for those that are no part of it
        return Ranks(group)

    def gather(self, value: Value) -> list[Value]:
        """Any value of every rank, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_in_turn(self, values: list[Value]) -> list[Value]:
        """Values that were dealt to the ranks like cards, in the order in which they were dealt."""
        hands = self.gather(values)
        dealt = itertools.zip_longest(*hands, fillvalue=_NOTHING)
        return [value for row in dealt for value in row if value is not _NOTHING]

    def from_first(self, value: Value) -> Value:
        """The value that the first rank gives."""
        return self.gather(value)[0]

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """Small tensors of every rank, all of one shape `[...]` on the host: `[world, ...]`."""
        if self.world == 1:
            return numbers[None]
        gathered = numbers.new_empty(self.world * numbers.numel())
        dist.all_gather_into_tensor(gathered, numbers.flatten(), group=self.group)
        return gathered.view(self.world, *numbers.shape)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks of `numbers`, on their device, without gradient."""
        total = numbers.detach().clone()
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.sum(torch.tensor(int(here)))) if self.world > 1 else here

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.world > 1:
            dist.barrier(group=self.group)


_NOTHING: Any = object()
