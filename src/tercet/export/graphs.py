"""The parts of a model that are exported, each a module with tensors in and tensors out.

```
images ──► vision ──► image_embeds ──► memory ──► image_memory ──┐
                  └─► image_feats                                ├──► fusion ──► itm_logits
input_ids, attention_mask ──► text ──► text_embeds ──────────────┘
                                   └─► text_feats
```

The memory is a graph of its own, since it depends on the image alone: computed once, it serves every text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tercet.model.layers import AttentionTap, attention
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttentionKV, class_rows


@dataclass(frozen=True)
class Graph:
    """A part of a model, ready to be exported.

    Attributes:
        name: of its files.
        module: what is exported.
        inputs: example tensors by name; none of their dynamic axes is 0 or 1 long.
        dynamic: for each input the names of its dynamic axes.
        limits: the largest length of a dynamic axis, where there is one.
        outputs: names of what it gives.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    limits: dict[str, int]
    outputs: tuple[str, ...]


class VisionGraph(nn.Module):
    """The image encoder and its projection."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.encoder = model.vision
        self.projection = model.vision_projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `[images, 3, size, size]` to `image_embeds` `[images, 1 + patches, vision_width]` and unit vectors
        `image_feats` `[images, embed_dim]`."""
        image_embeds = self.encoder(images)
        return image_embeds, nn.functional.normalize(self.projection(image_embeds[:, 0]), dim=-1)


class TextGraph(nn.Module):
    """The text encoder and its projection."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.encoder = model.text
        self.projection = model.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """int64 `input_ids` and `attention_mask` `[texts, tokens]` to `text_embeds` `[texts, tokens, width]` and unit
        vectors `text_feats` `[texts, embed_dim]`."""
        text_embeds = self.encoder(input_ids, attention_mask)
        return text_embeds, nn.functional.normalize(self.projection(text_embeds[:, 0]), dim=-1)


class MemoryGraph(nn.Module):
    """Keys and values of every fusion layer."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.fusion = model.fusion

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`[images, 1 + patches, vision_width]` to `image_memory`
        `[images, layers, 2, heads, image_tokens, head_width]`, keys before values."""
        layers = self.fusion.project_kv(image_embeds).keys_values
        return torch.stack([torch.stack([key, value], dim=1) for key, value in layers], dim=1)


class FusionGraph(nn.Module):
    """The fusion encoder and the heads that read its `[CLS]`."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.fusion = model.fusion
        self.itm_head = model.itm_head
        self.entailment_head = model.entailment_head

    def forward(self, text_embeds: Tensor, attention_mask: Tensor, image_memory: Tensor) -> tuple[Tensor, ...]:
        """Fuse every image with its own texts.

        Args:
            text_embeds: `[images, texts, tokens, width]`; one image with many texts, or many with one each.
            attention_mask: int64 `[images, texts, tokens]`.
            image_memory: `[images, layers, 2, heads, image_tokens, head_width]`.

        Returns:
            `itm_logits` `[images, texts, 2]`, class 1 a match, and of a model fine-tuned for entailment
            `entailment_logits` `[images, texts, 3]`.
        """
        images, texts = text_embeds.shape[:2]
        hidden, mask = text_embeds.flatten(0, 1), attention_mask.flatten(0, 1)
        memory = _StackedMemory(image_memory, texts)
        fused = self.fusion(hidden, mask, memory, class_rows(hidden))[:, 0].unflatten(0, (images, texts))
        heads = [self.itm_head] + ([] if self.entailment_head is None else [self.entailment_head])
        return tuple(head(fused) for head in heads)


class _StackedMemory(CrossAttentionKV):
    """An image memory as one tensor, read by as many texts of every image.

    `CrossAttentionKV` asks whether there are as many pairs as images, which a graph for any number cannot.
    """

    def __init__(self, stacked: Tensor, texts: int) -> None:
        super().__init__([layer.unbind(1) for layer in stacked.unbind(1)])  # pyright: ignore[reportArgumentType]
        self.texts = texts

    def attend(self, layer: int, query: Tensor, dropout: float, tap: AttentionTap | None) -> Tensor:
        """As `CrossAttentionKV.attend`."""
        key, value = self.keys_values[layer]
        queries = query.shape[2]
        folded = query.unflatten(0, (key.shape[0], self.texts)).transpose(1, 2).flatten(2, 3)
        seen = attention(folded, key, value, self.mask, dropout, tap)
        return seen.unflatten(2, (self.texts, queries)).transpose(1, 2).flatten(0, 1)


def graphs_of(model: Tercet) -> list[Graph]:
    """The four graphs of a model in evaluation mode, in the order in which they feed one another."""
    config = model.config
    size, text = config.vision.image_size, config.text
    images, texts, tokens = 2, 3, min(5, text.max_positions)
    pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8)
    image_embeds = torch.zeros(images, 1 + config.vision.grid**2, config.vision.width)
    layers, head_width = text.depth - text.fusion_layer, text.width // text.heads
    image_tokens = image_embeds.shape[1] - config.vision.first_fused
    image_memory = torch.zeros(images, layers, 2, text.heads, image_tokens, head_width)
    logits = ("itm_logits",) + (() if model.entailment_head is None else ("entailment_logits",))
    words, limits = {0: "texts", 1: "tokens"}, {"tokens": text.max_positions}
    pairs = {0: "images", 1: "texts", 2: "tokens"}
    return [
        Graph(
            "vision",
            VisionGraph(model).eval(),
            {"images": pixels},
            {"images": {0: "images"}},
            {},
            ("image_embeds", "image_feats"),
        ),
        Graph(
            "text",
            TextGraph(model).eval(),
            {name: torch.ones(texts, tokens, dtype=torch.int64) for name in ("input_ids", "attention_mask")},
            {"input_ids": words, "attention_mask": words},
            limits,
            ("text_embeds", "text_feats"),
        ),
        Graph(
            "memory",
            MemoryGraph(model).eval(),
            {"image_embeds": image_embeds},
            {"image_embeds": {0: "images"}},
            {},
            ("image_memory",),
        ),
        Graph(
            "fusion",
            FusionGraph(model).eval(),
            {
                "text_embeds": torch.zeros(images, texts, tokens, text.width),
                "attention_mask": torch.ones(images, texts, tokens, dtype=torch.int64),
                "image_memory": image_memory,
            },
            {"text_embeds": pairs, "attention_mask": pairs, "image_memory": {0: "images"}},
            limits,
            logits,
        ),
    ]
