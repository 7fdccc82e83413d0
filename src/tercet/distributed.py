"""The processes that train together: start, collectives, DDP and FSDP2.

A single process is a group of one on the same code path: without a process group every call returns its own values.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.nn.parallel import DistributedDataParallel

from tercet.device import wants_cuda
from tercet.errors import TercetError

Value = TypeVar("Value")

# Their names since PyTorch 2.13, which warns about the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """A group of processes that make the same calls in the same order.

    Attributes:
        rank: of this process, from 0.
        world: number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """The processes of `group`; None is all of them."""
        joined = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if joined else 0
        self.world = dist.get_world_size(group) if joined else 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def new_group(self) -> Ranks:
        """The same processes in a Gloo group of their own, for calls from another thread."""
        if self.world == 1:
            return self
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # an int on processes outside the group
        return Ranks(group)

    def gather(self, value: Value) -> list[Value]:
        """Any value of every rank, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_interleaved(self, values: list[Value]) -> list[Value]:
        """Values that were split as `all_values[rank::world]`, in the order of `all_values`."""
        rounds = itertools.zip_longest(*self.gather(values), fillvalue=_NOTHING)
        return [value for row in rounds for value in row if value is not _NOTHING]

    def broadcast(self, value: Value) -> Value:
        """The value of rank 0."""
        return self.gather(value)[0]

    def on_rank0(self, act: Callable[[], Value]) -> Value:
        """The result of `act`, which runs on rank 0 alone.

        Raises:
            TercetError: on every rank, what `act` raised.
        """
        value, failure = None, None
        if self.first:
            try:
                value = act()
            except TercetError as error:
                failure = str(error)
        value, failure = self.broadcast((value, failure))
        if failure is not None:
            raise TercetError(failure)
        return value  # pyright: ignore[reportReturnType] - rank 0's

    def gather_tensor(self, numbers: Tensor) -> Tensor:
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

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier(group=self.group)


_NOTHING: Any = object()


@dataclass(frozen=True)
class RankLayout:
    """How the rows of a batch are distributed over the ranks, those of rank 0 first.

    Attributes:
        sizes: rows on each rank.
        rank: of this process.
    """

    sizes: tuple[int, ...]
    rank: int = 0

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return sum(self.sizes)

    @property
    def mean(self) -> float:
        """Mean rows a rank.  Where each rank divides the sum of a loss over its rows by this, the mean over the ranks
        is the mean over all rows."""
        return self.total / len(self.sizes)

    @property
    def start(self) -> int:
        """Index in the whole batch of the first row of this rank."""
        return sum(self.sizes[: self.rank])

    @property
    def rows(self) -> slice:
        """The rows of the whole batch that are on this rank."""
        return slice(self.start, self.start + self.sizes[self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every rank `[total, ...]`, from those of this one `[size, ...]`; gradients flow back to the rank
        of each row, summed over the ranks that used it."""
        return rows if len(self.sizes) == 1 else _GatherRows.apply(rows, self)


def rank_layout(rows: int) -> RankLayout:
    """The layout of a batch with `rows` rows on this rank; exchanged over Gloo, which does not wait for a device."""
    ranks = Ranks()
    sizes = ranks.gather_tensor(torch.tensor([rows]))
    return RankLayout(tuple(sizes[:, 0].tolist()), ranks.rank)


class _GatherRows(torch.autograd.Function):
    """`RankLayout.gather`: every rank sends as many rows as the largest has, and the padding is dropped again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: RankLayout) -> Tensor:
        ctx.layout = layout
        longest = max(layout.sizes)
        sent = rows.new_zeros(longest, *rows.shape[1:])
        sent[: rows.shape[0]] = rows
        received = rows.new_empty(len(layout.sizes) * longest, *rows.shape[1:])
        # Gloo and NCCL have no bool.
        as_bytes = rows.dtype == torch.bool
        _all_gather(received.view(torch.uint8) if as_bytes else received, sent.view(torch.uint8) if as_bytes else sent)
        return torch.cat([part[:size] for part, size in zip(received.split(longest), layout.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layout: RankLayout = ctx.layout
        longest = max(layout.sizes)
        sent = gradients[0].new_zeros(len(layout.sizes) * longest, *gradients[0].shape[1:])
        for target, part in zip(sent.split(longest), gradients[0].split(list(layout.sizes)), strict=True):
            target[: part.shape[0]] = part
        received = gradients[0].new_empty(longest, *gradients[0].shape[1:])
        _reduce_scatter(received, sent)
        return received[: layout.sizes[layout.rank]], None


def lost_rank(error: BaseException) -> bool:
    """Whether a collective call failed with `error` because another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


# What the messages of the plain RuntimeErrors of such calls contain.
_LOST = ("gloo", "Gloo", "NCCL", "Connection closed by peer")


# --- start ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def init_distributed(device: str) -> Iterator[None]:
    """While open, this process is in the group of those that torchrun started; without torchrun it is alone.

    Args:
        device: `train.device`.

    Raises:
        TercetError: CUDA is asked for and there is none, or another process is gone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield
        return
    cuda = wants_cuda(device)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, world = fresh_store()
        # Gloo beside NCCL for values on the host, so that exchanging them does not wait for a device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
        yield
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        raise TercetError(
            f"another of the {world} processes is gone; see its output ({str(error).splitlines()[0]})"
        ) from error
    else:
        _closed_groups.append(dist.group.WORLD)
        dist.destroy_process_group()


# Kept to the end of the process: dropping the last reference to a group waits for its threads, and DDP's reducer does
# so while holding the GIL, which those threads may need.
_closed_groups: list[object] = []

POLL_SECONDS = 0.02


def fresh_store() -> tuple[Store, int, int]:
    """A store that only the processes of this start use, the rank of this one, and their number.

    torchrun keeps one store over all of its restarts, and PyTorch looks up the addresses of the other ranks in it
    whichever start they are of: a rank that restarts before another finds the address of the one that died, and its
    connection is refused.  torchrun's restart count does not help, since each machine counts its own.  So the ranks
    first agree on a prefix that no earlier start had.

    Raises:
        TercetError: not all processes connect.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    return PrefixStore(agree_on_prefix(store, rank, world), store), rank, world


def agree_on_prefix(store: Store, rank: int, world: int) -> str:
    """A name that every process of this start gets, and no earlier start had.

    Each publishes a token of its own.  Rank 0 keeps proposing the tokens that it finds, some of which may be of an
    earlier start; the others accept a proposal with their own token in it.  A proposal that all accept contains no
    token of an earlier start.

    Args:
        store: shared by all processes, and by those of earlier starts.
        rank: of this process.
        world: number of processes.

    Raises:
        TercetError: not all processes connect within the store's timeout.
    """
    store = PrefixStore("tercet/rendezvous", store)
    deadline = time.monotonic() + store.timeout.total_seconds()  # pyright: ignore[reportAttributeAccessIssue] - not in its stub
    own = uuid.uuid4().hex
    store.set(f"token/{rank}", own)
    missing = f"not all of the {world} processes connected; see their output"
    try:
        while time.monotonic() < deadline:
            if rank == 0:
                tokens = b",".join(store.get(f"token/{other}") for other in range(world))
                store.set("proposal", tokens.decode())
            else:
                tokens = store.get("proposal")
            name = hashlib.sha256(tokens).hexdigest()
            if own.encode() in tokens.split(b","):
                if rank == 0 and store.check([f"{name}/accepted/{other}" for other in range(1, world)]):
                    store.set(f"{name}/settled", "")
                    return name
                if rank != 0:
                    store.set(f"{name}/accepted/{rank}", "")
                    if store.check([f"{name}/settled"]):
                        return name
            time.sleep(POLL_SECONDS)
    except dist.DistError as error:
        raise TercetError(missing) from error
    raise TercetError(missing)


SHUTDOWN_SECONDS = 300  # for ranks to end their step and write a checkpoint after SIGTERM


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `tercet ARGUMENTS` as `processes` ranks of this machine under PyTorch's elastic agent, and wait for them.

    On a CPU each gets its share of the cores, unless OMP_NUM_THREADS is set.

    Returns:
        The exit status: 0, or that of the rank that failed first, which has printed why.

    Raises:
        TercetError: a rank was killed.
        KeyboardInterrupt: this process received a signal, and has passed it on to the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The agent would repeat at length what the failed rank has printed already.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tercet", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise TercetError(f"process {rank} of {processes} was killed by signal {-failure.exitcode}") from None
        return failure.exitcode
    except SignalException as stop:
        raise KeyboardInterrupt(f"stopped by {stop.sigval.name}") from None
    return 0


# --- DDP and FSDP2 ----------------------------------------------------------------------------------------------------

# Layers that are called one after the other and so are gathered one at a time.  The fusion layers are not among them:
# the keys and values of all of them are computed before the first one runs.
SHARDED_LAYERS = ("vision.blocks", "text.layers")


def wrap_parallel(task: nn.Module, parallel: str) -> nn.Module:
    """`task`, wrapped so that gradients are averaged over the ranks; unwrapped on a single rank.

    Args:
        task: on its device, equal on every rank, with what does not learn frozen.
        parallel: `ddp`, where each rank holds all of it, or `fsdp`, where each holds a shard of every parameter, of its
            gradient and of its moments.
    """
    if Ranks().world == 1:
        return task
    if parallel == "fsdp":
        return _shard(task)
    # oneDNN has its own layout for gradients of convolutions; copying them into DDP's buckets costs next to nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)  # renamed in 2.13
        # The queues are buffers that are equal on all ranks by construction.
        return DistributedDataParallel(task, broadcast_buffers=False)


def _shard(task: nn.Module) -> nn.Module:
    """FSDP2, in place: encoder layers of student and teacher are gathered one at a time, the rest once a step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(task.parameters()).device.type, (Ranks().world,))
    scalars = {parameter for parameter in task.parameters() if parameter.ndim == 0}  # cannot be sharded
    for name, part in task.named_modules():
        if isinstance(part, nn.ModuleList) and name.endswith(SHARDED_LAYERS):
            for layer in part:
                fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh, ignored_params=scalars)
    return task


@contextlib.contextmanager
def gradient_sync(trained: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of one of several accumulated batches; gradients are exchanged with the `last`."""
    sharded = hasattr(trained, "set_requires_gradient_sync")
    if isinstance(trained, DistributedDataParallel) and not last:
        with trained.no_sync():
            yield
        return
    if sharded:
        trained.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
    yield
    if sharded and last:
        # FSDP does not average the gradients of unsharded parameters.
        for parameter in trained.parameters():
            if parameter.grad is not None and not is_sharded(parameter):
                parameter.grad.copy_(Ranks().sum(parameter.grad) / Ranks().world)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a shard of the tensor only (a DTensor)."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]
