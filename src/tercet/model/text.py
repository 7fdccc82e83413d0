"""The text encoder and the fusion encoder: the lower and the upper layers of a BERT stack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tercet.config import TextConfig, VisionConfig
from tercet.errors import TercetError
from tercet.model.dropout import drop
from tercet.model.layers import EMBEDDING_DEVIATION, TextLayer, weight_deviation
from tercet.model.memory import ImageMemory, LeanMemory
from tercet.model.projection import pays_to_project
from tercet.model.recompute import LayerStack


def key_mask(attention_mask: Tensor) -> Tensor:
    """Bool `[batch, tokens]` to the `[batch, 1, 1, tokens]` that attention broadcasts."""
    return attention_mask[:, None, None, :].bool()


def initialise_bert(width: int) -> Callable[[nn.Module], None]:
    """Normal weights and zero biases, as BERT starts: to be applied to every module of a stack of this width."""
    deviation = weight_deviation(width)

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviation)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_DEVIATION)

    return initialise


class TextEncoder(LayerStack):
    """Embeddings and the lower layers of the stack.

    Pooling by the mean (`model.text.pool`) is ours, for few pairs: docs/results.md has what it does.
    """

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
        self.apply(initialise_bert(width))

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
        hidden = drop(hidden, self.dropout, self.training)
        mask = key_mask(attention_mask)
        for layer in self.layers:
            hidden = self.run(layer, hidden, mask)
        if self.pool == "mean":
            real = attention_mask[:, :, None].to(hidden.dtype)
            mean = (hidden * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
            hidden = torch.cat([mean, hidden[:, 1:]], dim=1)
        return hidden


class FusionEncoder(LayerStack):
    """The upper layers of the stack, each with cross-attention from the text to an image memory."""

    def __init__(self, config: TextConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.first_fused = vision.first_fused
        self.layers = nn.ModuleList(
            TextLayer(config.width, config.heads, config.mlp_width, config.dropout, vision.width)
            for _ in range(config.depth - config.fusion_layer)
        )
        self.apply(initialise_bert(config.width))

    def remember(self, image_embeds: Tensor, readers: tuple[int, int] | None = None) -> ImageMemory:
        """What every layer reads of images.

        Args:
            image_embeds: `[images, 1 + patches, image_width]`, which is read from token `first_fused` on.
            readers: text tokens, over all passes, that read an image in a lower layer and in the last one.  On a CPU,
                layers with few of them keep no keys and values, which is faster.  None: any number, and all are kept.
        """
        image_embeds = image_embeds[:, self.first_fused :]
        layers = [layer.cross_attention for layer in self._fusion_layers()]
        projected = len(layers)
        # A rank whose images are all broken has none, which saves nothing.
        if readers is not None and len(image_embeds) and image_embeds.device.type == "cpu":
            lower, last = (self._pays_to_project(count, image_embeds) for count in readers)
            projected = (projected - 1) * lower + (lower and last)
        keys_values = [layer.remember(image_embeds) for layer in layers[:projected]]
        if projected == len(layers):
            return ImageMemory(keys_values)
        others = [(layer.key_value.weight, layer.key_value.bias) for layer in layers[projected:]]
        return LeanMemory(image_embeds, keys_values, others)

    def forward(
        self, text_embeds: Tensor, attention_mask: Tensor, memory: ImageMemory, rows: Tensor | None = None
    ) -> Tensor:
        """Fuse texts with images.

        Args:
            text_embeds: `[pairs, tokens, width]` from the text encoder.
            attention_mask: `[pairs, tokens]`.
            memory: the images; see `ImageMemory` for which pair reads which image.
            rows: `[pairs, slots]` positions that the last layer computes; None computes all.

        Returns:
            `[pairs, slots or tokens, width]`.
        """
        hidden = self.lower(text_embeds, attention_mask, memory)
        return self.last(hidden, attention_mask, memory, rows)

    def lower(
        self, text_embeds: Tensor, attention_mask: Tensor, memory: ImageMemory, texts: Tensor | None = None
    ) -> Tensor:
        """All layers but the last.

        Args:
            text_embeds: `[pairs, tokens, width]`.
            attention_mask: `[pairs, tokens]`.
            memory: the images.
            texts: the text of each pair `[pairs]`, an index into `text_embeds` and `attention_mask`, which then hold
                each text once; what the first layer does before it looks at an image is done once a text.

        Returns:
            `[pairs, tokens, width]`.
        """
        mask = key_mask(attention_mask)
        first, *others = self._fusion_layers()
        if not others:
            return text_embeds if texts is None else text_embeds.index_select(0, texts)
        hidden = self.run(first.read_text, text_embeds, mask)
        if texts is not None:
            hidden, mask = hidden.index_select(0, texts), mask.index_select(0, texts)
        hidden = self.run(first.read_image, hidden, memory, 0)
        for index, layer in enumerate(others[:-1], start=1):
            hidden = self.run(layer, hidden, mask, memory, index)
        return hidden

    def last(self, hidden: Tensor, attention_mask: Tensor, memory: ImageMemory, rows: Tensor | None) -> Tensor:
        """The last layer, at `rows` `[pairs, slots]` or everywhere: `[pairs, slots or tokens, width]`."""
        index = len(self.layers) - 1
        return self.layers[index](hidden, key_mask(attention_mask), memory, index, rows)

    def _pays_to_project(self, readers: int, image_embeds: Tensor) -> bool:
        attention = self._fusion_layers()[0].cross_attention
        width = attention.query.in_features
        return pays_to_project(readers, image_embeds.shape[1], width, image_embeds.shape[2], attention.heads)

    def _fusion_layers(self) -> list[TextLayer]:
        return [layer for layer in self.layers if isinstance(layer, TextLayer)]


def class_rows(texts: Tensor) -> Tensor:
    """Row indices `[batch, 1]` of `[CLS]`, on the device of `texts` `[batch, ...]`."""
    return torch.zeros(texts.shape[0], 1, dtype=torch.long, device=texts.device)
