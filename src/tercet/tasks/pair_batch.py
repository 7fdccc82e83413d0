"""A batch of pairs as a step of pre-training reads it: what this rank has, and what it knows of the whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.config import TextConfig
from tercet.data.batches import Batch
from tercet.data.order import mix
from tercet.distributed import RankLayout, Ranks
from tercet.objectives.contrast import same_image
from tercet.objectives.masking import MaskedTexts, hide_words

SECOND_STREAM = 1  # what the teacher's texts are hidden by, apart from what masked language modelling draws


@dataclass(frozen=True)
class Counts:
    """What the losses of a batch are means over: how many there are on a rank on average, never 0.

    Attributes:
        pairs: of an image and a text.
        worded: texts with a word behind `[CLS]`.
        hidden: words that are hidden.
        judged: pairs that matching judges, the unmatched ones included.
    """

    pairs: float
    worded: float
    hidden: float
    judged: float


@dataclass(frozen=True)
class Hiding:
    """Which chance each word piece has to be hidden.

    Attributes:
        masked: from masked language modelling, which guesses it; None without that.
        second: from the teacher, for whom it makes a second view of the text (`objectives.second_text_mask`).
    """

    masked: float | None = None
    second: float = 0.0


@dataclass
class PairBatch:
    """A batch of pairs on the device, or the part of it that this rank has.

    Attributes:
        images: `[batch, 3, height, width]`, the student's view.
        second_views: the teacher's view of the same images; None when nothing reads it.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        image_ids: `[batch]`, the same for all captions of one image.
        masked: the texts with hidden words; None without masked language modelling.
        second_ids: `[batch, tokens]`, the texts as the teacher reads them for its features; by default `input_ids`.
        spread: how the whole batch is spread over the ranks; by default all of it is here.
        all_image_ids: `image_ids` of the whole batch.
        counts: what the losses divide by; None: as much as there is here.
        seed: what the step draws on the device follows from it.
    """

    images: Tensor
    second_views: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    masked: MaskedTexts | None = None
    second_ids: Tensor = None  # type: ignore[assignment] - set below
    spread: RankLayout = None  # type: ignore[assignment] - set below
    all_image_ids: Tensor = None  # type: ignore[assignment] - set below
    counts: Counts | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.second_ids is None:
            self.second_ids = self.input_ids
        if self.spread is None:
            self.spread = RankLayout((len(self.images),))
        if self.all_image_ids is None:
            self.all_image_ids = self.image_ids

    def count(self, name: str) -> float | None:
        """One of `counts`; None without them."""
        return None if self.counts is None else getattr(self.counts, name)


def lay_out(
    batch: Batch,
    device: torch.device,
    seed: int,
    text: TextConfig,
    hiding: Hiding,
    gather: bool,
    by_id: bool,
) -> PairBatch:
    """Hide words as `seed` says, and send the batch to `device`.

    The ranks tell one another here, host to host, how much each has, so that no device is waited for.

    Args:
        batch: the pairs that this rank read.
        device: where the step runs.
        seed: the same on every rank.
        text: names the special ids.
        hiding: which words are hidden from whom.
        gather: negatives are found among the pairs of all ranks.
        by_id: pairs of one image are no negatives of one another.
    """
    ranks = Ranks()
    tokens = batch.input_ids.shape[1]
    worded = int(batch.attention_mask[:, 1:].any(dim=1).sum())
    told = ranks.gather_tensor(torch.tensor([len(batch), tokens, worded]))
    spread = RankLayout(tuple(told[:, 0].tolist()), ranks.rank)
    longest = int(told[:, 1].max())
    texts, whole = (batch.input_ids, batch.attention_mask), (spread.total, longest)
    masked, second_ids = None, None
    if hiding.masked is not None:
        generator = torch.Generator().manual_seed(seed)
        masked = hide_words(*texts, hiding.masked, text, generator, whole, spread.start)
    if hiding.second:
        generator = torch.Generator().manual_seed(mix(seed, SECOND_STREAM))
        second_ids = hide_words(*texts, hiding.second, text, generator, whole, spread.start).input_ids
    hidden = 0 if masked is None else len(masked.labels)
    ids = F.pad(batch.image_ids, (0, max(spread.sizes) - len(batch)))
    told_later = ranks.gather_tensor(torch.cat([torch.tensor([hidden]), ids]))
    own_ids = [row[1 : 1 + size] for row, size in zip(told_later, spread.sizes, strict=True)]
    all_ids = torch.cat(own_ids)
    judged = sum(_count_judged(ids if by_id else None, len(ids)) for ids in ([all_ids] if gather else own_ids))
    counts = (spread.total, int(told[:, 2].sum()), int(told_later[:, 0].sum()), judged)
    if gather:
        batch, masked = _pad_texts(batch, masked, longest, text.pad_id)
    if second_ids is not None:
        second_ids = F.pad(second_ids, (0, batch.input_ids.shape[1] - second_ids.shape[1]), value=text.pad_id)
    batch = batch.to(device)
    return PairBatch(
        images=batch.images,
        second_views=batch.second_views,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        image_ids=batch.image_ids,
        masked=None if masked is None else masked.to(device),
        second_ids=batch.input_ids if second_ids is None else second_ids.to(device, non_blocking=True),
        spread=spread,
        all_image_ids=all_ids.to(device, non_blocking=True),
        counts=Counts(*((count or 1) / ranks.world for count in counts)),
        seed=seed,
    )


def _count_judged(image_ids: Tensor | None, pairs: int) -> int:
    """How many pairs matching judges where negatives are drawn among `pairs` with `image_ids` `[pairs]`: every matched
    one, and two unmatched ones for each that has a negative."""
    same = same_image(image_ids, pairs, torch.device("cpu"))
    return pairs + 2 * int((~same.all(dim=1)).sum())


def _pad_texts(batch: Batch, masked: MaskedTexts | None, tokens: int, pad_id: int) -> tuple[Batch, MaskedTexts | None]:
    """The texts of a batch padded to as many tokens as the longest on any rank has, so that they can be gathered."""
    more = (0, tokens - batch.input_ids.shape[1])
    batch = dataclasses.replace(
        batch,
        input_ids=F.pad(batch.input_ids, more, value=pad_id),
        attention_mask=F.pad(batch.attention_mask, more, value=False),
    )
    if masked is not None:
        masked = dataclasses.replace(masked, input_ids=F.pad(masked.input_ids, more, value=pad_id))
    return batch, masked
