"""Pairs in tar shards, on this machine or behind URLs, read by position through their indexes."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tercet.config import DataConfig
from tercet.data.file_cache import FileCache, RemoteState, remote_state
from tercet.data.rows import Problems, SplitFilter
from tercet.data.shard_index import ShardIndex, index_path, load_index, save_index
from tercet.data.shards import BLOCK, read_shard
from tercet.data.storage import cache_folder, is_url, missing, read_range
from tercet.errors import TercetError

SEQUENTIAL_BLOCK = 1024  # neighbouring samples that a training reads about the same time, and the disk in one go
OPEN_SHARDS = 32
OPEN_INDEXES = 64
BLOCKS_REMEMBERED = 64
FETCH_AHEAD = 256 << 20  # bytes of a block that the system is asked to read at once
ASK_AT_ONCE = 16


@dataclass(frozen=True)
class Shard:
    """A shard: where it lies, and for a URL what its server said of it."""

    location: str
    remote: RemoteState | None = None


class ShardSource:
    """A source of tar shards.  In memory it holds a few numbers an image; the rest is mapped from the indexes.

    Args:
        shards: the shards, in order.
        indexes: of each.
        rows: int64 [images]; which rows of all shards together it has; None: all of them.
        cache: where copies of remote shards lie.
        problems: why samples were refused.

    Attributes:
        caption_counts: int32 [images].
        image_ids: int64 [images]; equal for images that were given the same `image_id`.
        block_size: how many neighbouring images are best read about the same time.
        fetches: blocks that this process began to read; each is one movement of a disk.
    """

    def __init__(
        self,
        shards: list[Shard],
        indexes: list[ShardIndex],
        rows: np.ndarray | None,
        cache: FileCache,
        problems: Sequence[str],
    ) -> None:
        self.problems = problems
        self.block_size = SEQUENTIAL_BLOCK
        self.fetches = 0
        self._shards = shards
        self._indexes = indexes
        self._rows = rows
        self._cache = cache
        self._starts = np.cumsum([0, *(index.count for index in indexes)], dtype=np.int64)
        counts = np.concatenate([np.zeros(0, np.int32), *(index.copied("counts") for index in indexes)])
        self.caption_counts = counts if rows is None else counts[rows]
        self.image_ids = self._shared_ids()
        self._forget()

    @property
    def image_count(self) -> int:
        """How many images there are."""
        return len(self.caption_counts)

    def image(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            TercetError: its shard is gone, was cut short or replaced since it was indexed, or cannot be fetched.
        """
        shard, row = self._place(index)
        mapped = self._index(shard)
        offset, size = int(mapped.column("offsets")[row]), int(mapped.column("sizes")[row])
        handle = self._handle(shard)
        self._fetch_ahead(shard, row, handle)
        data = read_range(handle, offset - BLOCK, BLOCK + size)
        if len(data) < BLOCK + size:
            raise self._changed(shard, f"it was cut short to {os.fstat(handle).st_size} bytes")
        if zlib.crc32(data[:BLOCK]) != int(mapped.column("marks")[row]):
            raise self._changed(shard, f"there is something else at byte {offset - BLOCK}")
        return data[BLOCK:]

    def captions(self, index: int) -> list[str]:
        """The captions of image `index` as they were written."""
        shard, row = self._place(index)
        return self._index(shard).captions(row)

    def key(self, index: int) -> str:
        """`shard.tar#KEY`."""
        shard, row = self._place(index)
        return f"{self._shards[shard].location}#{self._index(shard).key(row)}"

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of image `index`, and its row there."""
        row = int(index if self._rows is None else self._rows[index])
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard; the least recently used ones are unmapped."""
        index = self._indexes[shard]
        self._mapped[shard] = None
        self._mapped.move_to_end(shard)
        if len(self._mapped) > OPEN_INDEXES:
            self._indexes[self._mapped.popitem(last=False)[0]].unmap()
        return index

    def _handle(self, shard: int) -> int:
        # A forked worker may share these handles: reads name their position, so no two disturb each other.
        handle = self._handles.get(shard)
        if handle is None:
            if len(self._handles) >= OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
            handle = self._handles[shard] = open_shard(self._shards[shard], self._cache)
        self._handles.move_to_end(shard)
        return handle

    def _fetch_ahead(self, shard: int, row: int, handle: int) -> None:
        """Have the system read the whole block that a row lies in, in order, when the first of its rows is wanted.

        A training mixes the rows of a few blocks; the disk then still reads each block from end to end.
        """
        start = int(self._starts[shard])
        block = (start + row) // self.block_size
        if (shard, block) in self._blocks:
            self._blocks.move_to_end((shard, block))
            return
        self._blocks[shard, block] = None
        if len(self._blocks) > BLOCKS_REMEMBERED:
            self._blocks.popitem(last=False)
        self.fetches += 1
        index = self._indexes[shard]
        first = max(0, block * self.block_size - start)
        last = min(index.count, (block + 1) * self.block_size - start) - 1
        offset = int(index.column("offsets")[first]) - BLOCK
        length = int(index.column("offsets")[last] + index.column("sizes")[last]) - offset
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(handle, offset, min(length, FETCH_AHEAD), os.POSIX_FADV_WILLNEED)

    def _changed(self, shard: int, how: str) -> TercetError:
        location = self._shards[shard].location
        return TercetError(f"{location} has changed since it was indexed: {how}; start again to read it anew")

    def _shared_ids(self) -> np.ndarray:
        if not any(index.header["has_ids"] for index in self._indexes):
            return np.arange(self.image_count)
        given = np.concatenate([index.copied("image_ids") for index in self._indexes])
        if self._rows is not None:
            given = given[self._rows]
        ids = np.arange(len(given))
        named = np.flatnonzero(given)
        _, first, group = np.unique(given[named], return_index=True, return_inverse=True)
        ids[named] = named[first[group]]
        return ids

    def _forget(self) -> None:
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._mapped: OrderedDict[int, None] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        empty = {name: OrderedDict() for name in ("_handles", "_mapped", "_blocks")}
        return {**self.__dict__, **empty}

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", {}).values():
            os.close(handle)


def open_shards(files: Sequence[str], suffix: str | None, data: DataConfig, name: str | None = None) -> ShardSource:
    """The pairs of tar shards, each indexed now where it has no index of its present state.

    Args:
        files: the shards.
        suffix: the split after '#', if any.
        data: columns and cache.
        name: what the user called them, for messages; default the first shard.

    Raises:
        TercetError: a shard is missing, unreadable or compressed, or no shard gives a pair.
    """
    cache = shard_cache(data)
    with ThreadPoolExecutor(ASK_AT_ONCE) as pool:
        # One after the other the answers of servers would take minutes; local files answer at once.
        remote = dict(zip(urls := [file for file in files if is_url(file)], pool.map(remote_state, urls), strict=True))
    shards = [Shard(file, remote.get(file)) for file in files]
    indexes = [open_index(shard, data, cache) for shard in shards]
    chosen = SplitFilter(suffix)
    problems = Problems()
    for shard, index in zip(shards, indexes, strict=True):
        problems.extend_counted(
            [f"{shard.location}{message}" for message in index.header["problems"]], index.header["problem_count"]
        )
        for split, count in index.header["splits"].items():
            if count:
                chosen.count(split, count)
    shown = name or files[0]
    chosen.check(shown)
    rows = _chosen_rows(indexes, chosen)
    if not (sum(index.count for index in indexes) if rows is None else len(rows)):
        refused = f"; {len(problems)} refused, the first: {problems[0]}" if problems else ""
        looked_for = "KEY.jpg, .jpeg, .png or .webp with KEY.json or KEY.txt"
        raise TercetError(f"{shown}: no image with a caption found; looked for {looked_for}{refused}")
    return ShardSource(shards, indexes, rows, cache, problems)


def shard_cache(data: DataConfig) -> FileCache:
    """Where copies of remote shards lie, as the config says."""
    folder = Path(data.cache_folder) if data.cache_folder is not None else cache_folder() / "shards"
    return FileCache(folder, int(data.cache_gigabytes * 1e9))


def open_shard(shard: Shard, cache: FileCache) -> int:
    """A handle to read a shard, or its copy.

    Raises:
        TercetError: it is not there, or cannot be fetched.
    """
    if shard.remote is not None:
        return cache.open(shard.location, shard.remote)
    try:
        return os.open(shard.location, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise TercetError(missing(shard.location)) from error
    except OSError as error:
        raise TercetError(f"cannot read {shard.location}: {error.strerror}") from error


def open_index(shard: Shard, data: DataConfig, cache: FileCache) -> ShardIndex:
    """The index of a shard as it is now, made where there is none.

    Raises:
        TercetError: the shard cannot be read, or the index cannot be written.
    """
    path = index_path(shard.location)
    handle = None
    try:
        if shard.remote is not None:
            state = {"size": shard.remote.size, "mark": shard.remote.mark}
        else:
            handle = open_shard(shard, cache)
            found = os.fstat(handle)
            state = {"size": found.st_size, "mark": str(found.st_mtime_ns)}
        state |= {"caption_column": data.caption_column, "max_words": data.max_words}
        index = load_index(path, state)
        if index is not None:
            return index
        if handle is None:
            handle = open_shard(shard, cache)
        return save_index(path, state, read_shard(shard.location, handle, data))
    finally:
        if handle is not None:
            os.close(handle)


def _chosen_rows(indexes: list[ShardIndex], chosen: SplitFilter) -> np.ndarray | None:
    """int64 [images]: rows over all shards of the wanted splits; None when that is every row."""
    if chosen.wanted is None:
        return None
    rows: list[np.ndarray] = [np.zeros(0, np.int64)]
    start = 0
    for index in indexes:
        wanted = np.array([chosen.wants(name) for name in index.header["splits"]], bool)
        rows.append(start + np.flatnonzero(wanted[index.copied("splits")]))
        start += index.count
    return np.concatenate(rows)
