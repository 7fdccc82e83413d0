"""Worker processes that read, decode, augment and tokenise; batches come out in the order that `order` says.

One task of a worker is one whole batch, named by (epoch, step).  Every random choice follows from (seed, epoch, pair),
so that any number of workers, and none, give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tercet.config import DataConfig
from tercet.data.batches import Batch, ImageBatch, SkipReport, TextBatch
from tercet.data.images import EncodedImage, ViewTransform, resize
from tercet.data.order import PairOrder
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer, clean_caption, mentions_sides
from tercet.data.workers import WorkerPool
from tercet.distributed import Ranks
from tercet.errors import TercetError

__all__ = ["Batch", "ImageBatch", "SkipReport", "TextBatch", "TrainLoader", "image_batches", "text_batches"]

AUGMENT_STREAM = 7  # keeps the augmentation's random stream apart from others of the same seed


class TrainPlan:
    """Makes the training batch of (epoch, step): a pure function, whichever process calls it."""

    def __init__(
        self,
        source: SampleTable,
        tokenizer: Tokenizer,
        data: DataConfig,
        image_size: int,
        order: PairOrder,
        compat: Literal["tercet", "published"],
        views: Literal[1, 2],
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.data = data
        self.image_size = image_size
        self.order = order
        self.compat: Literal["tercet", "published"] = compat
        self.views = views
        self._image_ids = source.image_ids
        self._transform = ViewTransform(image_size, data.augment, data.crop_scale, compat)

    def __call__(self, number: tuple[int, int]) -> Batch:
        """The batch of `number`, an (epoch, step)."""
        epoch, step = number
        pairs = self.order.step_indices(epoch, step)
        views: list[list[np.ndarray]] = [[] for _ in range(self.views)]
        captions: list[str] = []
        kept: list[int] = []
        problems: list[str] = []
        for image, caption, slot in zip(
            pairs.images.tolist(), pairs.captions.tolist(), pairs.slots.tolist(), strict=True
        ):
            try:
                text = self.source.captions(image)[caption]
                rng = np.random.default_rng((AUGMENT_STREAM, self.order.seed, epoch, slot))
                flip = self.data.flip and (self.compat == "published" or not mentions_sides(text))
                encoded = encoded_picture(self.source, image, self.data.pixel_limit)
                made = self._transform(encoded, rng, self.views, flip)
            except (OSError, TercetError) as error:
                problems.append(describe(self.source, image, error))
                continue
            for column, view in zip(views, made, strict=True):
                column.append(view)
            captions.append(clean_caption(text, self.data.max_words))
            kept.append(image)
        input_ids, attention_mask = encode_captions(self.tokenizer, captions, self.data.max_tokens)
        return Batch(
            images=stack(views[0], self.image_size),
            second_views=stack(views[1], self.image_size) if self.views == 2 else None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_ids=torch.from_numpy(self._image_ids[kept]),
            captions=captions,
            keys=[self.source.key(image) for image in kept],
            epoch=epoch,
            step=step,
            skipped=len(problems),
            problems=problems,
        )


class ImagePlan:
    """Makes evaluation batch `number` of the images of a source."""

    def __init__(self, source: SampleTable, data: DataConfig, image_size: int, batch_size: int, count: int) -> None:
        self.source = source
        self.data = data
        self.image_size = image_size
        self.batch_size = batch_size
        self.count = count

    def __call__(self, number: int) -> ImageBatch:
        """Images number * batch_size and following."""
        images: list[np.ndarray] = []
        kept: list[int] = []
        problems: list[str] = []
        start = number * self.batch_size
        for index in range(start, min(start + self.batch_size, self.count)):
            try:
                pixels = self.source.pixels(index, self.data.pixel_limit)
            except (OSError, TercetError) as error:
                problems.append(describe(self.source, index, error))
                continue
            images.append(resize(pixels, self.image_size))
            kept.append(index)
        return ImageBatch(
            stack(images, self.image_size),
            torch.tensor(kept, dtype=torch.int64),
            [self.source.key(index) for index in kept],
            len(problems),
            problems,
        )


class TrainLoader:
    """Training batches.

    Args:
        source: the pairs.
        tokenizer: turns captions to ids.
        data: augmentation, caption lengths, number of workers.
        image_size: side of the views in pixels.
        batch_size: pairs a step, over all ranks together.
        seed: every random choice follows from it, the epoch and the pair.
        compat: 'published' for the published code's augmentation.
        rank, world: this process among those that train together.
        drop_last: leave out an epoch's last batch when it is smaller; a set smaller than a batch gives one batch.
        views: of each image; 1 where nothing reads the second.

    Attributes:
        report: what was left out so far, and why.
    """

    def __init__(
        self,
        source: SampleTable,
        tokenizer: Tokenizer,
        data: DataConfig,
        image_size: int,
        batch_size: int,
        seed: int,
        compat: Literal["tercet", "published"] = "tercet",
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        views: Literal[1, 2] = 2,
    ) -> None:
        counts = np.asarray(source.caption_counts)
        block = source.block_size
        if data.caption_choice == "each" and len(counts):
            block *= max(1, round(float(counts.mean())))
        self.order = PairOrder(
            counts,
            batch_size,
            seed,
            data.caption_choice,
            rank=rank,
            world=world,
            drop_last=drop_last,
            block_size=block,
        )
        self.report = SkipReport()
        plan = TrainPlan(source, tokenizer, data, image_size, self.order, compat, views)
        self._pool: WorkerPool[Batch] = WorkerPool(plan, data.workers)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch; equal on all ranks."""
        return self.order.steps_per_epoch

    @property
    def pairs_per_epoch(self) -> int:
        """Pairs of an epoch over all ranks, with those that a dropped last batch would hold."""
        return self.order.slot_count

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `first_step` on.

        Raises:
            TercetError: a worker process died.
        """
        for batch in self._pool.run([(epoch, step) for step in range(first_step, self.steps_per_epoch)]):
            self.report.add(batch)
            yield batch

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def image_batches(
    source: SampleTable,
    data: DataConfig,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    first_batch: int = 0,
    ranks: Ranks | None = None,
) -> Iterator[ImageBatch]:
    """The images of a source in order, or the first `limit` of them, by `data.workers` processes.

    Batches before `first_batch` are passed over.  With `ranks` whole batches are dealt to them in turn, and this rank's
    come.

    Raises:
        TercetError: a worker process died.
    """
    count = min(source.image_count, limit or source.image_count)
    plan = ImagePlan(source, data, image_size, batch_size, count)
    pool: WorkerPool[ImageBatch] = WorkerPool(plan, data.workers)
    try:
        due = dealt(-(-count // batch_size), ranks)
        yield from pool.run([number for number in due if number >= first_batch])
    finally:
        pool.close()


def text_batches(
    source: SampleTable,
    tokenizer: Tokenizer,
    data: DataConfig,
    batch_size: int,
    limit: int | None = None,
    ranks: Ranks | None = None,
) -> Iterator[TextBatch]:
    """All captions of a source's images in order, or of the first `limit` images; with `ranks`, see `image_batches`."""
    mine = set(dealt(-(-int(np.asarray(source.caption_counts, np.int64)[:limit].sum()) // batch_size), ranks))
    owners = caption_owners(source, limit)
    texts = cleaned_captions(source, data.max_words, limit)
    for start in range(0, len(owners), batch_size):
        captions = [text for _, text in zip(range(start, min(start + batch_size, len(owners))), texts, strict=False)]
        if start // batch_size not in mine:
            continue
        input_ids, attention_mask = encode_captions(tokenizer, captions, data.max_tokens)
        yield TextBatch(input_ids, attention_mask, owners[start : start + batch_size], captions)


def dealt(batches: int, ranks: Ranks | None) -> list[int]:
    """Numbers of the evaluation batches that come here: all of them, or of those dealt to `ranks` in turn this one's.

    Whole batches, so that each is computed as it would be on one rank alone, to the bit.
    """
    return list(range(batches) if ranks is None else range(ranks.rank, batches, ranks.world))


def caption_owners(source: SampleTable, limit: int | None = None) -> Tensor:
    """int64 [captions]: index of the image of each caption, in the order of `text_batches`."""
    counts = np.asarray(source.caption_counts, np.int64)[:limit]
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def cleaned_captions(source: SampleTable, max_words: int, limit: int | None = None) -> Iterator[str]:
    """Every caption of a source, cleaned, in order: what a tokenizer is trained on."""
    for index in range(min(source.image_count, limit or source.image_count)):
        for caption in source.captions(index):
            yield clean_caption(caption, max_words)


def encoded_picture(source: SampleTable, index: int, pixel_limit: int) -> EncodedImage:
    """Image `index`, its header read.

    Raises:
        OSError, TercetError: it cannot be read, or is no image.
    """
    return EncodedImage(source.image(index), source.key(index), pixel_limit)


def describe(source: SampleTable, index: int, error: OSError | TercetError) -> str:
    """Why image `index` was left out, beginning with its name."""
    key = source.key(index)
    file = getattr(error, "filename", None)
    reason = f"{getattr(error, 'strerror', None)} ({file})" if file else " ".join(str(error).split())
    return reason if reason.startswith(key) else f"{key}: {reason}"


def stack(views: Sequence[np.ndarray], size: int) -> Tensor:
    """Views [height, width, 3] as one uint8 [batch, 3, size, size]; none at all give a batch of 0."""
    batch = np.empty((len(views), 3, size, size), np.uint8)
    for place, view in zip(batch, views, strict=True):
        place[:] = view.transpose(2, 0, 1)
    return torch.from_numpy(batch)


def encode_captions(tokenizer: Tokenizer, captions: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [batch, tokens]; with no captions, tensors of 0 rows."""
    if not captions:
        return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.bool)
    return tokenizer.encode(captions, max_tokens)
