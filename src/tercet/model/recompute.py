"""Layers that keep no activations for the backward pass but compute them again in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LayerStack(nn.Module):
    """An encoder made of layers, which may be computed again in the backward pass.

    Attributes:
        recomputes: keep each layer's input alone for the backward pass and compute the layer again there.  Values,
            gradients and random draws are the same; memory is less, and the forward pass of the layers is paid twice.
    """

    recomputes: bool = False

    def run(self, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`layer`, or a part of one, of `inputs`."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def recompute_layers(model: nn.Module, wanted: bool = True) -> None:
    """Set what every encoder within `model` does; see `LayerStack`."""
    for part in model.modules():
        if isinstance(part, LayerStack):
            part.recomputes = wanted
