"""What a step or an evaluation reads at once: dataclasses of tensors made on the host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

MESSAGES_KEPT = 20

Self = TypeVar("Self", bound="HostBatch")


@functools.cache
def _copy_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass
class HostBatch:
    """A dataclass of tensors, made on the host, that moves to a device as a whole."""

    def to(self: Self, device: torch.device | str) -> Self:
        """A copy on `device`; from pinned memory neither the host nor what the device still has to do waits for it."""
        device = torch.device(device)
        if device.type != "cuda":
            return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        index = torch.cuda.current_device() if device.index is None else device.index
        user, copier = torch.cuda.current_stream(index), _copy_stream(index)

        def send(tensor: Tensor) -> Tensor:
            sent = tensor.to(device, non_blocking=True)
            sent.record_stream(user)
            return sent

        with torch.cuda.stream(copier):
            moved = self._with_tensors(send)
        user.wait_stream(copier)
        return moved

    def pin_memory(self: Self) -> Self:
        """A copy in pinned memory, from which the host can send without waiting."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = change(value)
            elif isinstance(value, HostBatch):
                changed[item.name] = value._with_tensors(change)
        return dataclasses.replace(self, **changed)


@dataclass
class Batch(HostBatch):
    """Pairs of one step.  Broken images are left out, so that `batch` may be smaller than asked for, even 0.

    Attributes:
        images: uint8 [batch, 3, height, width], RGB.
        second_views: uint8 [batch, 3, height, width], another view of each image; None where nothing reads it.
        input_ids: int64 [batch, tokens]; [CLS] and word pieces, no [SEP], padded to the batch's longest.
        attention_mask: bool [batch, tokens]; True where not padding.
        image_ids: int64 [batch]; the same number for every caption of one image.
        captions: the captions as cleaned [batch].
        keys: names each sample for messages [batch].
        epoch: the epoch of this batch.
        step: its index within the epoch.
        skipped: samples that were broken and left out.
        problems: why, one message for each.
    """

    images: Tensor
    second_views: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    captions: list[str]
    keys: list[str]
    epoch: int = 0
    step: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class ImageBatch(HostBatch):
    """Images to encode, in the order of the source.  Broken ones are left out.

    Attributes:
        images: uint8 [batch, 3, height, width], RGB, resized whole.
        indices: int64 [batch]; index of each image in the source.
        keys: names each image for messages [batch].
        skipped: images that were broken and left out.
        problems: why, one message for each.
    """

    images: Tensor
    indices: Tensor
    keys: list[str]
    skipped: int = 0
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class TextBatch(HostBatch):
    """Captions to encode, in the order of the source.

    Attributes:
        input_ids: int64 [batch, tokens].
        attention_mask: bool [batch, tokens].
        image_indices: int64 [batch]; index in the source of the image that each caption belongs to.
        captions: the captions as cleaned [batch].
    """

    input_ids: Tensor
    attention_mask: Tensor
    image_indices: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass
class SampleBatch(HostBatch):
    """Samples of a downstream task.  Broken ones are left out, so that `batch` may be smaller than asked for, even 0.

    Attributes:
        images: uint8 [images, 3, height, width], RGB; where samples share none, [batch * images_per_sample, ...], those
            of one sample beside each other.
        image_rows: int64 [batch, images_per_sample]; row in `images` of each image of each sample, when samples share
            images (in evaluation, and in training with data.share_images).  None: sample i has the rows
            images_per_sample * i and following.
        input_ids: int64 [batch, tokens].
        attention_mask: bool [batch, tokens].
        targets: what each sample is to be learned or measured by [batch].
        texts: the texts as cleaned [batch].
        keys: names each sample for messages, file and row [batch].
        epoch: the epoch of this batch.
        step: its index within the epoch.
        skipped: samples that were broken and left out.
        problems: why, one message for each.
    """

    images: Tensor
    image_rows: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    targets: list[Any]
    texts: list[str]
    keys: list[str]
    epoch: int = 0
    step: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class SkipReport:
    """Samples that were left out of batches: how many, and the first few by name.

    Attributes:
        count: how often a sample was left out; one broken image counts once in every epoch.
        messages: the first twenty different reasons, each naming its sample.
    """

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, batch: Batch | ImageBatch | SampleBatch) -> None:
        """Count what `batch` left out."""
        self.count += batch.skipped
        for message in batch.problems:
            if len(self.messages) < MESSAGES_KEPT and message not in self.messages:
                self.messages.append(message)

    def lines(self) -> list[str]:
        """What to print; nothing when nothing was left out."""
        if not self.count:
            return []
        more = [] if self.count <= len(self.messages) else ["(the first of them, by name)"]
        return [f"{self.count} samples were left out because their image is broken:", *self.messages, *more]
