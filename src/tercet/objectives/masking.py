"""Masked language modelling (`mlm`): which words are hidden, and the loss of guessing them (section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.config import TextConfig

IGNORED = -100


@dataclass
class MaskedTexts:
    """Texts with some words hidden, and where.

    Drawn on the host before the batch goes to the device: the shapes then follow from the draw without the device
    having to say how many words were hidden.

    Attributes:
        input_ids: `[batch, tokens]` with the hidden words replaced.
        rows: positions of the hidden words `[batch, slots]`; unused slots hold 0.
        chosen: indices `[masked]` of the used slots in the flattened `[batch * slots]`.
        labels: the hidden word pieces `[masked]`.
    """

    input_ids: Tensor
    rows: Tensor
    chosen: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> MaskedTexts:
        """The same on another device."""
        parts = (self.input_ids, self.rows, self.chosen, self.labels)
        return MaskedTexts(*(part.to(device, non_blocking=True) for part in parts))


def hide_words(
    input_ids: Tensor,
    attention_mask: Tensor,
    probability: float,
    text: TextConfig,
    generator: torch.Generator,
    whole: tuple[int, int] | None = None,
    start: int = 0,
) -> MaskedTexts:
    """Hide words as BERT does: of those drawn, 80 % become [MASK], 10 % a random word piece, 10 % stay.

    Args:
        input_ids: `[batch, tokens]` on the host.
        attention_mask: `[batch, tokens]`.
        probability: chance of each word piece; [CLS] and padding are never drawn.
        text: names the special ids and the size of the vocabulary.
        generator: the source of the draw.
        whole: texts and tokens of the batch that these texts are a part of, so that any number of ranks draw the same
            for the same text; None: they are the whole.
        start: which of the whole is the first of these texts.
    """
    shape = whole or tuple(input_ids.shape)
    own = (slice(start, start + input_ids.shape[0]), slice(input_ids.shape[1]))

    def draw(share: float) -> Tensor:
        return torch.rand(shape, generator=generator)[own] < share

    hidden = draw(probability) & attention_mask.bool() & (input_ids != text.cls_id)
    masked = hidden & draw(0.8)
    random = hidden & ~masked & draw(0.5)
    words = torch.randint(text.vocabulary_size, shape, generator=generator)[own]
    replaced = torch.where(random, words, input_ids.masked_fill(masked, text.mask_id))
    return locate(replaced, input_ids.masked_fill(~hidden, IGNORED))


def locate(input_ids: Tensor, labels: Tensor) -> MaskedTexts:
    """Positions of the hidden words.

    Args:
        input_ids: `[batch, tokens]` with the hidden words replaced.
        labels: `[batch, tokens]`, the hidden word pieces, `IGNORED` elsewhere.
    """
    hidden = labels != IGNORED
    slots = max(1, int(hidden.sum(dim=1).max())) if labels.numel() else 1
    # A stable sort brings the hidden positions of each text to the front, in their order.
    order = hidden.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    used = hidden.gather(1, order)
    rows = order.masked_fill(~used, 0)
    return MaskedTexts(
        input_ids=input_ids,
        rows=rows,
        chosen=used.flatten().nonzero().squeeze(1),
        labels=labels.gather(1, order)[used],
    )


def masked_language(
    mlm_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
    count: float | None = None,
) -> Tensor:
    """Cross-entropy at the hidden words, softened by the teacher's guesses.

    Args:
        mlm_logits: `[masked, vocabulary]`.
        labels: `[masked]`.
        teacher_logits: `[masked, vocabulary]`, without gradient; None without a teacher.
        alpha: share of the teacher's guesses in the targets.
        count: divides the sum over the hidden words; None: as many as there are.  With several ranks the mean number on
            a rank.

    Returns:
        The mean over the hidden words, `[]`; 0 when none is hidden.
    """
    count = max(1, labels.shape[0]) if count is None else count
    log_probabilities = mlm_logits.float().log_softmax(dim=-1)
    hard = F.nll_loss(log_probabilities, labels, reduction="sum") / count
    if teacher_logits is None or alpha == 0:
        return hard
    soft = -(log_probabilities * teacher_logits.float().softmax(dim=-1)).sum() / count
    return (1 - alpha) * hard + alpha * soft
