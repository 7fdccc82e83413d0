"""Where a model runs and in which precision: device, autocast, and the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tercet.errors import TercetError


@dataclass(frozen=True)
class DeviceSpec:
    """A device and the precision of a forward pass on it, `fp32` or `bf16`."""

    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        return autocast(self.device, self.precision)


def resolve_device(device: str = "auto", precision: str = "auto") -> DeviceSpec:
    """The device and precision of these names; `auto` takes CUDA where there is one, and the faster precision.

    Raises:
        TercetError: CUDA is asked for and there is none.
    """
    cuda = torch.device("cuda", torch.cuda.current_device()) if wants_cuda(device) else None
    found = cuda or torch.device("cpu")
    return DeviceSpec(found, resolve_precision(found, precision))


def wants_cuda(device: str) -> bool:
    """Whether `auto`, `cpu` or `cuda` means CUDA on this machine.

    Raises:
        TercetError: CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TercetError("train.device is cuda and this machine has none; set train.device to auto or cpu")
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def resolve_precision(device: torch.device, wanted: str) -> str:
    """`fp32` or `bf16`: `wanted`, or for `auto` the faster one on the device."""
    if wanted != "auto":
        return wanted
    return "bf16" if native_bf16(device) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on a device: CUDA from compute capability 8.0, and processors with AMX tiles.

    AVX512-BF16 without AMX does not count: its matrix products were measured at 0.6 times the rate of fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass in `fp32` or `bf16`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def cosines(rows: Tensor, feats: Tensor) -> Tensor:
    """Cosines of unit vectors, in their own precision under autocast too: bf16 would tie what fp32 ranks.

    Args:
        rows: `[rows, embed_dim]`.
        feats: `[points, embed_dim]`.

    Returns:
        `[rows, points]`.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ feats.T


def machine_name(device: torch.device) -> str:
    """Processor or GPU, and the version of PyTorch, as reports and results name them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"
    return f"{name}, PyTorch {torch.__version__}"


def processor_name() -> str:
    """The processor's name as Linux reports it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# glibc's mallopt parameters (malloc.h), and what they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


@functools.cache
def tune_malloc() -> bool:
    """Make the C library keep freed memory for the next step instead of returning it to the system.

    A step on a CPU frees and allocates the same gigabytes again; each page that was returned is zeroed and mapped
    again.  Holds for the whole process.  The same from outside: `MALLOC_TRIM_THRESHOLD_`, `MALLOC_TOP_PAD_` and
    `MALLOC_MMAP_MAX_=0`.

    Returns:
        Whether it took effect: on Linux with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _TOP_PAD_BYTES))
    return min(mallopt(parameter, value) for parameter, value in settings) == 1
