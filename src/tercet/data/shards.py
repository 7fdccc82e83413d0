"""WebDataset tar shards: KEY.jpg with KEY.json and/or KEY.txt, on this machine or behind URLs.

A shard is walked once, header by header; what it holds goes into an Arrow file beside it, which later runs map into
memory.  Images are then read by position.

    SHARD.tar          the shard
    SHARD.tar.index    one record batch: name, texts, offset, size, mark, image_id, split

An index belongs to one state of its shard (size and time of change) and to the settings it was made with; with another
state or other settings it is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.config import DataConfig
from tercet.data.builders import ImageKeys, PairBuilder, nothing_found
from tercet.data.parts import TAR_BLOCK, TEXTS, RangePart, list_lengths
from tercet.data.rows import Rejected, SplitFilter
from tercet.data.storage import (
    FileCache,
    RemoteFile,
    cache_folder,
    find_remote,
    is_url,
    open_to_read,
    read_range,
    writable,
)
from tercet.data.table import SampleTable, shared_ids
from tercet.errors import TercetError
from tercet.files import atomic_stream

# Of several images of one key the first kind is taken.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe", "jp2", "j2k", "jpx"),
    *("ppm", "pgm", "pbm", "pnm", "dib"),
)
LONGEST_CAPTIONS = 64 << 20  # bytes of a sample's .json or .txt
LONGEST_HEADER = 1 << 20  # bytes of a member's name and attributes
ASK_AT_ONCE = 16
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
VERSION = 2
NOTES = {"rejected": list, "rejected_count": int, "splits": dict, "has_ids": bool, "without_caption": int}
SCHEMA = pa.schema(
    [
        ("name", pa.large_binary()),
        ("texts", TEXTS),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("mark", pa.uint32()),
        ("image_id", pa.uint64()),
        ("split", pa.int32()),
    ]
)

Parts = dict[str, tuple[int, int]]  # suffix -> offset and size of a member


class CutShortError(Exception):
    """The tar ends, or stops being one, before its end mark; the message says where."""


class ShardPart(RangePart):
    """The images of one shard.  It is pickled as the path of its index, which every process maps for itself.

    Args:
        file: path or URL.
        columns: of the index.
        index: path of the index.
        state: of the shard that the index was made of.
        remote: the shard, where it lies behind a URL.
        cache: where copies of remote shards lie.
    """

    def __init__(
        self,
        file: str,
        columns: pa.RecordBatch,
        index: Path,
        state: Mapping[str, Any],
        remote: RemoteFile | None,
        cache: FileCache,
    ) -> None:
        super().__init__(file, columns)
        self.index = index
        self.state = state
        self.remote = remote
        self.cache = cache

    def open(self) -> int:
        """A handle to the shard or its copy.  Raises TercetError when it is gone, or cannot be downloaded."""
        return open_to_read(self.file) if self.remote is None else self.cache.open(self.remote)

    def load_columns(self) -> pa.RecordBatch:
        """The columns in a process that has not mapped them yet."""
        found = load_index(self.index, self.state)
        if found is None:
            raise TercetError(f"{self.index} has changed, as its shard has; start again to read the new one")
        return found[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}


def open_shards(
    files: Sequence[str], suffix: str | None, data: DataConfig, name: str | None = None, need_captions: bool = True
) -> SampleTable:
    """The pairs of tar shards, each indexed now where it has no index of its present state.

    Args:
        files: the shards.
        suffix: the split after '#', if any.
        data: columns and cache.
        name: what the user called them, for messages; default the first shard.
        need_captions: skip the images without a caption.

    Raises:
        TercetError: a shard is missing, unreadable or compressed, or no shard gives a pair.
    """
    folder = Path(data.cache_folder) if data.cache_folder is not None else cache_folder() / "shards"
    cache = FileCache(folder, int(data.cache_gigabytes * 1e9))
    with ThreadPoolExecutor(ASK_AT_ONCE) as pool:  # one after the other, the answers of servers would take minutes
        remote = dict(zip(urls := [file for file in files if is_url(file)], pool.map(find_remote, urls), strict=True))
    chosen, rejected, found = SplitFilter(suffix), Rejected(), []
    for file in files:
        part, notes = _open_shard(file, remote.get(file), data, cache)
        found.append((part, notes))
        rejected.extend(Rejected([f"{file}{message}" for message in notes["rejected"]], notes["rejected_count"]))
        chosen.seen.update({split: count for split, count in notes["splits"].items() if count})
    shown = name or files[0]
    chosen.check(shown)
    parts: list[RangePart] = []
    ids: list[np.ndarray] = []
    for part, notes in found:
        keep = _kept(part, notes, chosen, need_captions)
        given = part.columns.column("image_id").to_numpy() if notes["has_ids"] else np.zeros(len(part), np.uint64)
        parts.append(part if keep is None else part.select(keep))
        ids.append(given if keep is None else given[keep])
    if not any(map(len, parts)):
        looked_for = "KEY.jpg, .png, .webp ... with KEY.json or KEY.txt"
        raise nothing_found(shown, looked_for, rejected, need_captions)
    shared = any(notes["has_ids"] for _, notes in found)
    return SampleTable(parts, rejected, shared_ids(np.concatenate(ids)) if shared else None)


def _kept(part: RangePart, notes: Mapping[str, Any], chosen: SplitFilter, need_captions: bool) -> np.ndarray | None:
    """The rows of a shard that are taken, int64; None for all."""
    keep = np.ones(len(part), bool)
    if chosen.wanted is not None:
        wanted = np.array([chosen.wants(split) for split in notes["splits"]], bool)
        split_of = part.columns.column("split").to_numpy()
        if len(split_of) and not 0 <= split_of.min() <= split_of.max() < len(wanted):
            raise TercetError(f"the index of {part.file} is damaged; delete it to have it made again")
        keep &= wanted[split_of]
    if need_captions and notes["without_caption"]:
        keep &= part.counts > 0
    return None if keep.all() else np.flatnonzero(keep)


def _open_shard(
    file: str, remote: RemoteFile | None, data: DataConfig, cache: FileCache
) -> tuple[ShardPart, dict[str, Any]]:
    """A shard by its index as it is now, made where there is none; and the notes in the index.

    Raises:
        TercetError: the shard cannot be read, or the index cannot be written.
    """
    path = index_path(file)
    handle = None
    try:
        if remote is not None:
            state: dict[str, Any] = {"size": remote.size, "mark": remote.mark}
        else:
            handle = open_to_read(file)
            status = os.fstat(handle)
            state = {"size": status.st_size, "mark": str(status.st_mtime_ns)}
        state |= {"caption_column": data.caption_column, "max_words": data.max_words}
        found = load_index(path, state)
        if found is None:
            handle = cache.open(remote) if handle is None and remote is not None else handle
            assert handle is not None
            save_index(path, state, *read_shard(file, handle, data))
            found = load_index(path, state)
        if found is None:
            raise TercetError(f"{path} cannot be read back; is another program writing to it?")
        return ShardPart(file, found[0], path, state, remote, cache), found[1]
    finally:
        if handle is not None:
            os.close(handle)


def index_path(location: str) -> Path:
    """Where the index of a shard lies: beside it, or in the cache folder where that cannot be or it is a URL."""
    beside = Path(f"{location}.index")
    if not is_url(location) and (beside.is_file() or writable(beside.parent)):
        return beside
    absolute = location if is_url(location) else str(Path(location).resolve())
    return cache_folder() / "indexes" / f"{hashlib.sha256(absolute.encode()).hexdigest()[:32]}.index"


def load_index(path: Path, state: Mapping[str, Any]) -> tuple[pa.RecordBatch, dict[str, Any]] | None:
    """The columns of an index, mapped, and its notes; None when it is missing, damaged, or of another state."""
    try:
        with pa.memory_map(str(path)) as mapped:
            reader = pa.ipc.open_file(mapped)
            notes = json.loads(reader.schema.metadata[b"tercet"])
            if notes["version"] != VERSION or notes["state"] != dict(state) or reader.num_record_batches != 1:
                return None
            columns = reader.get_batch(0)
        columns.validate()
        if not all(isinstance(notes[name], kind) for name, kind in NOTES.items()):
            return None
        lengths = list_lengths(columns.column("texts"))
        whole = columns.schema.equals(SCHEMA) and len(columns) == notes["images"]
        sound = not len(lengths) or (lengths.min() >= 0 and lengths.sum() == notes["captions"])
        return (columns, notes) if whole and sound else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, pa.ArrowException):
        return None


def save_index(path: Path, state: Mapping[str, Any], columns: pa.RecordBatch, notes: Mapping[str, Any]) -> None:
    """Write an index, whole or not at all.

    Raises:
        TercetError: it cannot be written there.
    """
    counts = {"images": len(columns), "captions": int(list_lengths(columns.column("texts")).sum())}
    metadata = {"version": VERSION, "state": dict(state), **counts, **notes}
    schema = SCHEMA.with_metadata({"tercet": json.dumps(metadata)})
    with atomic_stream(path) as stream, pa.ipc.new_file(stream, schema) as writer:
        writer.write_batch(columns.replace_schema_metadata(schema.metadata))


def read_shard(location: str, handle: int, data: DataConfig) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """What an open shard holds, images without a caption included, and notes about it.

    A shard that was cut short gives the samples before the cut, and one message.

    Raises:
        TercetError: it cannot be read, or is compressed.
    """
    rejected = Rejected()
    builder = PairBuilder(rejected, data.max_words)
    ranges, marks, splits, captioned, names = array("q"), array("I"), array("i"), array("b"), {"": 0}
    try:
        samples, cut = _samples(handle, location, rejected)
        last = next(reversed(samples), None)
        keys = ImageKeys(lambda offset, size: read_range(handle, offset, size))
        for key, parts in samples.items():
            image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
            halved = cut and key == last and (image is None or len(parts) == 1)  # the message about the cut says so
            where = f"{location}#{key}"
            if image is None:
                if halved:
                    continue
                rejected.add(f"{where}: no image; there are {', '.join(f'.{part}' for part in parts)}")
                continue
            record = None if halved else _record(handle, where, parts, data, rejected)
            texts = builder.check(where, record["caption"]) if record is not None else []
            record = record or {}
            image_id, split = record.get("image_id"), str(record.get("split") or "")
            builder.append(key, texts, image_id, keys.of(*image, image_id) + split.encode())
            ranges.extend(image)
            marks.append(zlib.crc32(read_range(handle, image[0] - TAR_BLOCK, TAR_BLOCK)))
            splits.append(names.setdefault(split, len(names)))
            captioned.append(bool(texts))
    except OSError as error:
        raise TercetError(f"cannot read {location}: {error.strerror}") from error
    if cut:
        rejected.add(f"{location}: {cut}; the {sum(captioned)} samples before that are used, what followed is lost")
    pairs = builder.finish()
    offsets, sizes = np.array(ranges, np.int64).reshape(-1, 2)[pairs.rows].T
    split_of = np.array(splits, np.int32)[pairs.rows]
    has_caption = list_lengths(pairs.texts) > 0
    arrays = [pairs.names, pairs.texts, offsets, sizes, np.array(marks, np.uint32)[pairs.rows], pairs.ids, split_of]
    columns = pa.RecordBatch.from_arrays([pa.array(one) for one in arrays], schema=SCHEMA)
    tally = np.bincount(split_of[has_caption], minlength=len(names)).tolist()
    return columns, {
        "rejected": [message.removeprefix(location) for message in rejected],
        "rejected_count": len(rejected),
        "splits": dict(zip(names, tally, strict=True)),
        "has_ids": bool(pairs.ids.any()),
        "without_caption": int((~has_caption).sum()),
    }


def _samples(handle: int, path: str, rejected: Rejected) -> tuple[dict[str, Parts], str | None]:
    """The members of an open shard by key, and where it was cut short, if it was.

    Raises:
        TercetError: it is compressed.
    """
    samples: dict[str, Parts] = {}
    try:
        for member in walk(handle):
            name = member.name.removeprefix("./")
            key, _, suffix = name.rpartition(".")
            if not key or posixpath.basename(name).startswith("."):
                continue
            parts = samples.setdefault(key, {})
            if suffix.lower() in parts:
                rejected.add(f"{path}#{key}: a second .{suffix} of the same key; the first is used")
            else:
                parts[suffix.lower()] = (member.offset_data, member.size)
    except CutShortError as error:
        start = read_range(handle, 0, 4)
        if not samples and (start[:2] == GZIP or start == ZSTD):
            raise TercetError(f"{path}: compressed; unpack it first, images do not get smaller by it") from error
        return samples, str(error)
    return samples, None


def _record(handle: int, where: str, parts: Parts, data: DataConfig, rejected: Rejected) -> dict[str, Any] | None:
    """Caption, split and image_id of a sample: from its .json, with the .txt where that has no caption."""
    value: Any = {}
    for suffix in ("json", "txt"):
        size = parts.get(suffix, (0, 0))[1]
        if size > LONGEST_CAPTIONS:
            rejected.add(f"{where}.{suffix}: {size} bytes are no caption")
            return None
    if "json" in parts:
        try:
            value = json.loads(read_range(handle, *parts["json"]))
        except (ValueError, RecursionError) as error:
            rejected.add(f"{where}.json: not JSON: {error}")
            return None
        if not isinstance(value, dict):
            rejected.add(f"{where}.json: {type(value).__name__}, not an object")
            return None
    caption = value.get(data.caption_column)
    if caption is None and "txt" in parts:
        try:  # one caption, whatever line breaks it has, as WebDataset's other readers take it
            caption = " ".join(read_range(handle, *parts["txt"]).decode("utf-8-sig").split("\n")).strip()
        except UnicodeDecodeError as error:
            rejected.add(f"{where}.txt: not UTF-8 at byte {error.start}")
            return None
    if caption is None:
        there = f"; the keys of its .json are {', '.join(value)}" if "json" in parts else ""
        rejected.add(f"{where}: no {data.caption_column!r}{there}")
        return None
    return {"caption": caption, "split": value.get("split"), "image_id": value.get("image_id")}


class _Headers(io.FileIO):
    """A tar of which headers alone are read: no forged length makes `tarfile` read more into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return super().read(size) or b""


def walk(handle: int) -> Iterator[tarfile.TarInfo]:
    """The regular files of an open tar (ustar, GNU or pax).

    `tarfile` takes a damaged header and a missing end mark for the end of the tar; here they are errors.

    Raises:
        CutShortError: a header is damaged, a member reaches past the end of the file, or the end mark is missing.
    """
    end = os.fstat(handle).st_size
    position, last = 0, "its start"
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        with _Headers(handle, closefd=False) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while True:
                member = tar.next()
                if member is None:
                    break
                if member.size < 0 or tar.offset <= member.offset:
                    raise CutShortError(f"a member of negative size at byte {position}, after {last}")
                if member.offset_data + member.size > end:
                    raise CutShortError(f"cut short at byte {end}, inside {member.name}")
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - else every header stays in memory
                if member.isreg() and not member.issparse():
                    yield member
                position, last = tar.offset, member.name
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if position >= end:
            raise CutShortError(f"cut short at byte {end}, after {last}") from error
        raise CutShortError(f"not a tar header at byte {position}, after {last} ({error})") from error
    header = read_range(handle, position, TAR_BLOCK)
    if len(header) < TAR_BLOCK:
        raise CutShortError(f"cut short at byte {end}, after {last}")
    if header.strip(b"\0"):
        raise CutShortError(f"not a tar header at byte {position}, after {last}")
