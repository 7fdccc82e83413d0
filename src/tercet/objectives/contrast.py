"""Contrast between global features: cross-modal alignment (`cma`) and intra-modal contrast (`imc`).

Sections 3.2 and 3.3 of arXiv 2202.10401.  Every student feature is compared with the teacher's features of the batch
and with those of the queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.objectives.loss import average
from tercet.objectives.state import EMPTY_ID, FeatureQueue

# The logit of what must not count.  Finite, since -inf times a target of 0 is NaN.
EXCLUDED = -1e9


@dataclass
class Candidates:
    """What the features of a batch are compared with: the batch itself first, then the queue.

    Attributes:
        image_feats: the batch's `[batch, embed_dim]`, then the queue's `[size, embed_dim]` where there is one; apart,
            since the queue is too long to be copied at every step.
        text_feats: the same for texts.
        targets: `[rows, candidates]`, of the pairs that are compared; the positives of a row share a mass of 1.
        excluded: bool `[candidates]`, true for slots of the queue that are still empty; None when none is.
    """

    image_feats: tuple[Tensor, ...]
    text_feats: tuple[Tensor, ...]
    targets: Tensor
    excluded: Tensor | None = None


def same_image(image_ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Bool `[batch, batch]`: which pairs show the same image; the diagonal alone when ids are not given."""
    if image_ids is None:
        return torch.eye(batch, dtype=torch.bool, device=device)
    return image_ids[:, None] == image_ids[None, :]


def gather_candidates(
    image_feats: Tensor,
    text_feats: Tensor,
    image_ids: Tensor | None,
    queue: FeatureQueue | None,
    exclude_empty: bool = True,
    rows: slice = slice(None),
) -> Candidates:
    """Candidates of a batch.

    Args:
        image_feats: `[batch, embed_dim]`, the teacher's; with several ranks, those of all of them.
        text_feats: `[batch, embed_dim]`, the same.
        image_ids: `[batch]`; captions of one image are positives of one another, through the queue too.  None makes
            every pair its own only positive, as the published pre-training does.
        queue: earlier features, as they were before this batch.
        exclude_empty: skip slots never written to; the published code compares with their random start.
        rows: the pairs of the batch that are compared with it; all, or those of this rank.
    """
    batch = image_feats.shape[0]
    targets = same_image(image_ids, batch, image_feats.device)[rows].to(image_feats.dtype)
    if queue is None or queue.size == 0:
        return Candidates((image_feats,), (text_feats,), targets / targets.sum(1, keepdim=True))
    if image_ids is None:
        queued = targets.new_zeros(targets.shape[0], queue.size)
    else:
        queued = (image_ids[rows, None] == queue.image_ids[None, :]).to(targets.dtype)
    targets = torch.cat([targets, queued], dim=1)
    excluded = None
    if exclude_empty:
        excluded = torch.cat([queue.image_ids.new_zeros(batch, dtype=torch.bool), queue.image_ids == EMPTY_ID])
    return Candidates(
        image_feats=(image_feats, queue.image_feats.to(image_feats.dtype)),
        text_feats=(text_feats, queue.text_feats.to(text_feats.dtype)),
        targets=targets / targets.sum(1, keepdim=True),
        excluded=excluded,
    )


def similarity(
    feats: Tensor, candidates: tuple[Tensor, ...], temperature: Tensor, excluded: Tensor | None = None
) -> Tensor:
    """Logits `[batch, candidates]`: cosines over temperature.

    Args:
        feats: `[batch, embed_dim]`.
        candidates: pieces `[candidates, embed_dim]`.
        temperature: `[]`.
        excluded: bool `[candidates]`, true for those that must not count.
    """
    scaled = feats / temperature
    logits = torch.cat([scaled @ piece.T for piece in candidates], dim=1)
    return logits if excluded is None else logits.masked_fill(excluded, EXCLUDED)


def contrast(
    feats: Tensor,
    others: tuple[Tensor, ...],
    candidates: Candidates,
    temperature: Tensor,
    count: float | None = None,
    teacher_feats: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """InfoNCE of features against candidates, in one direction.

    Args:
        feats: the student's, `[batch, embed_dim]`.
        others: `image_feats` or `text_feats` of `candidates`.
        candidates: which of them are positives.
        temperature: `[]`.
        count: see `average`.
        teacher_feats: the teacher's, `[batch, embed_dim]`; None, with `alpha` 0, without a teacher.
        alpha: weight of the teacher's own similarities in the targets.

    Returns:
        The mean over the batch, `[]`.
    """
    targets = candidates.targets
    if alpha == 0 or teacher_feats is None:
        logits = similarity(feats, others, temperature, candidates.excluded)
    else:
        # One product for both: it costs what reading the queue costs, however few the rows are.
        both = similarity(torch.cat([feats, teacher_feats]), others, temperature, candidates.excluded)
        logits, teacher_logits = both.chunk(2)
        targets = alpha * teacher_logits.detach().softmax(dim=1) + (1 - alpha) * targets
    return average(-(logits.log_softmax(dim=1) * targets).sum(dim=1), count)


def cross_modal(
    image_feats: Tensor,
    text_feats: Tensor,
    candidates: Candidates,
    temperature: Tensor,
    count: float | None = None,
    teacher_feats: tuple[Tensor, Tensor] | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """Cross-modal alignment: the mean of image to text and text to image, `[]`; see `contrast`.

    `teacher_feats` are those of the images and of the texts.
    """
    teacher_images, teacher_texts = (None, None) if teacher_feats is None else teacher_feats
    image_to_text = contrast(image_feats, candidates.text_feats, candidates, temperature, count, teacher_images, alpha)
    text_to_image = contrast(text_feats, candidates.image_feats, candidates, temperature, count, teacher_texts, alpha)
    return (image_to_text + text_to_image) / 2


def intra_modal(
    image_feats: Tensor, text_feats: Tensor, candidates: Candidates, temperature: Tensor, count: float | None = None
) -> Tensor:
    """Intra-modal contrast: the mean of an image and its other view, and a text and its dropout twin, `[]`.

    Its targets are hard; see `contrast`.
    """
    images = contrast(image_feats, candidates.image_feats, candidates, temperature, count)
    texts = contrast(text_feats, candidates.text_feats, candidates, temperature, count)
    return (images + texts) / 2
