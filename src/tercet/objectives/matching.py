"""Image-text matching (`itm`) on hard negatives (section 3.5 of arXiv 2202.10401), and text assignment.

Text assignment (arXiv 2107.07651, section 5) asks which of two images a text belongs to, or neither: it prepares a
model for statements about two images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST, SECOND, NEITHER = 0, 1, 2
IGNORED = -100
ASSIGNMENT_TEMPERATURE = 0.07
NEITHER_SHARE = 1 / 3


@dataclass
class Negatives:
    """One hard negative of each kind for every pair of the batch.

    Attributes:
        images: for each text the index of an image that does not belong to it, `[batch]`; with several ranks, among
            all their images where negatives are gathered.
        texts: for each image the index of a text that does not belong to it, `[batch]`; the same.
        valid: bool `[batch]`; false where the batch has no other image.
    """

    images: Tensor
    texts: Tensor
    valid: Tensor


def gumbel_noise(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """fp32 noise of a shape; argmax(logits + noise) is a draw from softmax(logits), with neither loop nor host sync."""
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


@torch.no_grad()
def sample_negatives(image_logits: Tensor, text_logits: Tensor, same: Tensor, noise: Tensor | None = None) -> Negatives:
    """Draw, on the device and for the whole batch at once, one negative a row in proportion to its softmax.

    The positives are excluded before the softmax, so that a row cannot underflow to nothing; a row with no negative at
    all is marked instead of drawn.

    Args:
        image_logits: image to text similarities over temperature, `[batch, samples]`: within the batch, or with several
            ranks among all their batches.
        text_logits: text to image similarities, `[batch, samples]`.
        same: bool `[batch, samples]`, true where image and text belong together.
        noise: `[2, batch, samples]` of `gumbel_noise`, for the texts and for the images; None draws it.
    """
    if noise is None:
        noise = gumbel_noise((2, *image_logits.shape), image_logits.device)
    texts, images = ((torch.stack([image_logits, text_logits]) + noise).masked_fill(same, float("-inf"))).argmax(dim=2)
    return Negatives(images=images, texts=texts, valid=~same.all(dim=1))


def matching(itm_logits: Tensor, valid: Tensor, count: float | None = None) -> Tensor:
    """Cross-entropy over the matched pairs and those whose negative exists.

    Args:
        itm_logits: `[3 * batch, 2]`, class 1 a match: matched pairs, texts with a negative image, images with a
            negative text.
        valid: bool `[batch]`, which of the unmatched pairs exist.
        count: divides the sum over pairs; None: as many as exist.  See `average`.

    Returns:
        The mean, `[]`.
    """
    labels = torch.zeros(len(itm_logits), dtype=torch.long, device=itm_logits.device)
    labels[: len(valid)] = 1
    losses = F.cross_entropy(itm_logits, labels, reduction="none")
    exists = torch.cat([torch.ones_like(valid), valid, valid])
    return (losses * exists).sum() / (exists.sum() if count is None else count)


@dataclass
class Assignment:
    """Two images for every text of a batch.

    Attributes:
        first: index of the image in the first slot, `[batch]`.
        second: index of the image in the second slot, `[batch]`.
        labels: which of them belongs to the text, `[batch]`: `FIRST`, `SECOND` or `NEITHER`; `IGNORED` where the batch
            has no other image.
    """

    first: Tensor
    second: Tensor
    labels: Tensor


@torch.no_grad()
def sample_assignment(image_feats: Tensor, same: Tensor) -> Assignment:
    """Draw the two images of every text, for the whole batch at once; negatives are likelier the more similar they are.

    Two times of three a text gets its own image and one other, in either order; else it gets two others.  Where the
    batch has one other image only, it always gets its own.

    Args:
        image_feats: unit vectors `[batch, embed_dim]`.
        same: bool `[batch, batch]`, true where a column is the row's own image.
    """
    logits = assignment_similarity(image_feats)
    batch, device = logits.shape[0], logits.device
    # The two largest of logits plus Gumbel noise are two draws without replacement.
    noisy = logits + gumbel_noise(tuple(logits.shape), device)
    found = noisy.masked_fill(same, float("-inf")).topk(min(2, batch), dim=1)
    one, other = found.indices[:, 0], found.indices[:, -1]
    exists = found.values.isfinite()
    own = torch.arange(batch, device=device)
    matched = torch.rand(batch, device=device) > NEITHER_SHARE
    matched |= ~exists[:, -1] if batch > 1 else exists[:, 0]
    ahead = torch.rand(batch, device=device) > 0.5
    labels = torch.where(ahead, FIRST, SECOND).where(matched, NEITHER)
    return Assignment(
        first=torch.where(matched & ahead, own, one),
        second=torch.where(matched, torch.where(ahead, one, own), other),
        labels=labels.where(exists[:, 0], IGNORED),
    )


def assignment_similarity(image_feats: Tensor) -> Tensor:
    """Logits `[batch, batch]` that another image is drawn by, of unit vectors `[batch, embed_dim]`."""
    feats = image_feats.float()
    with torch.autocast(feats.device.type, enabled=False):
        return feats @ feats.T / ASSIGNMENT_TEMPERATURE


def assignment_loss(logits: Tensor, labels: Tensor, count: float | None = None) -> Tensor:
    """Cross-entropy of `[batch, 3]` logits, `[]`: the mean over the texts that have another image; 0 without any.

    `count` divides the sum instead of the number of those texts; see `average`.
    """
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return loss / ((labels != IGNORED).sum().clamp(min=1) if count is None else count)
