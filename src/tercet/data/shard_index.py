"""What a tar shard holds, in one small file beside it: captions packed, and where each image lies.

    SHARD.tar          the shard
    SHARD.tar.index    8 bytes that name the format, the length of a JSON header, the header, columns of numbers

Columns are mapped into memory and read where they are asked for, so that opening a hundred million pairs reads little
more than the headers, and worker processes share one copy.  An index belongs to one state of its shard (size and time
of change) and to the settings it was made with; another state or another setting makes it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tercet.data.packed import PackedStrings
from tercet.data.storage import cache_folder, is_url, writable
from tercet.errors import TercetError
from tercet.files import write_atomic

MAGIC = b"TERCETIX"
VERSION = 1
ALIGNMENT = 64
LARGEST_HEADER = 64 << 20
COLUMNS = {
    "offsets": "<i8",
    "sizes": "<i8",
    "marks": "<u4",
    "image_ids": "<u8",
    "splits": "<i4",
    "counts": "<i4",
    "first_caption": "<i8",
    "key_data": "|u1",
    "key_offsets": "<i8",
    "caption_data": "|u1",
    "caption_offsets": "<i8",
}


@dataclass(frozen=True)
class ShardContent:
    """What an index is made of.

    Attributes:
        keys: of each image [images].
        captions: those of one image beside each other [captions].
        offsets, sizes: int64 [images]; where in the shard its bytes lie.
        marks: uint32 [images]; CRC-32 of the tar header before them, by which a replaced shard is noticed.
        counts: int32 [images]; captions of each image.
        image_ids: uint64 [images]; a digest of the id that was given with it, 0 where none was.
        splits: int32 [images]; which of `split_names`.
        split_names: the values of `split`, '' for none.
        problems: messages of refused samples, without the name of the shard in front; the first thousand.
        problem_count: of all of them.
    """

    keys: PackedStrings
    captions: PackedStrings
    offsets: np.ndarray
    sizes: np.ndarray
    marks: np.ndarray
    counts: np.ndarray
    image_ids: np.ndarray
    splits: np.ndarray
    split_names: list[str]
    problems: list[str]
    problem_count: int


class ShardIndex:
    """An index on the disk; its columns are mapped when they are first read.

    Attributes:
        header: what was written with it.
        count: images.
    """

    def __init__(self, path: Path, header: dict[str, Any], start: int, identity: tuple[int, ...]) -> None:
        self.path = path
        self.header = header
        self.count = int(header["count"])
        self._start = start
        self._identity = identity
        self._bytes: np.ndarray | None = None

    def column(self, name: str) -> np.ndarray:
        """A column, mapped.

        Raises:
            TercetError: the index was replaced since it was opened, so the shard was.
        """
        if self._bytes is None:
            with self._reopened() as stream:
                self._bytes = np.memmap(stream, np.uint8, "r")
        offset, length = self.header["columns"][name]
        dtype = np.dtype(COLUMNS[name])
        start = self._start + offset
        return self._bytes[start : start + length * dtype.itemsize].view(dtype)

    def copied(self, name: str) -> np.ndarray:
        """A column, read into memory without a map of the file."""
        offset, length = self.header["columns"][name]
        with self._reopened() as stream:
            return np.fromfile(stream, COLUMNS[name], length, offset=self._start + offset)

    def key(self, row: int) -> str:
        """The key of image `row`."""
        return PackedStrings(self.column("key_data"), self.column("key_offsets"))[row]

    def captions(self, row: int) -> list[str]:
        """The captions of image `row`."""
        packed = PackedStrings(self.column("caption_data"), self.column("caption_offsets"))
        first, end = self.column("first_caption")[row : row + 2].tolist()
        return [packed[place] for place in range(first, end)]

    def _reopened(self) -> BinaryIO:
        """The file again, if it is still the one that the header came from."""
        try:
            stream = self.path.open("rb")
        except OSError as error:
            raise TercetError(f"cannot read {self.path}: {error.strerror}; start again to make it anew") from error
        if _identity(stream) == self._identity:
            return stream
        # Two programs that open a shard for the first time together both write its index, and write the same.
        again = load_index(self.path, self.header["state"])
        if again is not None and again.header == self.header and again._identity == _identity(stream):
            self._identity = again._identity
            return stream
        stream.close()
        raise TercetError(f"{self.path} was made anew: its shard has changed; start again to read it anew")

    def unmap(self) -> None:
        """Give the map of the file back; the next reader makes a new one."""
        self._bytes = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}


def index_path(location: str) -> Path:
    """Where the index of a shard lies: beside it, or in the cache folder where that cannot be or it is a URL."""
    beside = Path(f"{location}.index")
    if not is_url(location) and (beside.is_file() or writable(beside.parent)):
        return beside
    absolute = location if is_url(location) else str(Path(location).resolve())
    return cache_folder() / "indexes" / f"{hashlib.sha256(absolute.encode()).hexdigest()[:32]}.index"


def load_index(path: Path, state: Mapping[str, Any]) -> ShardIndex | None:
    """The index at `path`; None when there is none, or it was made of another state of the shard, or is damaged."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC) + 8)
            if len(start) < len(MAGIC) + 8 or not start.startswith(MAGIC):
                return None
            (length,) = struct.unpack("<q", start[len(MAGIC) :])
            if not 0 < length <= LARGEST_HEADER:
                return None
            header = json.loads(stream.read(length))
            end = stream.seek(0, 2)
            identity = _identity(stream)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(header, dict) or header.get("state") != dict(state) or header.get("version") != VERSION:
        return None
    first = _aligned(len(MAGIC) + 8 + length)
    return ShardIndex(path, header, first, identity) if _is_whole(header, first, end) else None


def save_index(path: Path, state: Mapping[str, Any], content: ShardContent) -> ShardIndex:
    """Write an index, whole or not at all, and open it.

    Raises:
        TercetError: it cannot be written there.
    """
    columns = {
        "offsets": content.offsets,
        "sizes": content.sizes,
        "marks": content.marks,
        "image_ids": content.image_ids,
        "splits": content.splits,
        "counts": content.counts,
        "first_caption": np.concatenate([[0], np.cumsum(content.counts, dtype=np.int64)]),
        "key_data": content.keys.data,
        "key_offsets": content.keys.offsets,
        "caption_data": content.captions.data,
        "caption_offsets": content.captions.offsets,
    }
    places: dict[str, list[int]] = {}
    parts: list[bytes] = []
    position = 0
    for name, kind in COLUMNS.items():
        data = np.ascontiguousarray(columns[name], kind).tobytes()
        places[name] = [position, len(columns[name])]
        parts.append(data + bytes(-len(data) % ALIGNMENT))
        position += len(parts[-1])
    header = {
        "version": VERSION,
        "state": dict(state),
        "count": len(content.offsets),
        "captions": len(content.captions),
        "has_ids": bool(np.any(content.image_ids)),
        "splits": dict(zip(content.split_names, _tally(content), strict=True)),
        "problems": content.problems,
        "problem_count": content.problem_count,
        "columns": places,
        "bytes": position,
    }
    encoded = json.dumps(header).encode()
    start = MAGIC + struct.pack("<q", len(encoded)) + encoded
    write_atomic(path, b"".join([start, bytes(-len(start) % ALIGNMENT), *parts]))
    found = load_index(path, state)
    if found is None:
        raise TercetError(f"{path} cannot be read back; is another program writing to it?")
    return found


def _tally(content: ShardContent) -> list[int]:
    return np.bincount(content.splits, minlength=len(content.split_names)).tolist()


def _identity(stream: BinaryIO) -> tuple[int, ...]:
    """What tells a file from another that takes its name."""
    found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _aligned(position: int) -> int:
    return position + -position % ALIGNMENT


def _is_whole(header: dict[str, Any], start: int, end: int) -> bool:
    """Whether a header says where every column lies, and the file reaches that far."""
    try:
        columns = header["columns"]
        if start + int(header["bytes"]) != end or set(columns) != set(COLUMNS):
            return False
        images, captions = int(header["count"]), int(header["captions"])
        lengths = {"first_caption": images + 1, "key_offsets": images + 1, "caption_offsets": captions + 1}
        for name, (offset, length) in columns.items():
            if offset < 0 or offset % ALIGNMENT or offset + length * np.dtype(COLUMNS[name]).itemsize > header["bytes"]:
                return False
            if not name.endswith("_data") and length != lengths.get(name, images):
                return False
        return isinstance(header["splits"], dict) and isinstance(header["problems"], list) and images >= 0
    except (KeyError, TypeError, ValueError):
        return False
