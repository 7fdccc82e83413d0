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
        images: for each text the index of an image that does not belong to it, `[batch]`; with several ranks, among
            all their images where negatives are gathered.
        texts: for each image the index of a text that does not belong to it, `[batch]`; the same.
        images_valid: bool `[batch]`; false where there is no such image.
        texts_valid: bool `[batch]`; false where there is no such text.
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


def gumbel_noise(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """fp32 noise of a shape; argmax(logits + noise) is a draw from softmax(logits), with neither loop nor host sync."""
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


@torch.no_grad()
def draw_negatives(image_logits: Tensor, text_logits: Tensor, same: Tensor, noise: Tensor | None = None) -> Negatives:
    """Draw, on the device and for the whole batch at once, one negative a row in proportion to its softmax.

    The positives are taken out before the softmax, so that a row cannot underflow to nothing; a row with no negative
    at all is marked instead of drawn.

    Args:
        image_logits: image to text similarities over temperature, `[batch, samples]`: within the batch, or with several
            ranks among all their batches.
        text_logits: text to image similarities, `[batch, samples]`.
        same: bool `[batch, samples]`, true where image and text belong together.
        noise: `[2, batch, samples]` of `gumbel_noise`, for the texts and for the images; None draws it.
    """
    if noise is None:
        noise = gumbel_noise((2, *image_logits.shape), image_logits.device)

    def draw(logits: Tensor, noise: Tensor) -> Tensor:
        return (logits + noise).masked_fill(same, float("-inf")).argmax(dim=1)

    valid = ~same.all(dim=1)
    texts, images = draw(image_logits, noise[0]), draw(text_logits, noise[1])
    return Negatives(images=images, texts=texts, images_valid=valid, texts_valid=valid)


def matching_labels(batch: int, device: torch.device) -> Tensor:
    """Classes `[3 * batch]` of the matched pairs, then those with a negative image, then with a negative text."""
    labels = torch.zeros(3 * batch, dtype=torch.long, device=device)
    labels[:batch] = 1
    return labels


def matching(itm_logits: Tensor, negatives: Negatives, count: float | None = None) -> Tensor:
    """Cross-entropy over the matched pairs and those whose negative exists.

    Args:
        itm_logits: `[3 * batch, 2]`: matched, with a negative image, with a negative text.
        negatives: which of the unmatched pairs exist.
        count: divides the sum over pairs; None: as many as exist.  With several ranks the mean number on a rank.

    Returns:
        The mean, `[]`.
    """
    batch = itm_logits.shape[0] // 3
    losses = F.cross_entropy(itm_logits, matching_labels(batch, itm_logits.device), reduction="none")
    matched = torch.ones_like(negatives.images_valid)
    valid = torch.cat([matched, negatives.images_valid, negatives.texts_valid]).to(losses.dtype)
    return (losses * valid).sum() / (valid.sum().clamp(min=1) if count is None else count)
