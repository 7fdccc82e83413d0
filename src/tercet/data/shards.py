"""WebDataset tar shards: KEY.jpg with KEY.json and/or KEY.txt.

A shard is walked once, header by header, to note where each image lies (`shard_index`); images are then read by
position (`shard_source`).  The walk is our own because it must tell a shard that was cut short from a whole one, and
name the place.
"""

from __future__ import annotations

import json
import os
import posixpath
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tercet.config import DataConfig
from tercet.data.rows import PairCollector, Problems, digest_of_id
from tercet.data.shard_index import ShardContent
from tercet.data.storage import read_range
from tercet.errors import TercetError

BLOCK = 512
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
LONGEST_CAPTIONS = 64 << 20  # bytes of a sample's .json or .txt
LONGEST_HEADER = 1 << 20  # bytes of a member's name and attributes
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class Sample:
    """The members that share a key: suffix -> (offset, size)."""

    parts: dict[str, tuple[int, int]] = field(default_factory=dict)


class CutShortError(Exception):
    """The tar ends, or stops being one, before its end mark; the message says where."""


def read_shard(location: str, handle: int, data: DataConfig) -> ShardContent:
    """What an open shard holds.  One that was cut short gives the samples before the cut, and one problem.

    Raises:
        TercetError: it cannot be read, or is compressed.
    """
    problems = Problems()
    collector = PairCollector(problems, data.max_words)
    places, marks = array("q"), array("I")
    image_ids, splits, split_names = array("Q"), array("i"), {"": 0}
    try:
        samples, cut = shard_samples(handle, location, problems)
        last = next(reversed(samples), None)
        for key, sample in samples.items():
            image = next((sample.parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample.parts), None)
            if cut and key == last and (image is None or len(sample.parts) == 1):
                continue  # the cut took its other half, as the message about the cut tells
            where = f"{location}#{key}"
            if image is None:
                problems.add(f"{where}: no image; there are {', '.join(f'.{part}' for part in sample.parts)}")
                continue
            record = _record(handle, where, sample, data, problems)
            if record is None or not collector.add(where, key, record.get("caption")):
                continue
            places.extend(image)
            marks.append(zlib.crc32(read_range(handle, image[0] - BLOCK, BLOCK)))
            image_id, split = record.get("image_id"), record.get("split")
            image_ids.append(0 if image_id is None else digest_of_id(image_id))
            splits.append(split_names.setdefault("" if split is None else str(split), len(split_names)))
    except OSError as error:
        raise TercetError(f"cannot read {location}: {error.strerror}") from error
    if cut:
        problems.add(f"{location}: {cut}; the {len(collector)} samples before that are used, what followed is lost")
    pairs = collector.finish()
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return ShardContent(
        keys=pairs.keys,
        captions=pairs.captions,
        offsets=offsets,
        sizes=sizes,
        marks=np.array(marks, np.uint32),
        counts=np.diff(pairs.first_caption).astype(np.int32),
        image_ids=np.array(image_ids, np.uint64),
        splits=np.array(splits, np.int32),
        split_names=list(split_names),
        problems=[message.removeprefix(location) for message in problems],
        problem_count=len(problems),
    )


def shard_samples(handle: int, path: str, problems: Problems) -> tuple[dict[str, Sample], str | None]:
    """The members of an open shard by key, and where it was cut short, if it was.

    Raises:
        TercetError: it is compressed.
    """
    samples: dict[str, Sample] = {}
    try:
        for member in walk(handle):
            key, _, suffix = member.name.rpartition(".")
            if not key or posixpath.basename(member.name).startswith("."):
                continue
            parts = samples.setdefault(key, Sample()).parts
            if suffix.lower() in parts:
                problems.add(f"{path}#{key}: a second .{suffix} of the same key; the first is used")
            else:
                parts[suffix.lower()] = (member.offset, member.size)
    except CutShortError as error:
        start = read_range(handle, 0, 4)
        if not samples and (start[:2] == GZIP or start == ZSTD):
            raise TercetError(f"{path}: compressed; unpack it first, images do not get smaller by it") from error
        return samples, str(error)
    return samples, None


def _record(handle: int, where: str, sample: Sample, data: DataConfig, problems: Problems) -> dict[str, object] | None:
    """Caption, split and image_id of a sample: from its .json, with the .txt where that has no caption."""
    value: object = {}
    for suffix in ("json", "txt"):
        size = sample.parts.get(suffix, (0, 0))[1]
        if size > LONGEST_CAPTIONS:
            problems.add(f"{where}.{suffix}: {size} bytes are no caption")
            return None
    if "json" in sample.parts:
        try:
            value = json.loads(read_range(handle, *sample.parts["json"]))
        except (ValueError, RecursionError) as error:
            problems.add(f"{where}.json: not JSON: {error}")
            return None
        if not isinstance(value, dict):
            problems.add(f"{where}.json: {type(value).__name__}, not an object")
            return None
    assert isinstance(value, dict)
    caption = value.get(data.caption_column)
    if caption is None and "txt" in sample.parts:
        try:
            text = read_range(handle, *sample.parts["txt"]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            problems.add(f"{where}.txt: not UTF-8 at byte {error.start}")
            return None
        caption = [line for line in text.splitlines() if line.strip()]
    if caption is None:
        there = f"; the keys of its .json are {', '.join(value)}" if "json" in sample.parts else ""
        problems.add(f"{where}: no {data.caption_column!r}{there}")
        return None
    return {"caption": caption, "split": value.get("split"), "image_id": value.get("image_id")}


def walk(handle: int) -> Iterator[Member]:
    """The regular files of an open tar (ustar, GNU or pax).

    Raises:
        CutShortError: a header is damaged, a member reaches past the end of the file, or the end mark is missing.
    """
    end = os.fstat(handle).st_size
    position, long_name, attributes = 0, None, {}
    last = "its start"
    while True:
        header = read_range(handle, position, BLOCK)
        if len(header) < BLOCK:
            raise CutShortError(f"cut short at byte {end}, after {last}")
        if not header.strip(b"\0"):
            return
        size = _size(header, attributes, position, last)
        name = attributes.pop("path", None) or long_name or _name(header)
        kind = header[156:157]
        start = position + BLOCK
        if start + size > end:
            raise CutShortError(f"cut short at byte {end}, inside {name}")
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind in b"Lx" and size > LONGEST_HEADER:
            raise CutShortError(f"an extended header of {size} bytes at byte {start}, after {last}")
        if kind == b"L":
            long_name = read_range(handle, start, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            attributes = _pax(read_range(handle, start, size))
        elif kind not in b"gK":
            if kind in b"0\x007":
                yield Member(name.removeprefix("./"), start, size)
            long_name, attributes, last = None, {}, name


def _size(header: bytes, attributes: dict[str, str], position: int, last: str) -> int:
    """A member's size, once the header's checksum has been found right."""
    try:
        expected = int(header[148:156].strip(b"\0 ") or b"0", 8)
        if expected != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError("checksum")
        if header[124] & 0x80:  # GNU's binary form, for members of 8 GiB and more
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
        size = int(attributes.pop("size", size))
        if size < 0:
            raise ValueError("a negative size, which would lead back to what was read")
        return size
    except ValueError as error:
        raise CutShortError(f"not a tar header at byte {position}, after {last}") from error


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """The records of a pax extended header: lines of `LENGTH KEY=VALUE`."""
    attributes: dict[str, str] = {}
    data, start = data.rstrip(b"\0"), 0
    while start < len(data):
        digits = data[start : start + 8].partition(b" ")[0]
        if not digits.isdigit() or int(digits) <= len(digits) + 1:
            raise CutShortError("damaged extended header")
        record = data[start + len(digits) + 1 : start + int(digits) - 1]
        start += int(digits)
        key, _, value = record.partition(b"=")
        attributes[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return attributes
