"""Every pass of a step through the encoders, collected so that passes of one kind run as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tercet.distributed import RankLayout
from tercet.model.memory import ImageMemory, JoinedMemory
from tercet.model.tercet import Tercet
from tercet.model.text import FusionEncoder, class_rows
from tercet.objectives.features import Features
from tercet.objectives.masking import MaskedTexts
from tercet.tasks.pair_batch import PairBatch


@dataclass
class Pass:
    """Pairs behind the lower fusion layers.

    Attributes:
        hidden: `[images, texts_per_image, tokens, width]`.
        mask: `[images, texts_per_image, tokens]`.
        memory: the images.
    """

    hidden: Tensor
    mask: Tensor
    memory: ImageMemory

    def of_texts(self, texts: slice) -> Pass:
        """Some of the texts of every image."""
        return Pass(self.hidden[:, texts], self.mask[:, texts], self.memory)


def finish(fusion: FusionEncoder, passes: Sequence[Pass], rows: Tensor | None = None) -> Tensor:
    """The last fusion layer of several passes as one batch.

    Args:
        fusion: the layers.
        passes: what the lower ones gave.
        rows: `[pairs, slots]` positions to compute; None computes `[CLS]` alone.

    Returns:
        `[pairs, slots, width]`.
    """
    hidden = torch.cat([part.hidden.flatten(0, 1) for part in passes])
    mask = torch.cat([part.mask.flatten(0, 1) for part in passes])
    memory = JoinedMemory([(part.memory, part.hidden.shape[:2].numel()) for part in passes])
    return fusion.last(hidden, mask, memory, class_rows(hidden) if rows is None else rows)


class FusionPasses:
    """Pairs of several passes, collected to go through the lower fusion layers as one batch.

    Attributes:
        texts: the texts that pairs consist of, `[texts, tokens, width]` each; every text once.
        masks: their attention masks, `[texts, tokens]` each.
        readers: for each memory the texts that read it, as indices `[images, texts_per_image]`.
        memories: what they read.
    """

    def __init__(self) -> None:
        self.texts: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.readers: list[Tensor] = []
        self.memories: list[ImageMemory] = []

    def add_texts(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Add `[texts, tokens, width]` to what pairs may consist of: their indices `[texts]`."""
        before = sum(text.shape[0] for text in self.texts)
        self.texts.append(text_embeds)
        self.masks.append(attention_mask)
        return torch.arange(before, before + text_embeds.shape[0], device=text_embeds.device)

    def add_pairs(self, texts: Sequence[Tensor], memory: ImageMemory) -> None:
        """Let every image of `memory` be read by several texts at once: indices `[images]` for each of them."""
        self.readers.append(torch.stack(list(texts), dim=1))
        self.memories.append(memory)

    def lower(self, fusion: FusionEncoder) -> list[Pass]:
        """All pairs through the lower fusion layers, for each memory apart."""
        parts = [(memory, texts.numel()) for memory, texts in zip(self.memories, self.readers, strict=True)]
        indices = torch.cat([texts.flatten() for texts in self.readers])
        masks = torch.cat(self.masks)
        hidden = fusion.lower(torch.cat(self.texts), masks, JoinedMemory(parts), indices)
        return [
            Pass(piece.unflatten(0, texts.shape), masks[texts], memory)
            for piece, texts, memory in zip(
                hidden.split([pairs for _, pairs in parts]), self.readers, self.memories, strict=True
            )
        ]


def gather_features(features: Features, spread: RankLayout) -> Features:
    """What fusion reads of the pairs of all ranks; gradients go back to the rank that each pair is on."""
    return replace(
        features,
        image_embeds=spread.gather(features.image_embeds),
        text_embeds=spread.gather(features.text_embeds),
        attention_mask=spread.gather(features.attention_mask),
    )


def count_readers(batch: PairBatch, matching_passes: int, masked: MaskedTexts | None) -> tuple[int, int]:
    """Text tokens that read an image in a lower fusion layer and in the last one, where few rows are computed."""
    tokens = batch.input_ids.shape[1]
    slots = 0 if masked is None else masked.rows.shape[1]
    return tokens * (matching_passes + (masked is not None)), matching_passes + slots


def published_order(logits: Tensor) -> Tensor:
    """Rows `[3 * batch, 2]` of each image with its own and its negative text, side by side, and then of each text with
    its negative image, as matched pairs, negative images, negative texts."""
    pairs = logits.shape[0] // 3 * 2
    matched, negative_texts = logits[:pairs:2], logits[1:pairs:2]
    return torch.cat([matched, logits[pairs:], negative_texts])


def encode_texts(model: Tercet, attention_mask: Tensor, texts: list[Tensor | None]) -> list[Tensor | None]:
    """`text_embeds` `[batch, tokens, width]` of several readings of one batch of texts, through the encoder together.

    Args:
        model: student or teacher.
        attention_mask: `[batch, tokens]`, the same for every reading.
        texts: input ids `[batch, tokens]`; None stays None.
    """
    given = [ids for ids in texts if ids is not None]
    embeds = iter(model.encode_text(torch.cat(given), attention_mask.repeat(len(given), 1)).chunk(len(given)))
    return [None if ids is None else next(embeds) for ids in texts]
