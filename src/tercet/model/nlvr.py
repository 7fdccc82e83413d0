"""Fusion of a sentence with two images: every fusion layer is followed by a second one that reads the second image.

The two layers of a pair share the keys and values of their cross-attention: those of the first make the memory of
both images (arXiv 2107.07651, section 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tercet.config import TextConfig
from tercet.model.layers import TextLayer
from tercet.model.memory import ImageMemory
from tercet.model.text import class_rows, initialise_bert, key_mask

if TYPE_CHECKING:
    from tercet.model.tercet import Tercet

STATEMENT_CLASSES = 2  # false, true
ASSIGNMENT_CLASSES = 3  # the first image matches, the second, neither


class SecondFusion(nn.Module):
    """The second layers of the pairs."""

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TextLayer(config.width, config.heads, config.mlp_width, config.dropout, image_width)
            for _ in range(config.depth - config.fusion_layer)
        )
        for layer in self.layers:
            assert isinstance(layer, TextLayer)
            del layer.cross_attention.key_value  # the first layer of the pair makes them for both
        self.apply(initialise_bert(config.width))

    @torch.no_grad()
    def start_from(self, model: Tercet) -> None:
        """Copy the fusion layers of `model`, as the published text-assignment model starts."""
        first = model.fusion.state_dict()
        self.load_state_dict({name: first[name] for name in self.state_dict()})


def fuse_two(
    model: Tercet,
    text_embeds: Tensor,
    attention_mask: Tensor,
    first: ImageMemory,
    second: ImageMemory,
    rows: Tensor | None = None,
) -> Tensor:
    """Fuse sentences with two images each.

    Args:
        model: with `second_fusion`.
        text_embeds: `[batch, tokens, width]` from the text encoder.
        attention_mask: `[batch, tokens]`.
        first: memory of the first image of each sentence, as `model.remember` gives it.
        second: memory of the second image, of the same kind.
        rows: `[batch, slots]` positions that the last layer computes; None computes all.

    Returns:
        `[batch, slots or tokens, width]`.
    """
    assert model.second_fusion is not None
    mask, hidden = key_mask(attention_mask), text_embeds
    last = len(model.fusion.layers) - 1
    for index, (one, other) in enumerate(zip(model.fusion.layers, model.second_fusion.layers, strict=True)):
        hidden = one(hidden, mask, first, index)
        hidden = other(hidden, mask, second, index, rows if index == last else None)
    return hidden


def fused_class(
    model: Tercet, text_embeds: Tensor, attention_mask: Tensor, first: ImageMemory, second: ImageMemory
) -> Tensor:
    """The fused `[CLS]` `[batch, width]` of `fuse_two`, which alone the last layer computes."""
    return fuse_two(model, text_embeds, attention_mask, first, second, class_rows(text_embeds))[:, 0]
