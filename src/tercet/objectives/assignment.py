"""Text assignment: which of two images a text belongs to, or neither (arXiv 2107.07651, section 5).

It teaches a model for two images before it sees any statement about two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST, SECOND, NEITHER = 0, 1, 2
IGNORED = -100
TEMPERATURE = 0.07
NEITHER_SHARE = 1 / 3


@dataclass
class Assignment:
    """Two images for every text of a batch.

    Attributes:
        first: index of the image in the first slot, `[batch]`.
        second: index of the image in the second slot, `[batch]`.
        labels: which of them belongs to the text, `[batch]`: `FIRST`, `SECOND` or `NEITHER`; `IGNORED` where the batch
            holds no other image.
    """

    first: Tensor
    second: Tensor
    labels: Tensor


def image_weights(image_feats: Tensor, same: Tensor) -> Tensor:
    """Chances `[batch, batch]` of drawing each image as a text's negative: alike ones are likelier.

    Args:
        image_feats: unit vectors `[batch, embed_dim]`.
        same: bool `[batch, batch]`, true where a column is the row's own image.

    Returns:
        Rows that sum to 1, or to 0 where there is no other image.
    """
    return _image_logits(image_feats, same).softmax(dim=1).nan_to_num(0.0)


@torch.no_grad()
def draw_assignment(image_feats: Tensor, same: Tensor) -> Assignment:
    """Draw the two images of every text, for the whole batch at once.

    Two times of three a text gets its own image and one other, in either order; else it gets two others.  Where the
    batch holds one other image only, it always gets its own.
    """
    logits = _image_logits(image_feats, same)
    batch, device = logits.shape[0], logits.device
    # The two largest of logits plus Gumbel noise are two draws without replacement.
    noise = -torch.empty_like(logits).exponential_().clamp_min(torch.finfo(logits.dtype).tiny).log()
    found = (logits + noise).masked_fill(same, float("-inf")).topk(min(2, batch), dim=1)
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


def assignment_loss(logits: Tensor, labels: Tensor, count: float | None = None) -> Tensor:
    """Cross-entropy of `[batch, 3]` logits, `[]`: the mean over the texts that have another image; 0 without any.

    `count` divides the sum instead of the number of those texts; with several ranks the mean number on a rank.
    """
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return losses / ((labels != IGNORED).sum().clamp(min=1) if count is None else count)


def _image_logits(image_feats: Tensor, same: Tensor) -> Tensor:
    feats = image_feats.float()
    with torch.autocast(feats.device.type, enabled=False):
        return (feats @ feats.T / TEMPERATURE).masked_fill(same, float("-inf"))
