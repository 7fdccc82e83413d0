"""The published computation written out plainly: the baseline that ours is timed against.

A model of separate matrices for queries, keys and values (the vision transformer's alone are one), attention step by
step with its weights in memory, keys and values of the image projected again in every pass, every layer at every
position.  It takes its weights from a `Tercet`; `tests/benchmarks` checks that both give the same results.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import ModelConfig, TextConfig, VisionConfig
from tercet.model.tercet import Tercet

# Added to the logit of a masked key, as published.
MASKED_LOGIT = -10000.0


class PlainVisionBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "output": nn.Linear(width, width)})
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, mlp_width), "down": nn.Linear(mlp_width, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        batch, tokens, width = hidden.shape
        stacked = self.attention["qkv"](self.attention_norm(hidden))
        query, key, value = stacked.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        attended = (weights @ value).transpose(1, 2).reshape(batch, tokens, width)
        hidden = hidden + self.attention["output"](attended)
        return hidden + self.mlp["down"](F.gelu(self.mlp["up"](self.mlp_norm(hidden))))


class PlainVision(nn.Module):
    """Vision transformer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        mlp_width = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(PlainVisionBlock(width, config.heads, mlp_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """`[batch, 3, height, width]`, normalised, to `[batch, 1 + patches, width]`."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.position_embed
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class PlainAttention(nn.Module):
    """Attention of a BERT layer, to the text itself or to image tokens."""

    def __init__(self, width: int, source_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """`hidden` `[batch, tokens, width]` attends to `source` `[batch, keys, source_width]`.

        `mask` `[batch, 1, 1, keys]` is added to the logits.
        """
        batch, tokens, width = hidden.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(batch, -1, self.heads, width // self.heads).permute(0, 2, 1, 3)

        query, key, value = split(self.query(hidden)), split(self.key(source)), split(self.value(source))
        logits = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads) + mask
        weights = F.dropout(logits.softmax(dim=-1), self.dropout, self.training)
        attended = (weights @ value).permute(0, 2, 1, 3).contiguous().view(batch, tokens, width)
        return F.dropout(self.output(attended), self.dropout, self.training)


class PlainTextLayer(nn.Module):
    """Post-norm BERT layer, with cross-attention where `image_width` is given."""

    def __init__(self, config: TextConfig, image_width: int | None = None) -> None:
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.attention = PlainAttention(width, width, config.heads, config.dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.cross_attention = None
        if image_width is not None:
            self.cross_attention = PlainAttention(width, image_width, config.heads, config.dropout)
            self.cross_norm = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, config.mlp_width), "down": nn.Linear(config.mlp_width, width)})
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: Tensor, mask: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """`[batch, tokens, width]` to the same; `image_embeds` is `[batch, image_tokens, image_width]`."""
        hidden = self.attention_norm(hidden + self.attention(hidden, hidden, mask))
        if self.cross_attention is not None and image_embeds is not None:
            everything = image_embeds.new_zeros(len(image_embeds), 1, 1, image_embeds.shape[1])
            hidden = self.cross_norm(hidden + self.cross_attention(hidden, image_embeds, everything))
        changed = self.mlp["down"](F.gelu(self.mlp["up"](hidden)))
        return self.mlp_norm(hidden + F.dropout(changed, self.dropout, self.training))


class PlainText(nn.Module):
    """Embeddings and the lower layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.word_embed = nn.Embedding(config.vocabulary_size, config.width, padding_idx=config.pad_id)
        self.position_embed = nn.Embedding(config.max_positions, config.width)
        self.type_embed = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.layers = nn.ModuleList(PlainTextLayer(config) for _ in range(config.fusion_layer))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """`[batch, tokens]` to `[batch, tokens, width]`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        types = self.type_embed(torch.zeros_like(input_ids))
        hidden = self.norm(self.word_embed(input_ids) + types + self.position_embed(positions))
        hidden = F.dropout(hidden, self.dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class PlainWordHead(nn.Module):
    """Vocabulary logits with the word embedding as output matrix."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary_size))

    def forward(self, fused: Tensor, word_embed: Tensor) -> Tensor:
        """`[pairs, tokens, width]` to `[pairs, tokens, vocabulary]`."""
        return F.linear(self.norm(F.gelu(self.transform(fused))), word_embed, self.bias)


class PlainModel(nn.Module):
    """The whole model; parts and parameters are named as in `Tercet`, but for the matrices that it keeps apart."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text, vision = config.text, config.vision
        self.vision = PlainVision(vision)
        self.text = PlainText(text)
        upper = text.depth - text.fusion_layer
        self.fusion = nn.ModuleDict({"layers": nn.ModuleList(PlainTextLayer(text, vision.width) for _ in range(upper))})
        self.vision_projection = nn.Linear(vision.width, config.embed_dim)
        self.text_projection = nn.Linear(text.width, config.embed_dim)
        self.itm_head = nn.Linear(text.width, 2)
        self.mlm_head = PlainWordHead(text)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    @classmethod
    def of(cls, model: Tercet) -> PlainModel:
        """The plain model with the weights of `model`."""
        plain = cls(model.config)
        plain.load_state_dict(to_plain(model.state_dict(), plain))
        return plain

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, tokens]` to `[batch, tokens, width]`."""
        return self.text(input_ids, added_mask(attention_mask))

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """`[pairs, tokens, width]` with `image_embeds` `[pairs, image_tokens, width]`, at every position."""
        mask, hidden = added_mask(attention_mask), text_embeds
        for layer in self.fusion["layers"]:  # type: ignore[union-attr]
            hidden = layer(hidden, mask, image_embeds)
        return hidden

    def word_logits(self, fused: Tensor) -> Tensor:
        """Vocabulary logits `[pairs, tokens, vocabulary]` of every position."""
        return self.mlm_head(fused, self.text.word_embed.weight)


def added_mask(attention_mask: Tensor) -> Tensor:
    """`[batch, tokens]` to what is added to the logits, `[batch, 1, 1, tokens]`."""
    return (1.0 - attention_mask[:, None, None, :].float()) * MASKED_LOGIT


def _joined(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Our name of a matrix that the plain model keeps in parts, and the names of these."""
    for ours, parts in (("attention.qkv", ("query", "key", "value")), ("cross_attention.key_value", ("key", "value"))):
        if f".{ours}." in name and not name.startswith("vision."):
            stem, _, kind = name.rpartition(".")
            return name, tuple(f"{stem.rpartition('.')[0]}.{part}.{kind}" for part in parts)
    return None


def to_plain(state: dict[str, Tensor], plain: PlainModel) -> dict[str, Tensor]:
    """Our tensors under the plain model's names and shapes."""
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    taken: dict[str, Tensor] = {}
    for name, value in state.items():
        joined = _joined(name)
        if joined is None:
            taken[name] = value.reshape(shapes[name])
        else:
            taken |= dict(zip(joined[1], value.chunk(len(joined[1])), strict=True))
    return taken


def from_plain(tensors: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the plain model under our names and in the shapes that `names` has; the inverse of `to_plain`."""
    taken: dict[str, Tensor] = {}
    for name, like in names.items():
        joined = _joined(name)
        parts = [tensors[part] for part in joined[1]] if joined else [tensors[name]]
        taken[name] = torch.cat(parts).reshape(like.shape) if joined else parts[0].reshape(like.shape)
    return taken


@torch.no_grad()
def plain_scores(
    model: PlainModel, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor, batch: int = 128
) -> Tensor:
    """Matching logits of one image against texts: its tokens repeated for each, texts padded to one length.

    Args:
        model: in evaluation mode.
        image_embeds: `[image_tokens, width]`.
        text_embeds: `[texts, padded, width]`.
        attention_mask: `[texts, padded]`.
        batch: pairs in one pass.

    Returns:
        `[texts]`, of class 1 (a match).
    """
    scores = []
    for start in range(0, len(text_embeds), batch):
        texts, mask = text_embeds[start : start + batch], attention_mask[start : start + batch]
        repeated = image_embeds.repeat(len(texts), 1, 1)
        scores.append(model.itm_head(model.fuse(texts, mask, repeated)[:, 0])[:, 1])
    return torch.cat(scores)
