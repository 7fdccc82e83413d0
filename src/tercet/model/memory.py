"""What fusion layers read of images: keys and values, or the image tokens where few text tokens read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.model.attention import AttentionTap, attention, attention_weights
from tercet.model.dropout import drop


def take_images(heads: Tensor, index: Tensor) -> Tensor:
    """The images that `index` `[chosen]` names, of `[images, heads, image_tokens, head_width]`."""
    return heads.index_select(0, index) if heads.device.type == "cpu" else _TakeImages.apply(heads, index)


class _TakeImages(torch.autograd.Function):
    """`index_select` whose gradient is a matrix product.

    An image that several chose takes the sum of their gradients.  PyTorch adds them up in bf16 by atomic operations, in
    any order; the product adds in fp32, gives the same bits every time and took a sixth of the time on an H200.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.images = heads.shape[0]
        # By tokens, as a GPU's keys and values lie in memory.
        return heads.transpose(1, 2).index_select(0, index).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        by_token = gradients[0].transpose(1, 2)
        chose = torch.arange(ctx.images, device=index.device)[:, None] == index[None, :]
        summed = chose.to(by_token.dtype) @ by_token.flatten(1)
        return summed.view(ctx.images, *by_token.shape[1:]).transpose(1, 2), None


class ImageMemory:
    """Keys and values of the fusion layers for a set of images, computed once and read by every pass.

    They depend on the image alone, so the matched pass, the unmatched passes, the masked pass and every re-ranked
    caption share them.  Consecutive pairs share an image: with `images` images and `pairs` pairs, pair `p` reads
    image `p // (pairs // images)`.

    Attributes:
        keys_values: for each fusion layer, keys and values `[images, heads, image_tokens, head_width]`.
        mask: bool `[images, 1, 1, image_tokens]`, True where a token may be looked at; None: everywhere.
    """

    def __init__(self, keys_values: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None = None) -> None:
        self.keys_values = list(keys_values)
        self.mask = mask

    def __len__(self) -> int:
        return self.keys_values[0][0].shape[0]

    def select(self, index: Tensor) -> ImageMemory:
        """The images that `index` `[images]` names, in that order."""
        mask = None if self.mask is None else self.mask.index_select(0, index)
        return ImageMemory(
            [(take_images(key, index), take_images(value, index)) for key, value in self.keys_values], mask
        )

    def detach(self) -> ImageMemory:
        """The same memory without its graph."""
        return ImageMemory([(key.detach(), value.detach()) for key, value in self.keys_values], self.mask)

    def attend(self, layer: int, query: Tensor, dropout: float, tap: AttentionTap | None) -> Tensor:
        """Attend from pairs to their images.

        Args:
            layer: index of the fusion layer.
            query: `[pairs, heads, queries, head_width]`.
            dropout: probability of dropping an attention weight.
            tap: where to keep the weights.

        Returns:
            `[pairs, heads, queries, head_width]`.
        """
        key, value = self.keys_values[layer]
        images, (pairs, heads, queries, head_width) = key.shape[0], query.shape
        if pairs == images:
            return attention(query, key, value, self.mask, dropout, tap)
        group = pairs // images
        # Queries do not see one another here, so the pairs of an image are one long query and nothing is copied.
        folded = query.unflatten(0, (images, group)).transpose(1, 2).flatten(2, 3)
        folded = attention(folded, key, value, self.mask, dropout, tap)
        return folded.unflatten(2, (group, queries)).transpose(1, 2).reshape(pairs, heads, queries, head_width)


class JoinedMemory(ImageMemory):
    """Several memories behind one another, so that their pairs go through the fusion layers as one batch.

    Attributes:
        parts: the memories and the number of pairs that read each.
    """

    def __init__(self, parts: Sequence[tuple[ImageMemory, int]]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(len(memory) for memory, _ in self.parts)

    def select(self, index: Tensor) -> ImageMemory:
        """Not offered: select from a part before joining."""
        raise TypeError("select from a part of a joined memory, not from the whole")

    def detach(self) -> ImageMemory:
        """The same memories without their graph."""
        return JoinedMemory([(memory.detach(), pairs) for memory, pairs in self.parts])

    def attend(self, layer: int, query: Tensor, dropout: float, tap: AttentionTap | None) -> Tensor:
        """As `ImageMemory.attend`, part by part."""
        pieces = query.split([pairs for _, pairs in self.parts])
        attended = [
            memory.attend(layer, piece, dropout, tap) for (memory, _), piece in zip(self.parts, pieces, strict=True)
        ]
        return torch.cat(attended)


class LeanMemory(ImageMemory):
    """Keys and values for the first layers, and the image tokens themselves for the others, where so few text tokens
    read them that projecting every image token would cost more.

    A logit is `q . (K x) = (K' q) . x`, and a value `sum p (V x) = V (sum p x)`: the matrices can act on the few text
    tokens instead of the many image tokens.  The bias of the keys adds the same to all logits of a query, which the
    softmax takes out again.

    Attributes:
        image_embeds: `[images, image_tokens, image_width]`.
        key_values: for each of the other layers the weight `[2 * width, image_width]` and bias `[2 * width]`.
    """

    def __init__(
        self,
        image_embeds: Tensor,
        keys_values: Sequence[tuple[Tensor, Tensor]],
        key_values: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(keys_values)
        self.image_embeds = image_embeds
        self.key_values = list(key_values)

    def __len__(self) -> int:
        return self.image_embeds.shape[0]

    def select(self, index: Tensor) -> LeanMemory:
        """The images that `index` `[images]` names, in that order."""
        projected = super().select(index).keys_values
        return LeanMemory(self.image_embeds.index_select(0, index), projected, self.key_values)

    def detach(self) -> LeanMemory:
        """The same memory without its graph."""
        return LeanMemory(
            self.image_embeds.detach(),
            super().detach().keys_values,
            [(weight.detach(), bias.detach()) for weight, bias in self.key_values],
        )

    def attend(self, layer: int, query: Tensor, dropout: float, tap: AttentionTap | None) -> Tensor:
        """As `ImageMemory.attend`."""
        if layer < len(self.keys_values):
            return super().attend(layer, query, dropout, tap)
        weight, bias = self.key_values[layer - len(self.keys_values)]
        pairs, heads, queries, head_width = query.shape
        images, image_tokens, _ = self.image_embeds.shape
        key_weight, value_weight = weight.unflatten(0, (2, heads, head_width)).unbind(0)
        # [heads, pairs * queries, image_width], then every head of every pair as one more reader of the image.
        asked = (query.transpose(0, 1).flatten(1, 2) * head_width**-0.5) @ key_weight
        asked = asked.unflatten(1, (images, -1)).transpose(0, 1).flatten(1, 2)
        weights = attention_weights(asked, self.image_embeds)
        if tap is not None:
            tap.weights = weights.view(images, heads, -1, image_tokens)
        weights = drop(weights, dropout)
        seen = (weights @ self.image_embeds).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        # Dropped weights no longer sum to 1, so that the bias has to be weighed as well.
        mass = weights.sum(dim=-1).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1).unsqueeze(-1)
        values = seen @ value_weight.transpose(1, 2) + mass * bias.unflatten(0, (2, heads, 1, head_width))[1]
        return values.unflatten(1, (pairs, queries)).transpose(0, 1)
