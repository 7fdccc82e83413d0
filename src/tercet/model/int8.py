"""Encoders whose linear maps run in int8 on a CPU: faster to encode large collections with, a little less exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.errors import TercetError
from tercet.model.layers import Linear
from tercet.model.tercet import Tercet

LARGEST = 127
TINY = torch.finfo(torch.float32).tiny * LARGEST


class Int8Linear(nn.Module):
    """A linear map with int8 weights, scaled by output channel; every token it reads is scaled and rounded to int8.

    It has no parameters: it can be neither trained nor saved.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(TINY) / LARGEST
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        # Laid out as the product reads it.
        self.register_buffer("weight", rounded.t().contiguous(), persistent=False)
        self.register_buffer("weight_scale", scale, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        flat = input.reshape(-1, input.shape[-1])
        scale = flat.abs().amax(dim=1, keepdim=True).clamp_min_(TINY) / LARGEST
        rounded = (flat / scale).round_().to(torch.int8)
        product = torch._int_mm(rounded, self.weight)  # pyright: ignore[reportPrivateImportUsage]
        output = product.float().mul_(scale).mul_(self.weight_scale)
        if self.bias is not None:
            output.add_(self.bias)
        return output.unflatten(0, input.shape[:-1])

    def gelu(self, input: Tensor) -> Tensor:
        """The same with an exact GELU behind it."""
        return F.gelu(self(input))


def quantise_encoders(model: Tercet) -> int:
    """Put int8 in place of the linear maps of image encoder and text encoder; the fusion encoder stays as it is.

    Returns:
        How many linear maps there were.

    Raises:
        TercetError: the model is not on a CPU.
    """
    if model.temperature.device.type != "cpu":
        raise TercetError("int8 encoders run on a CPU alone; set train.device cpu, or evaluate.int8 false")
    return _replace(model.vision) + _replace(model.text)


def _replace(module: nn.Module) -> int:
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, Linear):
            setattr(module, name, Int8Linear(child))
            count += 1
        else:
            count += _replace(child)
    return count
