"""The precision of a forward pass: fp32, or bf16 by autocast where a device has it natively."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on a device: CUDA from compute capability 8.0, and processors with AMX tiles.

    AVX512-BF16 without AMX does not count: its matrix products were measured at 0.6 times the rate of fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def precision_on(device: torch.device, wanted: str) -> str:
    """`fp32` or `bf16`: what `wanted` says, or for `auto` what the device is faster at."""
    if wanted != "auto":
        return wanted
    return "bf16" if native_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass in `fp32` or `bf16`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def cosines(rows: Tensor, feats: Tensor) -> Tensor:
    """Cosines of unit vectors, in their own precision within autocast too: bf16 would tie what fp32 ranks.

    Args:
        rows: `[rows, embed_dim]`.
        feats: `[points, embed_dim]`.

    Returns:
        `[rows, points]`.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ feats.T
