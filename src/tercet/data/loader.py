"""From a table to batches: worker processes read, decode, augment and tokenize, in the order that `order` says.

One task of a worker is one whole batch, named by (epoch, step).  Every random choice follows from (seed, epoch, slot),
so that any number of workers, and none, give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tercet.config import DataConfig
from tercet.data.augment import Compat
from tercet.data.batch import AnyBatch, Batch, ImageBatch, SkipReport
from tercet.data.images import ViewTransform, resize
from tercet.data.order import PairOrder
from tercet.data.table import Sample, SampleTable
from tercet.data.tokenizer import Tokenizer, clean_caption, mentions_sides
from tercet.data.workers import WorkerPool
from tercet.distributed import Ranks
from tercet.errors import TercetError

AUGMENT_STREAM = 7  # keeps the augmentation's random stream apart from others of the same seed

Clean = Callable[[str, int], str]


@dataclass
class _Plan:
    """What makes batches of a table, in any process.

    Attributes:
        table: pairs or samples.
        tokenizer: turns texts to ids.
        data: augmentation, text lengths, pixel limit.
        image_size: side of the images in pixels.
        clean: cleans a text and cuts it to a number of words.
    """

    table: SampleTable
    tokenizer: Tokenizer
    data: DataConfig
    image_size: int
    clean: Clean

    def collate(
        self,
        views: Sequence[Sequence[np.ndarray]],
        samples: Sequence[Sample],
        image_rows: list[list[int]] | None,
        skipped: list[str],
        epoch: int,
        step: int,
    ) -> Batch:
        """A batch of `samples`; `views` are the first and, where there are any, the second views of the images."""
        texts = [self.clean(sample.text, self.data.max_words) for sample in samples]
        input_ids, attention_mask = tokenize(self.tokenizer, texts, self.data.max_tokens)
        rows = None
        if image_rows is not None:
            rows = torch.tensor(image_rows, dtype=torch.int64).view(len(samples), self.table.images_per_sample)
        return Batch(
            images=stack(views[0], self.image_size),
            second_views=stack(views[1], self.image_size) if len(views) == 2 else None,
            image_rows=rows,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_ids=torch.from_numpy(self.table.image_ids[[sample.images[0] for sample in samples]]),
            targets=[sample.target for sample in samples],
            texts=texts,
            keys=[sample.key for sample in samples],
            epoch=epoch,
            step=step,
            skipped=skipped,
        )


@dataclass
class TrainPlan(_Plan):
    """Makes the training batch of (epoch, step): a pure function, whichever process calls it.

    Attributes:
        order: which pair or group of samples comes when.
        compat: 'published' for the published code's augmentation.
        groups: samples in the order of their groups, and where each group begins; None for pairs.
        views: of each image.
    """

    order: PairOrder
    compat: Compat
    groups: tuple[np.ndarray, np.ndarray] | None
    views: int

    def __post_init__(self) -> None:
        self._transform = ViewTransform(self.image_size, self.data.augment, self.data.crop_scale, self.compat)

    def __call__(self, number: tuple[int, int]) -> Batch:
        """The batch of `number`, an (epoch, step)."""
        epoch, step = number
        chosen = self.order.step_indices(epoch, step)
        views: list[list[np.ndarray]] = [[] for _ in range(self.views)]
        kept: list[Sample] = []
        rows: list[list[int]] = []
        skipped: list[str] = []
        numbers = (chosen.images.tolist(), chosen.captions.tolist(), chosen.slots.tolist())
        for image, caption, slot in zip(*numbers, strict=True):
            samples = self._samples(image, caption)
            rng = np.random.default_rng((AUGMENT_STREAM, self.order.seed, epoch, slot))
            try:
                made = self._make_views(samples, rng)
            except (OSError, TercetError) as error:
                skipped += [describe(sample.key, error) for sample in samples]
                continue
            rows += [list(range(len(views[0]), len(views[0]) + len(made)))] * len(samples)
            kept += samples
            for column, own in zip(views, zip(*made, strict=True), strict=True):
                column.extend(own)
        shared = self.groups is not None and self.data.share_images
        return self.collate(views, kept, rows if shared else None, skipped, epoch, step)

    def _samples(self, image: int, caption: int) -> list[Sample]:
        """The pair of an image and a caption; or the samples of group `image`, which have the same images."""
        if self.groups is None:
            return [Sample((image,), self.table.captions(image)[caption], None, self.table.key(image))]
        members, starts = self.groups
        return [self.table.sample(index) for index in members[starts[image] : starts[image + 1]].tolist()]

    def _make_views(self, samples: Sequence[Sample], rng: np.random.Generator) -> list[list[np.ndarray]]:
        """The views of each image of some samples; they are not mirrored where a text or target names a side."""
        words = " ".join(f"{sample.text} {'' if sample.target is None else sample.target}" for sample in samples)
        flip = self.data.flip and (self.compat == "published" or not mentions_sides(words))
        return [
            self._transform(self.table.encoded(image, self.data.pixel_limit), rng, self.views, flip)
            for image in samples[0].images
        ]


@dataclass
class SamplePlan(_Plan):
    """Makes evaluation batch `number`: samples in order, each different image of the batch once."""

    batch_size: int
    count: int

    def __call__(self, number: int) -> Batch:
        """Samples number * batch_size and following."""
        views: dict[int, np.ndarray] = {}
        kept: list[Sample] = []
        skipped: list[str] = []
        start = number * self.batch_size
        for index in range(start, min(start + self.batch_size, self.count)):
            sample = self.table.sample(index)
            try:
                made = {
                    image: resize(self.table.pixels(image, self.data.pixel_limit), self.image_size)
                    for image in sample.images
                    if image not in views
                }
            except (OSError, TercetError) as error:
                skipped.append(describe(sample.key, error))
                continue
            views.update(made)
            kept.append(sample)
        row_of = {image: row for row, image in enumerate(views)}
        rows = [[row_of[image] for image in sample.images] for sample in kept]
        return self.collate([list(views.values())], kept, rows, skipped, 0, number)


@dataclass
class ImagePlan:
    """Makes evaluation batch `number` of the images of a table."""

    table: SampleTable
    data: DataConfig
    image_size: int
    batch_size: int
    count: int

    def __call__(self, number: int) -> ImageBatch:
        """Images number * batch_size and following."""
        images: list[np.ndarray] = []
        kept: list[int] = []
        skipped: list[str] = []
        start = number * self.batch_size
        for index in range(start, min(start + self.batch_size, self.count)):
            try:
                images.append(resize(self.table.pixels(index, self.data.pixel_limit), self.image_size))
            except (OSError, TercetError) as error:
                skipped.append(describe(self.table.key(index), error))
                continue
            kept.append(index)
        keys = [self.table.key(index) for index in kept]
        return ImageBatch(stack(images, self.image_size), torch.tensor(kept, dtype=torch.int64), keys, skipped)


class TrainLoader:
    """Training batches of pairs or of task samples.

    Args:
        table: pairs, of which an image comes with one caption or every caption comes (`data.caption_choice`); or
            samples, of which each comes once an epoch.
        tokenizer: turns texts to ids.
        data: augmentation, text lengths, number of workers; whether samples of an image come together.
        image_size: side of the views in pixels.
        batch_size: pairs or samples a step, over all ranks together; with `data.share_images` images, or pairs of them.
        seed: every random choice follows from it, the epoch and the pair or sample.
        compat: 'published' for the published code's augmentation; it mirrors pictures whatever the text says.
        rank, world: this process among those that train together.
        drop_last: drop an epoch's last batch when it is smaller; a set smaller than a batch gives one batch.
        views: of each image of a pair; 1 where nothing reads the second.
        as_pairs: read the texts of a table of samples as the captions of their images.
        clean: cleans a text and cuts it to a number of words.

    Attributes:
        report: what was skipped so far, and why.
    """

    def __init__(
        self,
        table: SampleTable,
        tokenizer: Tokenizer,
        data: DataConfig,
        image_size: int,
        batch_size: int,
        seed: int,
        compat: Compat = "tercet",
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        views: Literal[1, 2] = 2,
        as_pairs: bool = False,
        clean: Clean = clean_caption,
    ) -> None:
        groups, block = None, table.block_size
        if table.has_samples and not as_pairs:
            count = table.sample_count
            groups = table.image_groups() if data.share_images else (np.arange(count), np.arange(count + 1))
            counts, choice, views, block = np.ones(len(groups[1]) - 1, np.int64), "random", 1, 1
        else:
            counts, choice = table.caption_counts, data.caption_choice
            if choice == "each" and len(counts):
                block *= max(1, round(float(counts.mean())))
        self.order = PairOrder(
            counts, batch_size, seed, choice, rank=rank, world=world, drop_last=drop_last, block_size=block
        )
        self.report = SkipReport()
        plan = TrainPlan(table, tokenizer, data, image_size, clean, self.order, compat, groups, views)
        self._pool: WorkerPool[Batch] = WorkerPool(plan, data.workers)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch; equal on all ranks."""
        return self.order.steps_per_epoch

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
    table: SampleTable,
    data: DataConfig,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    first_batch: int = 0,
    ranks: Ranks | None = None,
) -> Iterator[ImageBatch]:
    """The images of a table in order, or the first `limit` of them, by `data.workers` processes.

    Batches before `first_batch` are skipped.  With `ranks` come those of `batch_numbers` alone.

    Raises:
        TercetError: a worker process died.
    """
    count = min(table.image_count, limit or table.image_count)
    numbers = [number for number in batch_numbers(-(-count // batch_size), ranks) if number >= first_batch]
    plan = ImagePlan(table, data, image_size, batch_size, count)
    return _run(WorkerPool(plan, data.workers), numbers)


def sample_batches(
    table: SampleTable,
    tokenizer: Tokenizer,
    data: DataConfig,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    clean: Clean = clean_caption,
    ranks: Ranks | None = None,
) -> Iterator[Batch]:
    """The samples of a table in order, or the first `limit` of them; with `ranks` those of `batch_numbers` alone.

    Raises:
        TercetError: a worker process died.
    """
    count = min(table.sample_count, limit or table.sample_count)
    plan = SamplePlan(table, tokenizer, data, image_size, clean, batch_size, count)
    return _run(WorkerPool(plan, data.workers), batch_numbers(-(-count // batch_size), ranks))


def _run(pool: WorkerPool[AnyBatch], numbers: list[int]) -> Iterator[AnyBatch]:
    try:
        yield from pool.run(numbers)
    finally:
        pool.close()


def batch_numbers(batches: int, ranks: Ranks | None) -> list[int]:
    """The evaluation batches that are made here: all of them, or every `world`-th of them.

    Whole batches, so that each is computed as it would be on one rank alone, to the bit.
    """
    return list(range(batches) if ranks is None else range(ranks.rank, batches, ranks.world))


def caption_owners(table: SampleTable, limit: int | None = None) -> Tensor:
    """int64 `[captions]`: index of the image of each caption, in the order of `cleaned_captions`."""
    counts = np.asarray(table.caption_counts, np.int64)[:limit]
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def cleaned_captions(table: SampleTable, max_words: int, limit: int | None = None) -> Iterator[str]:
    """Every caption of a table, cleaned, in order: what a tokenizer is trained on."""
    for index in range(min(table.image_count, limit or table.image_count)):
        for caption in table.captions(index):
            yield clean_caption(caption, max_words)


def describe(key: str, error: OSError | TercetError) -> str:
    """Why an image or sample was skipped, beginning with its name."""
    file = getattr(error, "filename", None)
    reason = f"{getattr(error, 'strerror', None)} ({file})" if file else " ".join(str(error).split())
    return reason if reason.startswith(key) else f"{key}: {reason}"


def stack(views: Sequence[np.ndarray], size: int) -> Tensor:
    """Views `[height, width, 3]` as one uint8 `[batch, 3, size, size]`; none at all give a batch of 0."""
    batch = np.empty((len(views), 3, size, size), np.uint8)
    for row, view in zip(batch, views, strict=True):
        row[:] = view.transpose(2, 0, 1)
    return torch.from_numpy(batch)


def tokenize(tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and mask `[batch, tokens]`; without texts, tensors of 0 rows."""
    if not texts:
        return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.bool)
    return tokenizer.encode(texts, max_tokens)
