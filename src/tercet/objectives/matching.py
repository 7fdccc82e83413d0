"""Image-text matching (`itm`) on hard negatives (section 3.5 of arXiv 2202.10401)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Negatives:
    """One hard negative of each kind for every pair of the batch.

    Attributes:
        images: for each text the index of an image that does not belong to it, `[batch]`.
        texts: for each image the index of a text that does not belong to it, `[batch]`.
        images_valid: bool `[batch]`; false where the batch holds no such image.
        texts_valid: bool `[batch]`; false where the batch holds no such text.
    """

    images: Tensor
    texts: Tensor
    images_valid: Tensor
    texts_valid: Tensor


def negative_weights(logits: Tensor, same: Tensor) -> Tensor:
    """Probabilities `[batch, batch]` of drawing each column: the softmax of the similarities without the positives.

    Args:
        logits: similarities over temperature `[batch, batch]`.
        same: bool `[batch, batch]`, true where a column shows the row's own image.

    Returns:
        Rows that sum to 1, or to 0 where every column is the row's own image.
    """
    return logits.masked_fill(same, float("-inf")).softmax(dim=1).nan_to_num(0.0)


@torch.no_grad()
def draw_negatives(image_logits: Tensor, text_logits: Tensor, same: Tensor) -> Negatives:
    """Draw, on the device and for the whole batch at once, one negative a row in proportion to its softmax.

    The positives are taken out before the softmax, so that a row cannot underflow to nothing; a row with no negative
    at all is marked instead of drawn.

    Args:
        image_logits: image to text similarities over temperature within the batch, `[batch, batch]`.
        text_logits: text to image similarities, `[batch, batch]`.
        same: bool `[batch, batch]`, true where image and text belong together.
    """

    def draw(logits: Tensor) -> Tensor:
        # Gumbel's trick: argmax(logits + noise) is a draw from softmax(logits), with neither a loop nor a host sync.
        noise = -torch.empty_like(logits).exponential_().clamp_min(torch.finfo(logits.dtype).tiny).log()
        return (logits + noise).masked_fill(same, float("-inf")).argmax(dim=1)

    valid = ~same.all(dim=1)
    return Negatives(images=draw(text_logits), texts=draw(image_logits), images_valid=valid, texts_valid=valid)


def matching_labels(batch: int, device: torch.device) -> Tensor:
    """Classes `[3 * batch]` of the matched pairs, then those with a negative image, then with a negative text."""
    labels = torch.zeros(3 * batch, dtype=torch.long, device=device)
    labels[:batch] = 1
    return labels


def matching(itm_logits: Tensor, negatives: Negatives) -> Tensor:
    """Cross-entropy over the matched pairs and those whose negative exists.

    Args:
        itm_logits: `[3 * batch, 2]`: matched, with a negative image, with a negative text.
        negatives: which of the unmatched pairs exist.

    Returns:
        The mean, `[]`.
    """
    batch = itm_logits.shape[0] // 3
    losses = F.cross_entropy(itm_logits, matching_labels(batch, itm_logits.device), reduction="none")
    matched = torch.ones_like(negatives.images_valid)
    valid = torch.cat([matched, negatives.images_valid, negatives.texts_valid]).to(losses.dtype)
    return (losses * valid).sum() / valid.sum().clamp(min=1)
