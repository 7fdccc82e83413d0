"""The state that the losses read: the teacher that follows the student, and the queue of earlier features."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.distributed import local_part
from tercet.model.tercet import Tercet

# Image id of a queue slot that nothing was written to yet; no image has it.
EMPTY_ID = -100


class Teacher(nn.Module):
    """An exponential moving average of the parts of the student that its outputs need.

    It stays in training mode with the student: the text's dropout twin is one of the two views that intra-modal
    contrast compares (arXiv 2202.10401, section 3.3).
    """

    def __init__(self, student: Tercet, parts: Collection[str]) -> None:
        """Copy the `parts` of `student` that are named, such as `("vision", "text", "fusion", "entailment_head")`."""
        super().__init__()
        self.model = copy.deepcopy(student)
        for name in [*(name for name, _ in self.model.named_children()), "temperature"]:
            if name not in parts:
                delattr(self.model, name)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, student: Tercet, momentum: float) -> None:
        """Move every parameter: `teacher = momentum * teacher + (1 - momentum) * student`."""
        followed = dict(student.named_parameters())
        names, own = zip(*self.model.named_parameters(), strict=True)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [local_part(parameter) for parameter in own],
            [local_part(followed[name].detach()) for name in names],
            1 - momentum,
        )


class FeatureQueue(nn.Module):
    """The teacher's features of earlier pairs: a ring of any size, fed by batches of any size.

    Attributes:
        image_feats: `[size, embed_dim]`.
        text_feats: `[size, embed_dim]`.
        image_ids: `[size]`; `EMPTY_ID` where nothing was written yet.
        pointer: the slot written next, `[]`.
    """

    image_feats: Tensor
    text_feats: Tensor
    image_ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image_feats", F.normalize(torch.randn(size, embed_dim), dim=-1))
        self.register_buffer("text_feats", F.normalize(torch.randn(size, embed_dim), dim=-1))
        self.register_buffer("image_ids", torch.full((size,), EMPTY_ID, dtype=torch.long))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, image_feats: Tensor, text_feats: Tensor, image_ids: Tensor, wanted: Tensor | None = None) -> None:
        """Write a batch at the pointer and advance it.

        Args:
            image_feats: `[batch, embed_dim]`.
            text_feats: `[batch, embed_dim]`.
            image_ids: `[batch]`.
            wanted: bool `[]`, on the device; where it is false nothing changes.  None is true.
        """
        batch = image_feats.shape[0]
        if self.size == 0 or batch == 0:
            return
        kept = slice(max(0, batch - self.size), None)
        slots = (self.pointer + torch.arange(batch, device=self.pointer.device)[kept]) % self.size
        advance = batch if wanted is None else wanted * batch
        for ring, new in (
            (self.image_feats, image_feats[kept]),
            (self.text_feats, text_feats[kept]),
            (self.image_ids, image_ids[kept]),
        ):
            new = new.to(ring.dtype)
            if wanted is not None:
                new = torch.where(wanted, new, ring.index_select(0, slots))
            ring.index_copy_(0, slots, new)
        self.pointer.copy_((self.pointer + advance) % self.size)
