"""Every pass of a step through the encoders, collected so that passes of one kind run as one batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tercet.model.layers import ImageMemory, JoinedMemory
from tercet.model.tercet import Tercet
from tercet.model.text import FusionEncoder
from tercet.objectives.features import Features
from tercet.objectives.masking import MaskedTexts
from tercet.objectives.matching import Negatives
from tercet.ranks import Spread
from tercet.tasks.pair_batch import PairBatch


class FusionPasses:
    """Pairs of several passes, collected to go through the fusion encoder as one batch.

    Attributes:
        texts: the texts that pairs consist of, `[texts, tokens, width]` each; every text once.
        masks: their attention masks, `[texts, tokens]` each.
        indices: for the pairs of each pass the indices of their texts, `[pairs]` each.
        parts: the memory of each pass and the number of pairs that read it.
    """

    def __init__(self) -> None:
        self.texts: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.parts: list[tuple[ImageMemory, int]] = []

    def add(self, text_embeds: Tensor, attention_mask: Tensor, memory: ImageMemory) -> None:
        """Add `[pairs, tokens, width]` texts that read `memory`."""
        self._add_pairs(self._add_texts(text_embeds, attention_mask), memory)

    def add_matching(
        self,
        features: Features,
        memory: ImageMemory,
        unmatched: ImageMemory,
        negatives: Negatives,
        pool: Features | None = None,
    ) -> None:
        """Add each image with its own and its negative text, side by side, then each text with its negative image.

        Args:
            features: of the batch.
            memory: of the batch's images.
            unmatched: of the negative image of every text.
            negatives: which texts to take.
            pool: what the negatives were drawn among, where it is more than the batch.
        """
        texts = self._add_texts(features.text_embeds, features.attention_mask)
        if pool is None:
            others = texts[negatives.texts]
        else:
            others = self._add_texts(pool.text_embeds[negatives.texts], pool.attention_mask[negatives.texts])
        self._add_pairs(torch.stack([texts, others], dim=1).flatten(), memory)
        self._add_pairs(texts, unmatched)

    def _add_texts(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Their indices."""
        before = sum(text.shape[0] for text in self.texts)
        self.texts.append(text_embeds)
        self.masks.append(attention_mask)
        return torch.arange(before, before + text_embeds.shape[0], device=text_embeds.device)

    def _add_pairs(self, texts: Tensor, memory: ImageMemory) -> None:
        self.indices.append(texts)
        self.parts.append((memory, texts.shape[0]))

    def lower(self, fusion: FusionEncoder) -> Tensor:
        """All pairs through the lower fusion layers, `[pairs, tokens, width]`."""
        return fusion.lower(torch.cat(self.texts), torch.cat(self.masks), self.memory(0), torch.cat(self.indices))

    @property
    def attention_mask(self) -> Tensor:
        """The masks of all pairs, `[pairs, tokens]`."""
        return torch.cat(self.masks)[torch.cat(self.indices)]

    def memory(self, first: int, last: int | None = None) -> ImageMemory:
        """The memories of the passes from `first` up to `last`."""
        return JoinedMemory(self.parts[first:last])


def gather_features(features: Features, spread: Spread) -> Features:
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
    """Rows of `add_matching` `[3 * batch, 2]` as matched pairs, negative images, negative texts."""
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
