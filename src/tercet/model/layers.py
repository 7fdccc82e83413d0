"""Self- and cross-attention with their matrices, the MLP, and the two kinds of transformer layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tercet.model.attention import AttentionTap, attention, merge_heads, split_heads
from tercet.model.dropout import drop
from tercet.model.linear import Linear, linear
from tercet.model.memory import ImageMemory

EMBEDDING_DEVIATION = 0.02  # of ViT's and BERT's tables at the start, whatever the width
BASE_WIDTH = 768


def weight_deviation(width: int) -> float:
    """Standard deviation of the matrices of a stack at the start: 0.02 at the published width of 768, as published.

    A product's deviation grows with the square root of the width.  Narrow models get it back, so that their queries
    find their keys as soon as those of the base model do.
    """
    return EMBEDDING_DEVIATION * (BASE_WIDTH / width) ** 0.5


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """The tokens that `rows` `[batch, slots]` names, of `hidden` `[batch, tokens, width]`: `[batch, slots, width]`."""
    return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


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
