"""Batches of samples, by worker processes, in the order that `order` says.

As with pairs, one task of a worker is one whole batch, and every random choice follows from (seed, epoch, sample).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from tercet.config import DataConfig
from tercet.data.batches import SampleBatch, SkipReport
from tercet.data.images import ViewTransform, resize
from tercet.data.loader import dealt, encode_captions, stack
from tercet.data.order import PairOrder
from tercet.data.table import Sample, SampleTable
from tercet.data.tokenizer import Tokenizer, clean_caption, mentions_sides
from tercet.data.workers import WorkerPool
from tercet.distributed import Ranks
from tercet.errors import TercetError

Clean = Callable[[str, int], str]

SAMPLE_STREAM = 8  # keeps these random streams apart from others of the same seed


class SampleTrainPlan:
    """Makes the training batch of (epoch, step): a pure function, whichever process calls it."""

    def __init__(
        self,
        source: SampleTable,
        tokenizer: Tokenizer,
        data: DataConfig,
        image_size: int,
        order: PairOrder,
        compat: Literal["tercet", "published"],
        clean: Clean,
        groups: SampleGroups | None,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.data = data
        self.image_size = image_size
        self.order = order
        self.compat: Literal["tercet", "published"] = compat
        self.clean = clean
        self.groups = groups
        self._transform = ViewTransform(image_size, data.augment, data.crop_scale, compat)

    def __call__(self, number: tuple[int, int]) -> SampleBatch:
        """The batch of `number`, an (epoch, step)."""
        epoch, step = number
        kept: list[Sample] = []
        places: list[list[int]] = []
        views: list[np.ndarray] = []
        problems: list[str] = []
        for slot in self.order.step_indices(epoch, step).slots.tolist():
            samples = [self.source.sample(index) for index in self._members(slot)]
            rng = np.random.default_rng((SAMPLE_STREAM, self.order.seed, epoch, slot))
            try:
                seen = [self._view(image, samples, rng) for image in samples[0].images]
            except (OSError, TercetError) as error:
                problems += [_describe(sample, error) for sample in samples]
                continue
            places += [list(range(len(views), len(views) + len(seen)))] * len(samples)
            views += seen
            kept += samples
        texts = [self.clean(sample.text, self.data.max_words) for sample in kept]
        input_ids, attention_mask = encode_captions(self.tokenizer, texts, self.data.max_tokens)
        return SampleBatch(
            images=stack(views, self.image_size),
            image_rows=None if self.groups is None else _rows(places, self.source),
            input_ids=input_ids,
            attention_mask=attention_mask,
            targets=[sample.target for sample in kept],
            texts=texts,
            keys=[sample.key for sample in kept],
            epoch=epoch,
            step=step,
            skipped=len(problems),
            problems=problems,
        )

    def _members(self, slot: int) -> Sequence[int]:
        return (slot,) if self.groups is None else self.groups.members(slot)

    def _view(self, image: int, samples: Sequence[Sample], rng: np.random.Generator) -> np.ndarray:
        data = self.data
        pixels = self.source.pixels(image, data.pixel_limit)
        # An answer may tell sides though its question does not.
        told = " ".join(f"{sample.text} {sample.target}" for sample in samples)
        flip = data.flip and (self.compat == "published" or not mentions_sides(told))
        return self._transform(pixels, rng, 1, flip)[0]


class SamplePlan:
    """Makes evaluation batch `number`: samples in order, each different image of the batch once."""

    def __init__(
        self,
        source: SampleTable,
        tokenizer: Tokenizer,
        data: DataConfig,
        image_size: int,
        batch_size: int,
        count: int,
        clean: Clean,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.data = data
        self.image_size = image_size
        self.batch_size = batch_size
        self.count = count
        self.clean = clean

    def __call__(self, number: int) -> SampleBatch:
        """Samples number * batch_size and following."""
        views: dict[int, np.ndarray] = {}
        kept: list[Sample] = []
        problems: list[str] = []
        start = number * self.batch_size
        for index in range(start, min(start + self.batch_size, self.count)):
            sample = self.source.sample(index)
            try:
                seen = {image: self._view(image) for image in sample.images if image not in views}
            except (OSError, TercetError) as error:
                problems.append(_describe(sample, error))
                continue
            views.update(seen)
            kept.append(sample)
        places = {image: place for place, image in enumerate(views)}
        texts = [self.clean(sample.text, self.data.max_words) for sample in kept]
        input_ids, attention_mask = encode_captions(self.tokenizer, texts, self.data.max_tokens)
        return SampleBatch(
            images=stack(list(views.values()), self.image_size),
            image_rows=_rows([[places[image] for image in sample.images] for sample in kept], self.source),
            input_ids=input_ids,
            attention_mask=attention_mask,
            targets=[sample.target for sample in kept],
            texts=texts,
            keys=[sample.key for sample in kept],
            step=number,
            skipped=len(problems),
            problems=problems,
        )

    def _view(self, image: int) -> np.ndarray:
        return resize(self.source.pixels(image, self.data.pixel_limit), self.image_size)


class SampleGroups:
    """Samples that read the same images, in the same order of images.

    Args:
        source: the samples.
    """

    def __init__(self, source: SampleTable) -> None:
        self._order, self._starts = source.image_groups()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def members(self, group: int) -> list[int]:
        """The samples of a group."""
        return self._order[self._starts[group] : self._starts[group + 1]].tolist()


class SampleLoader:
    """Training batches of samples; each sample comes once an epoch.

    Args:
        source: the samples.
        tokenizer: turns texts to ids.
        data: augmentation, text lengths, number of workers; whether samples of an image come together.
        image_size: side of the views in pixels.
        batch_size: samples a step, over all ranks together; with `data.share_images` images, or pairs of images.
        seed: every random choice follows from it, the epoch and the sample.
        compat: 'published' for the published code's augmentation; it mirrors pictures whatever the text says.
        rank, world: this process among those that train together.
        drop_last: leave out an epoch's last batch when it is smaller; a set smaller than a batch gives one batch.
        clean: cleans a text and cuts it to a number of words.

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
        clean: Clean = clean_caption,
    ) -> None:
        groups = SampleGroups(source) if data.share_images else None
        ones = np.ones(source.sample_count if groups is None else len(groups), np.int64)
        self.order = PairOrder(ones, batch_size, seed, rank=rank, world=world, drop_last=drop_last)
        self.report = SkipReport()
        plan = SampleTrainPlan(source, tokenizer, data, image_size, self.order, compat, clean, groups)
        self._pool: WorkerPool[SampleBatch] = WorkerPool(plan, data.workers)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch; equal on all ranks."""
        return self.order.steps_per_epoch

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SampleBatch]:
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


def sample_batches(
    source: SampleTable,
    tokenizer: Tokenizer,
    data: DataConfig,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    clean: Clean = clean_caption,
    ranks: Ranks | None = None,
) -> Iterator[SampleBatch]:
    """The samples of a source in order, or the first `limit` of them, by `data.workers` processes.

    With `ranks` whole batches are dealt to them in turn, and this rank's come.

    Raises:
        TercetError: a worker process died.
    """
    count = min(source.sample_count, limit or source.sample_count)
    plan = SamplePlan(source, tokenizer, data, image_size, batch_size, count, clean)
    pool: WorkerPool[SampleBatch] = WorkerPool(plan, data.workers)
    try:
        yield from pool.run(dealt(-(-count // batch_size), ranks))
    finally:
        pool.close()


def _rows(places: list[list[int]], source: SampleTable) -> torch.Tensor:
    """`image_rows` of a batch, with the right shape for no samples as well."""
    return torch.tensor(places, dtype=torch.int64).view(len(places), source.images_per_sample)


def _describe(sample: Sample, error: OSError | TercetError) -> str:
    """Why a sample was left out, beginning with its file and row."""
    file = getattr(error, "filename", None)
    reason = f"{getattr(error, 'strerror', None)} ({file})" if file else " ".join(str(error).split())
    return f"{sample.key}: {reason}"
