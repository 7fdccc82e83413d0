"""Where a run computes, in which precision, and with which other processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tercet.config import TrainConfig
from tercet.errors import TercetError
from tercet.precision import autocast, precision_on
from tercet.ranks import Ranks, lost_rank
from tercet.train.meeting import fresh_store
from tercet.train.shards import reduce_whole, shard


@dataclass(frozen=True)
class Placement:
    """Device and precision of a run.

    Attributes:
        device: where model and batches lie.
        precision: `fp32`, or `bf16` for autocast.
    """

    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        return autocast(self.device, self.precision)


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """While open, this process is one of those that torchrun started; without torchrun it is alone.

    Args:
        device: `train.device`.

    Raises:
        TercetError: CUDA is asked for and there is none, or another process has gone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield
        return
    cuda = wants_cuda(device)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        # Gloo stands beside NCCL for what the hosts tell one another, so that no device is waited for.
        store, rank, world = fresh_store()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        yield
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        raise TercetError(
            f"another of the {world} processes is gone; see what it said ({str(error).splitlines()[0]})"
        ) from error
    else:
        _former_groups.append(dist.group.WORLD)
        dist.destroy_process_group()


# Kept to the end of the process: the last to let go of a group waits for its threads, and where that is the reducer
# of DDP it does so with the interpreter's lock, which those threads may want; such a run never ended.
_former_groups: list[object] = []


def wants_cuda(device: str) -> bool:
    """Whether `train.device` means CUDA here.

    Raises:
        TercetError: CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TercetError("train.device is cuda and this machine offers none; set train.device to auto or cpu")
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def place(config: TrainConfig) -> Placement:
    """Device and precision as the config asks, or as the machine offers.

    Raises:
        TercetError: CUDA is asked for and there is none.
    """
    cuda = wants_cuda(config.device)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Placement(device, precision_on(device, config.precision))


def train_together(task: nn.Module, parallel: str) -> nn.Module:
    """What to call instead of `task`, so that its gradients are the mean over the ranks; alone, `task` itself.

    Args:
        task: on its device, with what does not learn frozen.
        parallel: `ddp`, where each rank holds all of it, or `fsdp`; see `tercet.train.shards`.
    """
    if Ranks().world == 1:
        return task
    if parallel == "fsdp":
        return shard(task)
    # oneDNN lays out the gradients of convolutions in its own way; the copy into DDP's buckets costs next to nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)  # renamed in 2.13
        # The queues are buffers, equal on all ranks by themselves.
        return DistributedDataParallel(task, broadcast_buffers=False)


@contextlib.contextmanager
def summing(trained: nn.Module, last: bool) -> Iterator[None]:
    """Within: gradients of one of several batches of a step; the ranks exchange them once, with the `last`."""
    if isinstance(trained, DistributedDataParallel):
        with contextlib.nullcontext() if last else trained.no_sync():
            yield
        return
    if isinstance(trained, FSDPModule):
        trained.set_requires_gradient_sync(last)
    yield
    if isinstance(trained, FSDPModule) and last:
        reduce_whole(trained)


def machine_name(device: torch.device) -> str:
    """Processor or card, and the version of PyTorch, as reports and results name them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{_processor()}, {threads} thread{'s' * (threads > 1)}"
    return f"{name}, PyTorch {torch.__version__}"


def _processor() -> str:
    """The processor's name as Linux tells it; elsewhere what Python knows."""
    try:
        described = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        described = []
    named = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


# glibc's mallopt parameters (malloc.h), and what they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


@functools.cache
def keep_memory() -> bool:
    """Make the C library keep freed memory for the next step instead of giving it back to the system.

    A step on a CPU frees and asks for the same gigabytes again; each page that was given back is cleared and mapped
    anew.  Holds for the whole process.  The same from outside: `MALLOC_TRIM_THRESHOLD_`, `MALLOC_TOP_PAD_` and
    `MALLOC_MMAP_MAX_=0`.

    Returns:
        Whether it took effect: on Linux with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _TOP_PAD_BYTES))
    return min(mallopt(parameter, value) for parameter, value in settings) == 1
