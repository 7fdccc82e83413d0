"""Where a run computes, and in which precision."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from tercet.config import TrainConfig
from tercet.errors import TercetError


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
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def place(config: TrainConfig) -> Placement:
    """Device and precision as the config asks, or as the machine offers.

    Raises:
        TercetError: CUDA is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise TercetError("train.device is cuda and this machine offers none; set train.device to auto or cpu")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    return Placement(device, precision)


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on a device: CUDA from compute capability 8.0, and processors with AMX tiles.

    AVX512-BF16 without AMX does not count: its matrix products were measured at 0.6 times the rate of fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def machine_name(device: torch.device) -> str:
    """Processor or card, and the version of PyTorch, as reports and results name them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
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
