"""Contrast between global features: cross-modal alignment (`cma`) and intra-modal contrast (`imc`).

Section 3.2 and 3.3 of arXiv 2202.10401.  Every student feature is compared with the teacher's features of the batch
and with those of the queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.objectives.features import EMPTY_ID, FeatureQueue

# Added to the logit of what must not count.  Finite, since -inf times a target of 0 is NaN.
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
        text_feats: `[batch, embed_dim]`, the teacher's; the same.
        image_ids: `[batch]`; captions of one image are positives of one another, through the queue too.  None makes
            every pair its own only positive, as the published pre-training does.
        queue: earlier features, as they were before this batch.
        exclude_empty: leave out slots never written to; the published code compares with their random start.
        rows: the pairs of the batch that are compared with it; all, or those of this rank.
    """
    batch, device = image_feats.shape[0], image_feats.device
    targets = same_image(image_ids, batch, device)[rows].to(image_feats.dtype)
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
    feats: Tensor, candidates: Tensor | tuple[Tensor, ...], temperature: Tensor, excluded: Tensor | None = None
) -> Tensor:
    """Logits `[batch, candidates]`: cosines over temperature.

    Args:
        feats: `[batch, embed_dim]`.
        candidates: `[candidates, embed_dim]`, in one piece or in several.
        temperature: `[]`.
        excluded: bool `[candidates]`, true for those that must not count.
    """
    pieces = (candidates,) if isinstance(candidates, Tensor) else candidates
    # The few rows are scaled, not their many products.
    scaled = feats / temperature
    logits = torch.cat([scaled @ piece.T for piece in pieces], dim=1)
    return logits if excluded is None else logits.masked_fill(excluded, EXCLUDED)


def soft_cross_entropy(logits: Tensor, targets: Tensor, count: float | None = None) -> Tensor:
    """Cross-entropy of `logits` and `targets`, both `[batch, candidates]`: the mean over rows, `[]`.

    `count` divides the sum over rows instead of their number: with several ranks the mean number of rows on a rank, so
    that the mean over the ranks is the mean over all rows.
    """
    losses = -(logits.log_softmax(dim=1) * targets).sum(dim=1)
    return losses.mean() if count is None else losses.sum() / count


def pairwise_sigmoid(logits: Tensor, targets: Tensor, count: float | None = None) -> Tensor:
    """Each pair judged alone (arXiv 2303.15343): cross-entropy summed over candidates, and its mean over rows, `[]`.

    Args:
        logits: `[batch, candidates]`; `sigmoid_bias` is part of them.
        targets: `[batch, candidates]` between 0 and 1.
        count: see `soft_cross_entropy`.
    """
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
    return losses.mean() if count is None else losses.sum() / count


def sigmoid_bias(candidates: int) -> float:
    """What is added to cosines over temperature before a sigmoid: the log odds of one positive among `candidates`.

    The published bias is learned, from -10 on; this is where it must lie for features that say nothing yet, and needs
    no parameter that a checkpoint of this model has no place for.
    """
    return -math.log(max(1, candidates - 1))


def cross_modal(
    image_feats: Tensor,
    text_feats: Tensor,
    teacher_image_feats: Tensor | None,
    teacher_text_feats: Tensor | None,
    candidates: Candidates,
    temperature: Tensor,
    alpha: float,
    count: float | None = None,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-modal alignment: image to text and text to image.

    Args:
        image_feats: the student's, `[batch, embed_dim]`.
        text_feats: the student's, `[batch, embed_dim]`.
        teacher_image_feats: `[batch, embed_dim]`; None, with `alpha` 0, when there is no teacher.
        teacher_text_feats: the same for text.
        candidates: what both are compared with.
        temperature: `[]`.
        alpha: share of the teacher's own similarities in the targets.
        count: see `soft_cross_entropy`.
        sigmoid: judge each pair alone (`pairwise_sigmoid`), not as one of its row as published.

    Returns:
        The two losses, `[]` each; `cma` is their mean.
    """
    bias = sigmoid_bias(candidates.targets.shape[1]) if sigmoid else 0.0
    hard = (candidates.targets > 0).to(candidates.targets.dtype) if sigmoid else candidates.targets

    def compare(logits: Tensor, targets: Tensor) -> Tensor:
        return (
            pairwise_sigmoid(logits + bias, targets, count) if sigmoid else soft_cross_entropy(logits, targets, count)
        )

    def believe(logits: Tensor) -> Tensor:
        return (logits + bias).sigmoid() if sigmoid else logits.softmax(dim=1)

    def loss(feats: Tensor, teacher_feats: Tensor | None, others: tuple[Tensor, ...]) -> Tensor:
        if alpha == 0 or teacher_feats is None:
            logits = similarity(feats, others, temperature, candidates.excluded)
            return compare(logits, hard)
        # One product for both: it costs what reading the queue costs, however few the rows are.
        both = similarity(torch.cat([feats, teacher_feats]), others, temperature, candidates.excluded)
        logits, believed = both.chunk(2)
        return compare(logits, alpha * believe(believed.detach()) + (1 - alpha) * hard)

    image_to_text = loss(image_feats, teacher_image_feats, candidates.text_feats)
    text_to_image = loss(text_feats, teacher_text_feats, candidates.image_feats)
    return image_to_text, text_to_image


def intra_modal(
    image_feats: Tensor, text_feats: Tensor, candidates: Candidates, temperature: Tensor, count: float | None = None
) -> tuple[Tensor, Tensor]:
    """Intra-modal contrast: an image and its other view, a text and its dropout twin; hard targets.

    Args:
        image_feats: the student's, `[batch, embed_dim]`.
        text_feats: the student's, `[batch, embed_dim]`.
        candidates: what both are compared with.
        temperature: `[]`.
        count: see `soft_cross_entropy`.

    Returns:
        The two losses, `[]` each; `imc` is their mean.
    """
    image_logits = similarity(image_feats, candidates.image_feats, temperature, candidates.excluded)
    text_logits = similarity(text_feats, candidates.text_feats, temperature, candidates.excluded)
    targets = candidates.targets
    return soft_cross_entropy(image_logits, targets, count), soft_cross_entropy(text_logits, targets, count)
