"""The processes that train together, as the rest of the package sees them; one process alone is a group of one.

Nothing here asks for a process group: without one every call answers for this process alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.errors import TercetError

Value = TypeVar("Value")

# PyTorch 2.13 gave them these names, and warns of the former ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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

    def by_first(self, act: Callable[[], Value]) -> Value:
        """What `act` gives on the first rank, which alone does it.

        Raises:
            TercetError: on every rank, what `act` raised.
        """
        value, complaint = None, None
        if self.first:
            try:
                value = act()
            except TercetError as error:
                complaint = str(error)
        value, complaint = self.from_first((value, complaint))
        if complaint is not None:
            raise TercetError(complaint)
        return value  # pyright: ignore[reportReturnType] - the first rank's

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """Small tensors of every rank, all of one shape `[...]` on the host: `[world, ...]`."""
        if self.world == 1:
            return numbers[None]
        gathered = numbers.new_empty(self.world * numbers.numel())
        _all_gather(gathered, numbers.flatten(), group=self.group)
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


@dataclass(frozen=True)
class Spread:
    """How the rows of one batch are spread over the ranks; those of the first rank come first.

    Attributes:
        sizes: rows on each rank.
        rank: this one.
    """

    sizes: tuple[int, ...]
    rank: int = 0

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return sum(self.sizes)

    @property
    def mean(self) -> float:
        """Rows a rank has on average: the sum of a loss over its own rows, divided by this, is averaged over the ranks
        to the mean over all rows."""
        return self.total / len(self.sizes)

    @property
    def start(self) -> int:
        """Which row of the whole batch is the first here."""
        return sum(self.sizes[: self.rank])

    @property
    def rows(self) -> slice:
        """The rows of the whole batch that are here."""
        return slice(self.start, self.start + self.sizes[self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every rank, `[total, ...]`, of those here, `[size, ...]`; gradients go back to where rows came
        from, summed over the ranks that read them."""
        return rows if len(self.sizes) == 1 else _GatherRows.apply(rows, self)


def lost_rank(error: BaseException) -> bool:
    """Whether a call among ranks ended with `error` because another of them has gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


# Words of the plain errors that a collective call ends with then.
_LOST = ("gloo", "Gloo", "NCCL", "Connection closed by peer")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that is sharded over the ranks; any other as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def spread_rows(rows: int) -> Spread:
    """How a batch with so many rows here is spread; told from host to host, so that no device is waited for."""
    ranks = Ranks()
    sizes = ranks.gather_numbers(torch.tensor([rows]))
    return Spread(tuple(sizes[:, 0].tolist()), ranks.rank)


class _GatherRows(torch.autograd.Function):
    """`Spread.gather`: every rank sends as many rows as the fullest has, and what is padding is left out again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        longest = max(spread.sizes)
        sent = rows.new_zeros(longest, *rows.shape[1:])
        sent[: rows.shape[0]] = rows
        received = rows.new_empty(len(spread.sizes) * longest, *rows.shape[1:])
        # Gloo and NCCL know no bool.
        as_bytes = rows.dtype == torch.bool
        _all_gather(received.view(torch.uint8) if as_bytes else received, sent.view(torch.uint8) if as_bytes else sent)
        return torch.cat([part[:size] for part, size in zip(received.split(longest), spread.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        spread: Spread = ctx.spread
        longest = max(spread.sizes)
        sent = gradients[0].new_zeros(len(spread.sizes) * longest, *gradients[0].shape[1:])
        for place, part in zip(sent.split(longest), gradients[0].split(list(spread.sizes)), strict=True):
            place[: part.shape[0]] = part
        received = gradients[0].new_empty(longest, *gradients[0].shape[1:])
        _reduce_scatter(received, sent)
        return received[: spread.sizes[spread.rank]], None
