"""One Arrow table for all data: where each image's bytes lie, its texts, and what the tasks are to learn of them.

A `SampleTable` holds images in `parts`, whose columns are Arrow record batches: worker processes share one copy, and
ten million pairs open in a second.

Pairs are the texts of the images.  Task samples are rows of their own, each with one or more images, a text and a
target.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.data.images import EncodedImage
from tercet.data.parts import FilePart, Part, RangePart
from tercet.data.rows import Rejected
from tercet.errors import TercetError

OPEN_FILES = 32
BLOCKS_REMEMBERED = 64


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Attributes:
        images: indices of its images in the table; equally many for all samples.
        text: the sentence or question as it was written.
        target: what the task learns or is measured by: plain values, as JSON has them.
        key: names the sample in messages: file and row.
    """

    images: tuple[int, ...]
    text: str
    target: Any
    key: str


@dataclass(frozen=True)
class Samples:
    """The samples of a table.

    Attributes:
        images: int64 `[samples, images_per_sample]`.
        columns: `text`, `target` as JSON, and `key`.
    """

    images: np.ndarray
    columns: pa.RecordBatch


class SampleTable:
    """Images with their texts, or task samples over images.  Read from several processes, and picklable.

    Attributes:
        parts: the images.
        rejected: messages of rejected rows, each naming its file and row.
        image_ids: int64 `[images]`, equal for images that count as the same.
        block_size: how many neighbouring images are best read about the same time; 1: any order is as good.
        read_aheads: blocks that this process began to read; each is one movement of a disk.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rejected: Sequence[str] = (),
        image_ids: np.ndarray | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.parts = list(parts)
        self.rejected = rejected
        self._starts = np.cumsum([0, *map(len, self.parts)], dtype=np.int64)
        self.image_ids = np.arange(self.image_count) if image_ids is None else image_ids
        self.block_size = max((part.block_size for part in self.parts), default=1)
        self._samples = samples
        self.read_aheads = 0
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], None] = OrderedDict()

    @property
    def image_count(self) -> int:
        """How many images there are."""
        return int(self._starts[-1])

    @property
    def sample_count(self) -> int:
        """How many samples there are; of a table of pairs, how many pairs."""
        return int(self.caption_counts.sum()) if self._samples is None else len(self._samples.images)

    @property
    def has_samples(self) -> bool:
        """Whether this is a table of task samples, not of pairs."""
        return self._samples is not None

    @property
    def images_per_sample(self) -> int:
        """How many images every sample has."""
        return 1 if self._samples is None else self._samples.images.shape[1]

    @cached_property
    def caption_counts(self) -> np.ndarray:
        """Integers `[images]`: texts of each image."""
        if self._samples is not None:
            return np.bincount(self._samples.images[:, 0], minlength=self.image_count)
        return np.concatenate([np.zeros(0, np.int32), *(part.counts for part in self.parts)])

    @cached_property
    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples in the order of their images, and where those of each image begin."""
        assert self._samples is not None
        order = np.argsort(self._samples.images[:, 0], kind="stable")
        return order, np.concatenate([[0], np.cumsum(self.caption_counts)])

    def captions(self, index: int) -> list[str]:
        """The texts of image `index` as they were written."""
        if self._samples is None:
            part, row = self.find(index)
            return self.parts[part].texts(row)
        order, starts = self._by_image
        texts = self._samples.columns.column("text")
        return [texts[row].as_py() for row in order[starts[index] : starts[index + 1]].tolist()]

    def sample(self, index: int) -> Sample:
        """Sample `index` of a table of samples."""
        assert self._samples is not None
        text, target, key = (self._samples.columns.column(name)[index].as_py() for name in ("text", "target", "key"))
        return Sample(tuple(self._samples.images[index].tolist()), text, json.loads(target), key)

    def image_groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples that read the same images in the same order.

        Returns:
            Samples int64 `[samples]`, those of one group beside each other and groups in the order of their first
            samples; and where each group begins, int64 `[groups + 1]`.
        """
        assert self._samples is not None
        _, first, group = np.unique(self._samples.images, axis=0, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))[group.reshape(-1)]
        return np.argsort(rank, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(rank))])

    def image(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        number, row = self.find(index)
        part = self.parts[number]
        if isinstance(part, FilePart):
            return part.read(row)
        handle = self._handle(number)
        self._read_ahead(number, row, handle)
        return part.read(row, handle)

    def encoded(self, index: int, pixel_limit: int) -> EncodedImage:
        """Image `index`, its header read.  Raises OSError or TercetError when it cannot be read, or is no image."""
        return EncodedImage(self.image(index), self.key(index), pixel_limit)

    def pixels(self, index: int, pixel_limit: int) -> np.ndarray:
        """Image `index` decoded, uint8 `[height, width, 3]`.  Raises OSError or TercetError when it cannot be read."""
        return self.encoded(index, pixel_limit).pixels()

    def key(self, index: int) -> str:
        """What names image `index` in messages: its path, or `shard.tar#KEY`."""
        part, row = self.find(index)
        return self.parts[part].key(row)

    def location(self, index: int) -> str:
        """As `key` in a way that holds in any working folder: with an absolute path or URL."""
        part, row = self.find(index)
        return self.parts[part].location(row)

    def find(self, index: int) -> tuple[int, int]:
        """The part of image `index`, and its row there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, int(index - self._starts[part])

    def with_samples(self, samples: Samples, rejected: Sequence[str]) -> SampleTable:
        """The images that `samples` name, as the images of a table of samples."""
        used, positions = np.unique(samples.images, return_inverse=True)
        ends = np.searchsorted(used, self._starts)
        parts = [
            part.select(used[first:end] - start)
            for part, start, first, end in zip(self.parts, self._starts, ends, ends[1:], strict=False)
            if end > first
        ]
        return SampleTable(parts, rejected, None, Samples(positions.reshape(samples.images.shape), samples.columns))

    def _handle(self, number: int) -> int:
        # A forked worker may share these handles: reads name their position, so no two disturb each other.
        handle = self._handles.get(number)
        if handle is None:
            if len(self._handles) >= OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            part = self.parts[number]
            assert isinstance(part, RangePart)
            handle = self._handles[number] = part.open()
        self._handles.move_to_end(number)
        return handle

    def _read_ahead(self, number: int, row: int, handle: int) -> None:
        """Read a whole block in order when the first of its images is wanted.

        A training mixes the images of a few blocks; the disk then still reads each block from end to end.
        """
        part = self.parts[number]
        assert isinstance(part, RangePart)
        block = number, part.physical(row) // part.block_size
        if block not in self._blocks:
            self._blocks[block] = None
            if len(self._blocks) > BLOCKS_REMEMBERED:
                self._blocks.popitem(last=False)
            self.read_aheads += 1
            part.read_ahead(row, handle)
        self._blocks.move_to_end(block)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict(), "_blocks": OrderedDict()}

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", {}).values():
            os.close(handle)


def concatenate(tables: Sequence[SampleTable]) -> SampleTable:
    """Several tables one after the other, as one.

    Raises:
        TercetError: there are none.
    """
    if not tables:
        raise TercetError("no data given; name a file, a folder, or a glob of tar shards")
    if len(tables) == 1:
        return tables[0]
    starts = np.cumsum([0, *(table.image_count for table in tables)])
    rejected = Rejected()
    for table in tables:
        rejected.extend(table.rejected)
    ids = np.concatenate([table.image_ids + start for table, start in zip(tables, starts, strict=False)])
    parts = [part for table in tables for part in table.parts]
    samples = None
    if all(table._samples is not None for table in tables):
        given = [table._samples for table in tables if table._samples is not None]
        rows = np.concatenate([one.images + start for one, start in zip(given, starts, strict=False)])
        columns = pa.Table.from_batches([one.columns for one in given])
        samples = Samples(rows, columns.combine_chunks().to_batches()[0])
    return SampleTable(parts, rejected, ids, samples)


def shared_ids(digests: np.ndarray) -> np.ndarray:
    """int64 `[images]`, the first image with the same digest, uint64 `[images]`; 0 is no digest: its own."""
    ids = np.arange(len(digests))
    named = np.flatnonzero(digests)
    _, first, group = np.unique(digests[named], return_index=True, return_inverse=True)
    ids[named] = named[first[group]]
    return ids
