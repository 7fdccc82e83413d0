"""Linear maps, on a CPU by the library whose products are faster there."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Multiplications below which starting the other library's kernel costs more than it saves.
LEAST_WORK = 1 << 24


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose large fp32 products on a CPU go to the faster of two libraries.

    PyTorch gives them to MKL, in front of which it copies the bias into the result.  oneDNN adds it while it writes
    the result, and GELU with it.  On a processor with AVX-512 that is not Intel's, oneDNN's products took 4 to 20 %
    less time; on Intel's own, up to twice as long (`docs/performance.md`), and all is left to MKL.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return linear(input, self.weight, self.bias)

    def gelu(self, input: Tensor) -> Tensor:
        """The same with an exact (erf) GELU behind it, by oneDNN in one pass where no gradient is asked for."""
        if not torch.is_grad_enabled() and _suits(input, self.weight):
            return _product(input, self.weight, self.bias, "gelu")
        return F.gelu(self(input))


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that is faster: for large products on a processor not of Intel's.

    Args:
        hidden: `[..., in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]`.

    Returns:
        `[..., out_features]`.
    """
    if not _suits(hidden, weight):
        return F.linear(hidden, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(hidden, weight, bias)
    return _product(hidden, weight, bias)


@functools.cache
def is_intel() -> bool:
    """Whether the processor is Intel's, for which MKL has its fastest kernels."""
    information = Path("/proc/cpuinfo")
    told = information.read_text("utf-8") if information.is_file() else platform.processor()
    return "GenuineIntel" in told


def _suits(hidden: Tensor, weight: Tensor) -> bool:
    return (
        # First, so that a graph that is traced for any size learns nothing of a size.
        not torch.compiler.is_compiling()
        and hidden.dtype == weight.dtype == torch.float32
        and hidden.device.type == "cpu"
        and hidden.numel() * weight.shape[0] >= LEAST_WORK
        and not torch.is_autocast_enabled("cpu")
        and type(weight) in (Tensor, nn.Parameter)
        and type(hidden) is Tensor
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and not is_intel()
    )


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    # What torch.compile itself emits for a linear map on a CPU; it has no name in torch.nn.functional.
    algorithm = "none" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, activation, [], algorithm)


class _Linear(torch.autograd.Function):
    """A linear map and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return _product(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        hidden, weight = ctx.saved_tensors
        of_hidden = of_weight = of_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            of_hidden = _product(flat, weight.t()).view_as(hidden)
        if ctx.needs_input_grad[1]:
            of_weight = _product(flat.t(), hidden.reshape(-1, hidden.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(dim=0)
        return of_hidden, of_weight, of_bias
