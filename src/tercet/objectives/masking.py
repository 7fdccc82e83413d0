"""Masked language modelling (`mlm`): which tokens are masked (section 3.5 of arXiv 2202.10401)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.config import TextConfig

IGNORED = -100


@dataclass
class MaskedTexts:
    """Texts with some tokens masked, and where.

    Drawn on the host before the batch goes to the device: the shapes then follow from the draw, and the device need
    not say how many tokens were masked.

    Attributes:
        input_ids: `[batch, tokens]` with the masked tokens replaced.
        rows: positions of the masked tokens `[batch, slots]`; unused slots hold 0.
        chosen: indices `[masked]` of the used slots in the flattened `[batch * slots]`.
        labels: the masked tokens themselves `[masked]`.
    """

    input_ids: Tensor
    rows: Tensor
    chosen: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> MaskedTexts:
        """The same on another device."""
        parts = (self.input_ids, self.rows, self.chosen, self.labels)
        return MaskedTexts(*(part.to(device, non_blocking=True) for part in parts))


def mask_tokens(
    input_ids: Tensor,
    attention_mask: Tensor,
    probability: float,
    text: TextConfig,
    generator: torch.Generator,
    whole: tuple[int, int] | None = None,
    start: int = 0,
) -> MaskedTexts:
    """Mask tokens as BERT does: of those drawn, 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        input_ids: `[batch, tokens]` on the host.
        attention_mask: `[batch, tokens]`.
        probability: chance of each token; [CLS] and padding are never drawn.
        text: names the special ids and the size of the vocabulary.
        generator: the source of the draw.
        whole: texts and tokens of the batch that these texts are a part of, so that any number of ranks draw the same
            for the same text; None: they are the whole.
        start: which text of the whole is the first of these.
    """
    shape = whole or tuple(input_ids.shape)
    own = (slice(start, start + input_ids.shape[0]), slice(input_ids.shape[1]))

    def draw(chance: float) -> Tensor:
        return torch.rand(shape, generator=generator)[own] < chance

    drawn = draw(probability) & attention_mask.bool() & (input_ids != text.cls_id)
    masked = drawn & draw(0.8)
    random = drawn & ~masked & draw(0.5)
    tokens = torch.randint(text.vocabulary_size, shape, generator=generator)[own]
    replaced = torch.where(random, tokens, input_ids.masked_fill(masked, text.mask_id))
    return masked_positions(replaced, input_ids.masked_fill(~drawn, IGNORED))


def masked_positions(input_ids: Tensor, labels: Tensor) -> MaskedTexts:
    """Find the masked positions.

    Args:
        input_ids: `[batch, tokens]` with the masked tokens replaced.
        labels: `[batch, tokens]`, the masked tokens, `IGNORED` elsewhere.
    """
    masked = labels != IGNORED
    slots = max(1, int(masked.sum(dim=1).max())) if labels.numel() else 1
    # A stable sort moves the masked positions of each text to the front, in their order.
    order = masked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    used = masked.gather(1, order)
    return MaskedTexts(
        input_ids=input_ids,
        rows=order.masked_fill(~used, 0),
        chosen=used.flatten().nonzero().squeeze(1),
        labels=labels.gather(1, order)[used],
    )
