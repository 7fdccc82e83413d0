"""Whether a step fits the memory of its device, and what to pass where it does not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from tercet.config import Config
from tercet.device import DeviceSpec
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.train.memory import UNUSABLE, largest_batch
from tercet.train.plan import COUNTED_TASKS, foretold, share_of, with_less_memory

# How PyTorch says on a CPU that there is no memory; on CUDA it has an error of its own.
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory")


def tight(config: Config, placement: DeviceSpec) -> str | None:
    """What to tell before the first step of a run that may not fit; None where it does, or where nobody counted it.

    Every caption is taken to be as long as `data.max_tokens` allows, so that a run may fit all the same.
    """
    memory = _memory_of(placement.device)
    if memory is None or config.task not in COUNTED_TASKS or config.train.parallel != "ddp":
        return None
    devices, cuda, half = Ranks().world, placement.device.type == "cuda", placement.precision == "bf16"
    needed = sum(foretold(config, devices, half, cuda).values())
    if needed <= memory:
        return None
    most = largest_batch(
        config.model,
        config.objectives,
        config.data.max_tokens,
        half,
        config.train.grad_checkpointing,
        card=memory / (1 - UNUSABLE),
    )
    return (
        f"a step over {share_of(config, devices)} pairs needs up to about {needed / 2**30:.1f} GiB and there are "
        f"{memory / 2**30:.1f}; if the run ends for lack of memory, {with_less_memory(config, devices, most)}"
    )


@contextlib.contextmanager
def memory_told(config: Config) -> Iterator[None]:
    """Within, a lack of memory is one error that says what to pass.

    Raises:
        TercetError: there is not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        own = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not own and not any(words in str(error) for words in _NO_MEMORY):
            raise
        devices = Ranks().world
        mends = with_less_memory(config, devices)
        raise TercetError(
            f"not enough memory for a step over {share_of(config, devices)} pairs; {mends}; "
            "--dry-run tells what a step needs"
        ) from error


def _memory_of(device: torch.device) -> int | None:
    """Bytes of a card, or of this machine for each process that torchrun started on it; None where nobody tells."""
    if device.type == "cuda":
        return round(torch.cuda.get_device_properties(device).total_memory * (1 - UNUSABLE))
    if not hasattr(os, "sysconf"):
        return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
