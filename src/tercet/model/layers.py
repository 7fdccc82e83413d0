"""Attention, MLP and the two kinds of transformer layer.  The only place that calls scaled dot-product attention."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tercet.model.dropout import drop
from tercet.model.linear import Linear, linear

EMBEDDING_DEVIATION = 0.02  # of ViT's and BERT's tables at the start, whatever the width
BASE_WIDTH = 768

# cuDNN's attention is the fastest for images and for a batch of texts that reads them, but it plans anew for every
# shape, which takes a third of a second.  Masked texts, and the few rows of a last layer, come in many.
PLANNED_QUERIES = 16
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def weight_deviation(width: int) -> float:
    """Standard deviation of the matrices of a stack at the start: 0.02 at the published width of 768, as published.

    A product's deviation grows with the square root of the width.  Narrow models get it back, so that their queries
    find their keys as soon as those of the base model do.
    """
    return EMBEDDING_DEVIATION * (BASE_WIDTH / width) ** 0.5


@dataclass
class AttentionTap:
    """Keeps the attention weights of one layer, with their graph, for heatmaps.

    Attributes:
        weights: softmax probabilities `[batch, heads, queries, keys]` of the last pass; None before it.
    """

    weights: Tensor | None = None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    tap: AttentionTap | None = None,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: `[batch, heads, queries, head_width]`.
        key: `[batch, heads, keys, head_width]`.
        value: `[batch, heads, keys, head_width]`.
        mask: bool, broadcastable to `[batch, heads, queries, keys]`; True where a query may look.
        dropout: probability of dropping an attention weight.
        tap: where to keep the weights; written out step by step then, since the fused kernels do not return them.

    Returns:
        `[batch, heads, queries, head_width]`.
    """
    # No fused CPU kernel drops weights; what PyTorch falls back to scales queries and keys apart and copies both.
    written_out = tap is not None or (dropout > 0 and query.device.type == "cpu")
    if not written_out:
        # An exported program must not learn how many queries there were.
        chooses = query.device.type == "cuda" and not torch.compiler.is_exporting()
        unplanned = chooses and (mask is not None or query.shape[2] < PLANNED_QUERIES)
        with sdpa_kernel(UNPLANNED) if unplanned else contextlib.nullcontext():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    weights = attention_weights(query * query.shape[-1] ** -0.5, key, mask)
    if tap is not None:
        tap.weights = weights
    return drop(weights, dropout) @ value


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the keys, `[..., queries, keys]`.

    Args:
        query: `[..., queries, head_width]`, already scaled.
        key: `[..., keys, head_width]`.
        mask: bool, broadcastable to the result; True where a query may look.
    """
    logits = query @ key.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1)


def split_heads(hidden: Tensor, heads: int) -> Tensor:
    """`[batch, tokens, width]` to `[batch, heads, tokens, head_width]`."""
    return hidden.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(hidden: Tensor) -> Tensor:
    """`[batch, heads, tokens, head_width]` to `[batch, tokens, width]`."""
    return hidden.transpose(1, 2).flatten(2)


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """The tokens that `rows` `[batch, slots]` names, of `hidden` `[batch, tokens, width]`: `[batch, slots, width]`."""
    return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


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


class TokenCache:
    """Keys and values of the tokens that a causal decoder has read, so that only the new ones are computed.

    Attributes:
        keys_values: for each layer, keys and values `[batch, heads, read_tokens, head_width]`.
    """

    def __init__(self, keys_values: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.keys_values = list(keys_values)

    def __len__(self) -> int:
        return self.keys_values[0][0].shape[2] if self.keys_values else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values of new tokens behind those of `layer`, and give all of them."""
        if layer == len(self.keys_values):
            self.keys_values.append((key, value))
        else:
            old_key, old_value = self.keys_values[layer]
            self.keys_values[layer] = (torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2))
        return self.keys_values[layer]

    def select(self, index: Tensor) -> TokenCache:
        """The texts that `index` `[batch]` names, in that order; what is read further leaves this one as it is."""
        return TokenCache(
            [(key.index_select(0, index), value.index_select(0, index)) for key, value in self.keys_values]
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width)
        self.output = Linear(width, width)
        self.tap: AttentionTap | None = None

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        queries: Tensor | None = None,
        cache: TokenCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend within `hidden`.

        Args:
            hidden: `[batch, tokens, width]`.
            mask: bool `[batch, 1, 1, tokens]`, True where a token may be looked at, or another for each query; with a
                cache, its last dimension counts the cached tokens too.
            queries: `[batch, slots, width]`, the rows to compute; None computes all of them.
            cache: tokens in front of `hidden` that may be looked at as well; `hidden` is added to it.
            layer: index of this layer in the cache.

        Returns:
            `[batch, slots or tokens, width]`.
        """
        if queries is None:
            query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        else:
            width = hidden.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = linear(queries, weight[:width], bias[:width])
            key, value = linear(hidden, weight[width:], bias[width:]).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        dropout = self.dropout if self.training else 0.0
        return self.output(merge_heads(attention(query, key, value, mask, dropout, self.tap)))


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


class CrossAttention(nn.Module):
    """Attention from text tokens to an image memory."""

    def __init__(self, width: int, image_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = Linear(width, width)
        self.key_value = Linear(image_width, 2 * width)
        self.output = Linear(width, width)
        self.tap: AttentionTap | None = None

    def remember(self, image_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[images, heads, image_tokens, head_width]` of `[images, image_tokens, image_width]`."""
        key_value = self.key_value(image_embeds)
        if key_value.device.type != "cpu":
            # The kernels of a GPU read heads that lie beside one another as fast.
            key, value = key_value.chunk(2, dim=-1)
            return split_heads(key, self.heads), split_heads(value, self.heads)
        # Laid out by heads once, instead of by every pass that reads it.
        split = key_value.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = split.contiguous().unbind(0)
        return key, value

    def attend(self, hidden: Tensor, memory: ImageMemory, layer: int) -> Tensor:
        """What `hidden` `[pairs, tokens, width]` finds in layer `layer` of `memory`, before `output` maps it.

        The result is `[pairs, heads, tokens, head_width]`."""
        query = split_heads(self.query(hidden), self.heads)
        return memory.attend(layer, query, self.dropout if self.training else 0.0, self.tap)


class Mlp(nn.Module):
    """Two linear maps around an exact (erf) GELU."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        return self.down(self.up.gelu(hidden))


class VisionBlock(nn.Module):
    """Pre-norm transformer block of the vision transformer."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, tokens, width]` to the same; `mask` as in `attention`."""
        hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        return hidden + self.mlp(self.mlp_norm(hidden))


class TextLayer(nn.Module):
    """Post-norm BERT layer; with `image_width`, a fusion layer that also reads an image memory."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, image_width: int | None = None) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention = SelfAttention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        if image_width is not None:
            self.cross_attention = CrossAttention(width, image_width, heads, dropout)
            self.cross_norm = nn.LayerNorm(width, eps=1e-12)
        self.mlp = Mlp(width, mlp_width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        memory: ImageMemory | None = None,
        layer: int = 0,
        rows: Tensor | None = None,
        cache: TokenCache | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            hidden: `[batch, tokens, width]`.
            mask: bool `[batch, 1, 1, tokens]`, or `[batch, 1, tokens, tokens]` for a causal decoder.
            memory: image memory that a fusion layer reads.
            layer: index of this layer in memory and cache.
            rows: `[batch, slots]` positions to compute; None computes all.
            cache: tokens that this causal decoder layer has read before `hidden`, which is added to it.

        Returns:
            `[batch, slots or tokens, width]`.
        """
        return self.read_image(self.read_text(hidden, mask, rows, cache, layer), memory, layer)

    def read_text(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        rows: Tensor | None = None,
        cache: TokenCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """The first part of the layer, which no image enters: `[batch, tokens, width]` to
        `[batch, slots or tokens, width]`; see `forward`."""
        queries = None if rows is None else take_rows(hidden, rows)
        residual = hidden if queries is None else queries
        return self.attention_norm(residual + self._drop(self.attention(hidden, mask, queries, cache, layer)))

    def read_image(self, hidden: Tensor, memory: ImageMemory | None, layer: int) -> Tensor:
        """The rest of the layer: `[pairs, slots, width]` to the same; see `forward`."""
        if memory is None:
            return self.think(hidden)
        return self.take_in(hidden, self.cross_attention.attend(hidden, memory, layer))

    def take_in(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What cross-attention found, `[pairs, heads, slots, head_width]`, and the MLP behind it.

        `hidden` is `[pairs, slots, width]`, as the result is."""
        return self.think(self.cross_norm(hidden + self._drop(self.cross_attention.output(merge_heads(attended)))))

    def think(self, hidden: Tensor) -> Tensor:
        """The MLP, the end of the layer: `[pairs, slots, width]` to the same."""
        return self.mlp_norm(hidden + self._drop(self.mlp(hidden)))

    def _drop(self, hidden: Tensor) -> Tensor:
        return drop(hidden, self.dropout, self.training)
