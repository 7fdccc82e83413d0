"""What a step or an evaluation reads at once: dataclasses of tensors made on the host, and how they reach a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

MESSAGES_KEPT = 20

AnyBatch = TypeVar("AnyBatch", bound="HostBatch")


@dataclass
class HostBatch:
    """A dataclass of tensors, made on the host."""

    def pin_memory(self: AnyBatch) -> AnyBatch:
        """A copy in pinned memory, from which the host can send without waiting; `DataLoader` calls it."""
        return _with_tensors(self, lambda tensor: tensor.pin_memory())


@dataclass
class Batch(HostBatch):
    """Pairs or task samples.  Broken images are skipped, so that `batch` may be smaller than asked for, even 0.

    Attributes:
        images: uint8 `[images, 3, size, size]`, RGB; without `image_rows` `[batch * images_per_sample, ...]`, those of
            one sample beside each other.
        second_views: uint8 `[batch, 3, size, size]`, another view of each image of a pair; None where nothing reads it.
        image_rows: int64 `[batch, images_per_sample]`, the rows in `images` of each sample's images, where samples
            share images (in evaluation, and in training with data.share_images); else None.
        input_ids: int64 `[batch, tokens]`; [CLS] and word pieces, no [SEP], padded to the batch's longest.
        attention_mask: bool `[batch, tokens]`; True where not padding.
        image_ids: int64 `[batch]`; the same number for every text of one image.
        targets: what each sample is to be learned or measured by `[batch]`; None for pairs.
        texts: the texts as cleaned `[batch]`.
        keys: names each pair or sample for messages `[batch]`.
        epoch: the epoch of this batch.
        step: its index within the epoch.
        skipped: why pairs or samples were skipped, one message each.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    texts: list[str]
    keys: list[str]
    second_views: Tensor | None = None
    image_rows: Tensor | None = None
    targets: list[Any] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class ImageBatch(HostBatch):
    """Images to encode, in the order of the table.  Broken ones are skipped.

    Attributes:
        images: uint8 `[batch, 3, size, size]`, RGB, resized whole.
        indices: int64 `[batch]`; index of each image in the table.
        keys: names each image for messages `[batch]`.
        skipped: why images were skipped, one message each.
    """

    images: Tensor
    indices: Tensor
    keys: list[str]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


def to_device(batch: AnyBatch, device: torch.device | str) -> AnyBatch:
    """A copy on `device`; from pinned memory neither the host nor what the device still has to do waits for it."""
    device = torch.device(device)
    if device.type != "cuda":
        return _with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
    index = torch.cuda.current_device() if device.index is None else device.index
    user, copier = torch.cuda.current_stream(index), _copy_stream(index)

    def send(tensor: Tensor) -> Tensor:
        sent = tensor.to(device, non_blocking=True)
        sent.record_stream(user)
        return sent

    with torch.cuda.stream(copier):
        moved = _with_tensors(batch, send)
    user.wait_stream(copier)
    return moved


@functools.cache
def _copy_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _with_tensors(batch: AnyBatch, change: Callable[[Tensor], Tensor]) -> AnyBatch:
    values = {item.name: getattr(batch, item.name) for item in dataclasses.fields(batch)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **changed)


@dataclass
class SkipReport:
    """Pairs or samples that batches skipped: how many, and the first few by name.

    Attributes:
        count: how often one was skipped; one broken image counts once in every epoch.
        messages: the first twenty different reasons, each naming its sample.
    """

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, batch: Batch | ImageBatch) -> None:
        """Count what `batch` skipped."""
        self.count += len(batch.skipped)
        for message in batch.skipped:
            if len(self.messages) < MESSAGES_KEPT and message not in self.messages:
                self.messages.append(message)

    def lines(self) -> list[str]:
        """What to print; nothing when nothing was skipped."""
        if not self.count:
            return []
        more = [] if self.count <= len(self.messages) else ["(the first of them, by name)"]
        return [f"{self.count} samples were skipped because their image is broken:", *self.messages, *more]
