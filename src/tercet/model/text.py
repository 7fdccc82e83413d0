"""The text encoder and the fusion encoder: the lower and the upper layers of a BERT stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import TextConfig, VisionConfig
from tercet.errors import TercetError
from tercet.model.layers import (
    EMBEDDING_STD,
    AttentionTap,
    Encoder,
    Linear,
    Mlp,
    SelfAttention,
    TokenCache,
    attention,
    init_std,
    merge_heads,
    split_heads,
    take_rows,
)


class CrossAttentionKV:
    """Keys and values of every fusion layer for a set of images, computed once and read by every pass.

    They depend on the image alone, so that the matched, unmatched and masked passes and every re-ranked caption share
    them.  Consecutive pairs share an image: with `images` images and `pairs` pairs, pair `p` reads image
    `p // (pairs // images)`.

    Attributes:
        keys_values: for each fusion layer, keys and values `[images, heads, image_tokens, head_width]`.
        mask: bool `[images, 1, 1, image_tokens]`, True where a token may be attended to; None: everywhere.
    """

    def __init__(self, keys_values: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None = None) -> None:
        self.keys_values = list(keys_values)
        self.mask = mask

    def __len__(self) -> int:
        return self.keys_values[0][0].shape[0]

    def select(self, index: Tensor) -> CrossAttentionKV:
        """Those of the images at `index` `[chosen]`, in that order."""
        mask = None if self.mask is None else self.mask.index_select(0, index)
        return CrossAttentionKV(
            [(_select_images(key, index), _select_images(value, index)) for key, value in self.keys_values], mask
        )

    def attend(self, layer: int, query: Tensor, dropout: float = 0.0, tap: AttentionTap | None = None) -> Tensor:
        """Attend from pairs to their images in fusion layer `layer`.

        `query` is `[pairs, heads, queries, head_width]`, as the result is.
        """
        key, value = self.keys_values[layer]
        images, pairs = key.shape[0], query.shape[0]
        if pairs == images:
            return attention(query, key, value, self.mask, dropout, tap)
        # Queries do not see one another here, so the pairs of an image are one long query and nothing is copied.
        folded = query.unflatten(0, (images, pairs // images)).transpose(1, 2).flatten(2, 3)
        folded = attention(folded, key, value, self.mask, dropout, tap)
        return folded.unflatten(2, (pairs // images, -1)).transpose(1, 2).flatten(0, 1)


class JoinedKV:
    """Several `CrossAttentionKV`, concatenated so that their pairs go through the fusion layers as one batch.

    Attributes:
        parts: each with the number of pairs that read it.
    """

    def __init__(self, parts: Sequence[tuple[CrossAttentionKV, int]]) -> None:
        self.parts = list(parts)

    def attend(self, layer: int, query: Tensor, dropout: float = 0.0, tap: AttentionTap | None = None) -> Tensor:
        """As `CrossAttentionKV.attend`, part by part; `tap` keeps the weights of the last part."""
        queries = query.split([pairs for _, pairs in self.parts])
        parts = zip(self.parts, queries, strict=True)
        return torch.cat([kv.attend(layer, own, dropout, tap) for (kv, _), own in parts])


def _select_images(heads: Tensor, index: Tensor) -> Tensor:
    """The images at `index` `[chosen]` of `[images, heads, image_tokens, head_width]`."""
    if heads.device.type == "cpu" or not heads.requires_grad:
        return heads.index_select(0, index)
    # The gradient of index_select on a GPU adds up by atomic operations, in bf16 and in any order; that of a product
    # is the same bits every time.
    one_hot = index[:, None] == torch.arange(heads.shape[0], device=index.device)
    by_token = heads.transpose(1, 2)  # as the projection leaves them
    chosen = one_hot.to(heads.dtype) @ by_token.flatten(1)
    return chosen.view(-1, *by_token.shape[1:]).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention from text tokens to images, whose keys and values are projected beforehand."""

    def __init__(self, width: int, image_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = Linear(width, width)
        self.key_value = Linear(image_width, 2 * width)
        self.output = Linear(width, width)
        self.tap: AttentionTap | None = None

    def project_kv(self, image_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[images, heads, image_tokens, head_width]` of `[images, image_tokens, image_width]`."""
        key_value = self.key_value(image_embeds).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if key_value.device.type == "cpu":
            key_value = key_value.contiguous()  # laid out by heads once, instead of by every pass that reads it
        key, value = key_value.unbind(0)
        return key, value

    def forward(self, hidden: Tensor, kv: CrossAttentionKV | JoinedKV, layer: int) -> Tensor:
        """What `hidden` `[pairs, tokens, width]` reads in layer `layer` of `kv`: the same shape, before `output`."""
        query = split_heads(self.query(hidden), self.heads)
        return merge_heads(kv.attend(layer, query, self.dropout if self.training else 0.0, self.tap))


class TextLayer(nn.Module):
    """Post-norm BERT layer; with `image_width`, a fusion layer with cross-attention to images."""

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
        kv: CrossAttentionKV | JoinedKV | None = None,
        layer: int = 0,
        rows: Tensor | None = None,
        cache: TokenCache | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            hidden: `[batch, tokens, width]`.
            mask: bool `[batch, 1, 1, tokens]`, or `[batch, 1, tokens, tokens]` for a causal decoder.
            kv: keys and values of the images that a fusion layer reads.
            layer: index of this layer in `kv` and `cache`.
            rows: `[batch, slots]` positions to compute; None computes all.
            cache: tokens that this causal decoder layer has read before `hidden`, which is added to it.

        Returns:
            `[batch, slots or tokens, width]`.
        """
        hidden = self.self_attend(hidden, mask, rows, cache, layer)
        attended = None if kv is None else self.cross_attention(hidden, kv, layer)
        return self.feed_forward(hidden, attended)

    def self_attend(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        rows: Tensor | None = None,
        cache: TokenCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """`[batch, tokens, width]` to `[batch, slots or tokens, width]`; see `forward`."""
        queries = None if rows is None else take_rows(hidden, rows)
        residual = hidden if queries is None else queries
        return self.attention_norm(residual + self._drop(self.attention(hidden, mask, queries, cache, layer)))

    def feed_forward(self, hidden: Tensor, attended: Tensor | None = None) -> Tensor:
        """The rest of the layer: what cross-attention `attended` to, and the MLP; `[batch, tokens, width]` all."""
        if attended is not None:
            hidden = self.cross_norm(hidden + self._drop(self.cross_attention.output(attended)))
        return self.mlp_norm(hidden + self._drop(self.mlp(hidden)))

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.training)


class TextEncoder(Encoder):
    """Embeddings and the lower layers of the stack."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.width
        self.pool = config.pool
        self.dropout = config.dropout
        self.word_embed = nn.Embedding(config.vocabulary_size, width, padding_idx=config.pad_id)
        self.position_embed = nn.Embedding(config.max_positions, width)
        self.type_embed = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            TextLayer(width, config.heads, config.mlp_width, config.dropout) for _ in range(config.fusion_layer)
        )
        self.apply(init_bert(width))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: `[batch, tokens]`; `[CLS]` first.
            attention_mask: `[batch, tokens]`, true where a token is real.

        Returns:
            `text_embeds` `[batch, tokens, width]`.

        Raises:
            TercetError: the texts are longer than the position table.
        """
        tokens = input_ids.shape[1]
        if tokens > self.position_embed.num_embeddings:
            raise TercetError(
                f"a text of {tokens} tokens is longer than the model's {self.position_embed.num_embeddings} positions; "
                "lower data.max_tokens or raise model.text.max_positions"
            )
        # Token types are all 0 in this method; the table stays for BERT checkpoints.
        fixed = self.position_embed.weight[:tokens] + self.type_embed.weight[0]
        hidden = self.norm(self.word_embed(input_ids) + fixed)
        hidden = F.dropout(hidden, self.dropout, self.training)
        mask = key_mask(attention_mask)
        for layer in self.layers:
            hidden = self.run(layer, hidden, mask)
        if self.pool == "mean":
            real = attention_mask[:, :, None].to(hidden.dtype)
            mean = (hidden * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
            hidden = torch.cat([mean, hidden[:, 1:]], dim=1)
        return hidden


class FusionEncoder(Encoder):
    """The upper layers of the stack, each with cross-attention from the text to an image."""

    def __init__(self, config: TextConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.first_fused = vision.first_fused
        self.layers = nn.ModuleList(
            TextLayer(config.width, config.heads, config.mlp_width, config.dropout, vision.width)
            for _ in range(config.depth - config.fusion_layer)
        )
        self.apply(init_bert(config.width))

    def project_kv(self, image_embeds: Tensor) -> CrossAttentionKV:
        """Keys and values of every layer for `image_embeds` `[images, 1 + patches, image_width]`."""
        return project_kv(self.layers, image_embeds[:, self.first_fused :])

    def forward(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        kv: CrossAttentionKV | JoinedKV,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Fuse texts with images.

        Args:
            text_embeds: `[pairs, tokens, width]` from the text encoder.
            attention_mask: `[pairs, tokens]`.
            kv: of the images; see `CrossAttentionKV` for which pair reads which image.
            rows: `[pairs, slots]` positions that the last layer computes; None computes all.

        Returns:
            `[pairs, slots or tokens, width]`.
        """
        return self.last(self.lower(text_embeds, attention_mask, kv), attention_mask, kv, rows)

    def lower(self, text_embeds: Tensor, attention_mask: Tensor, kv: CrossAttentionKV | JoinedKV) -> Tensor:
        """All layers but the last: `[pairs, tokens, width]` to the same."""
        mask, hidden = key_mask(attention_mask), text_embeds
        for index, layer in enumerate(self.layers[:-1]):
            hidden = self.run(layer, hidden, mask, kv, index)
        return hidden

    def last(
        self, hidden: Tensor, attention_mask: Tensor, kv: CrossAttentionKV | JoinedKV, rows: Tensor | None = None
    ) -> Tensor:
        """The last layer, at `rows` `[pairs, slots]` or everywhere: `[pairs, slots or tokens, width]`."""
        return self.layers[-1](hidden, key_mask(attention_mask), kv, len(self.layers) - 1, rows)


def project_kv(layers: nn.ModuleList, states: Tensor, mask: Tensor | None = None) -> CrossAttentionKV:
    """Keys and values that the cross-attention of every one of `layers` reads of `states` `[images, tokens, width]`."""
    keys_values = [layer.cross_attention.project_kv(states) for layer in layers if isinstance(layer, TextLayer)]
    return CrossAttentionKV(keys_values, mask)


def init_bert(width: int) -> Callable[[nn.Module], None]:
    """Normal weights and zero biases, as BERT starts: to be applied to every module of a stack of this width."""
    std = init_std(width)

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)

    return initialise


def key_mask(attention_mask: Tensor) -> Tensor:
    """Bool `[batch, tokens]` to the `[batch, 1, 1, tokens]` that attention broadcasts."""
    return attention_mask[:, None, None, :].bool()


def class_rows(texts: Tensor) -> Tensor:
    """Row indices `[batch, 1]` of `[CLS]`, on the device of `texts` `[batch, ...]`."""
    return torch.zeros(texts.shape[0], 1, dtype=torch.long, device=texts.device)
