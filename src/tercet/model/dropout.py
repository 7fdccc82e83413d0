"""Dropout that does not hold up a step on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# A draw is one of so many levels; 16 bits put the probability within 8e-6 of the one asked for.
LEVELS = 1 << 16


def drop(hidden: Tensor, probability: float, training: bool = True) -> Tensor:
    """Set elements to 0 with a probability and scale the others, so that the expectation stays.

    PyTorch draws a mask on the CPU element by element in one thread, which took 2 % of a base-size step and 14 % of a
    tiny one.  Here four elements share the 64 bits of a draw.  The draw follows `torch.manual_seed`.

    Args:
        hidden: any shape.
        probability: of each element, from 0 to below 1.
        training: False changes nothing.
    """
    if not training or probability == 0.0:
        return hidden
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(hidden, probability)
    return _Drop.apply(hidden, round(probability * LEVELS))


def draw_kept(shape: torch.Size, dropped_levels: int) -> Tensor:
    """fp32 of a shape, 0 with probability `dropped_levels / LEVELS` each and else 1.

    Floats, since PyTorch neither makes nor multiplies by bools with vector instructions: they took twice as long.
    """
    whole, part = torch.iinfo(torch.int64), torch.iinfo(torch.int16)
    count, lanes = shape.numel(), whole.bits // part.bits
    bits = torch.empty(-(-count // lanes), dtype=torch.int64).random_(whole.min, None)
    return bits.view(torch.int16)[:count].view(shape).float().ge_(part.min + dropped_levels)


class _Drop(torch.autograd.Function):
    """Dropout of `dropped_levels` of `LEVELS`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dropped_levels: int) -> Tensor:
        kept = draw_kept(hidden.shape, dropped_levels).to(hidden.dtype)
        ctx.save_for_backward(kept)
        # The share that is truly kept, so that rounding to a level does not move the mean.
        ctx.scale = LEVELS / (LEVELS - dropped_levels)
        return (hidden * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradients[0] * kept).mul_(ctx.scale), None
