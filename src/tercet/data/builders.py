"""Builders that turn the rows of a file into a `SampleTable`: pairs of images and captions, and samples of tasks."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.data.parts import TEXTS, FilePart
from tercet.data.rows import Rejected, digest, digest_of_id, shorten
from tercet.data.table import Samples, SampleTable, shared_ids
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError

FLUSH = 1 << 16  # rows that are kept as Python objects
WORD = re.compile(r"\w")


class PairBuilder:
    """Takes images with captions row by row, rejects the bad ones with a reason, and merges the rows of one image.

    Args:
        rejected: takes the reasons.
        max_words: words that are kept of a caption.
    """

    def __init__(self, rejected: Rejected, max_words: int) -> None:
        self.rejected = rejected
        self._max_words = max_words
        self._names = _Strings(pa.large_binary())
        self._texts = _Strings(pa.large_string())
        self._counts = array("q")
        self._keys = array("Q")
        self._ids = array("Q")

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, where: str, name: str, captions: object, image_id: object = None, key: bytes | None = None) -> bool:
        """Take one row and return whether it was accepted.

        Args:
            where: names the row in messages: file and row number.
            name: path of the image, or its name in its file.
            captions: a string or a list of strings; anything else is rejected.
            image_id: images with equal ids count as the same for the targets of training.
            key: rows with the same key are one image; default: the name.
        """
        texts = self.check(where, captions)
        if texts:
            self.append(name, texts, image_id, key)
        return bool(texts)

    def append(self, name: str, texts: list[str], image_id: object = None, key: bytes | None = None) -> None:
        """Take one row whose texts are known to be sound; it may have none."""
        encoded = encode_name(name)
        self._names.append(encoded)
        for text in texts:
            self._texts.append(text.encode("utf-8", "replace").decode())
        self._counts.append(len(texts))
        self._keys.append(digest(encoded if key is None else key))
        self._ids.append(0 if image_id is None else digest_of_id(image_id))

    def check(self, where: str, captions: object) -> list[str]:
        """The usable captions of a row."""
        given = captions if isinstance(captions, list) else [captions]
        if not given:
            self.rejected.add(f"{where}: the list of captions is empty")
        texts: list[str] = []
        for caption in given:
            if caption is None:
                self.rejected.add(f"{where}: no caption")
            elif not isinstance(caption, str):
                self.rejected.add(f"{where}: the caption is {type(caption).__name__} {shorten(caption)}, not text")
            elif is_empty(caption, self._max_words):
                self.rejected.add(f"{where}: the caption {shorten(caption)} is empty after cleaning")
            else:
                texts.append(caption)
        return texts

    def require_some(self, file: str, looked_for: str, need_captions: bool = True) -> None:
        """Raise TercetError, naming what was looked for and why rows were rejected, when no row was accepted."""
        if not len(self):
            reasons = f"; {len(self.rejected)} rejected, the first: {self.rejected[0]}" if self.rejected else ""
            what = "no image with a caption" if need_captions else "no image"
            raise TercetError(f"{file}: {what} found; looked for {looked_for}{reasons}")

    def finish(self) -> Pairs:
        """The rows as images in the order of their first row."""
        counts, keys = np.array(self._counts, np.int64), np.array(self._keys, np.uint64)
        names, texts = self._names.finish(), self._texts.finish()
        _, first_row, image_of_row = np.unique(keys, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first_row)
        image_of_row = np.argsort(by_appearance)[image_of_row.reshape(-1)]
        rows = first_row[by_appearance].astype(np.int64)
        if len(rows) < len(counts):
            image_of_text = np.repeat(image_of_row, counts)
            names = names.take(pa.array(rows))
            texts = texts.take(pa.array(np.argsort(image_of_text, kind="stable")))
            counts = np.bincount(image_of_text, minlength=len(rows))
        ends = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        lists = pa.LargeListArray.from_arrays(ends, texts)
        return Pairs(names, lists, np.array(self._ids, np.uint64)[rows], rows)


@dataclass(frozen=True)
class Pairs:
    """The images of one file with their captions.

    Attributes:
        names: large_binary `[images]`.
        texts: large_list of large_string `[images]`.
        ids: uint64 `[images]`, a digest of the id given with the image, 0 where none was.
        rows: int64 `[images]`, which accepted row an image came from (the first of several).
    """

    names: pa.Array
    texts: pa.Array
    ids: np.ndarray
    rows: np.ndarray

    def in_files(self, folder: str, rejected: Sequence[str]) -> SampleTable:
        """A table of these images as files below `folder`."""
        columns = pa.RecordBatch.from_arrays([self.names, self.texts], ["name", "texts"])
        return SampleTable([FilePart(folder, columns)], rejected, shared_ids(self.ids))


@dataclass
class SampleBuilder:
    """Takes task samples one by one; images that several samples name are held once."""

    rejected: Rejected = field(default_factory=Rejected)

    def __post_init__(self) -> None:
        self._images: list[list[int]] = []
        self._columns = {name: _Strings(pa.large_string()) for name in ("text", "target", "key")}
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, key: str, images: Sequence[str | int], text: str, target: object) -> None:
        """Take one sample.

        Args:
            key: names it in messages: file and row.
            images: names of its images below the image root, or their indices in the table given to `finish_over`.
            text: its sentence or question.
            target: plain values, as JSON has them.
        """
        self._images.append(
            [image if isinstance(image, int) else self._names.setdefault(image, len(self._names)) for image in images]
        )
        for name, value in (("text", text), ("target", json.dumps(target)), ("key", key)):
            self._columns[name].append(value.encode("utf-8", "replace").decode())

    def finish(self, file: str, folder: str) -> SampleTable:
        """The samples of `file` over images below `folder`.

        Raises:
            TercetError: there are none, or none of a few images exists.
        """
        if not self._images:
            why = f"; {len(self.rejected)} rejected, the first: {self.rejected[0]}" if self.rejected else ""
            raise TercetError(f"{file}: no samples in it{why}")
        names = pa.array([encode_name(name) for name in self._names], pa.large_binary())
        texts = pa.array([[]] * len(names), TEXTS)
        part = FilePart(folder, pa.RecordBatch.from_arrays([names, texts], ["name", "texts"]))
        part.require_some(file)
        return SampleTable([part], self.rejected, None, self._samples())

    def finish_over(self, images: SampleTable) -> SampleTable:
        """The samples over those images of a table that they name."""
        return images.with_samples(self._samples(), self.rejected)

    def _samples(self) -> Samples:
        columns = [column.finish() for column in self._columns.values()]
        return Samples(np.array(self._images, np.int64), pa.RecordBatch.from_arrays(columns, list(self._columns)))


class _Strings:
    """Collects strings in Arrow arrays, a few as Python objects at a time."""

    def __init__(self, kind: pa.DataType) -> None:
        self._kind = kind
        self._waiting: list[Any] = []
        self._done: list[pa.Array] = []

    def append(self, value: str | bytes) -> None:
        self._waiting.append(value)
        if len(self._waiting) == FLUSH:
            self._flush()

    def finish(self) -> pa.Array:
        self._flush()
        return pa.concat_arrays(self._done)

    def _flush(self) -> None:
        self._done.append(pa.array(self._waiting, self._kind))
        self._waiting = []


def is_empty(caption: str, max_words: int) -> bool:
    """Whether nothing is left of a caption after cleaning.  A letter or digit survives it, so most need no cleaning."""
    return WORD.search(caption) is None and not clean_caption(caption, max_words)


def encode_name(name: str) -> bytes:
    """UTF-8, where the surrogates that stand for undecodable bytes of a file name become those bytes again."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace")


class ImageKeys:
    """Keys by which rows with the same picture become one image, where rows hold bytes and no path.

    A row is compared, byte for byte, with the one before it and with the first one of the same `image_id`: these are
    the rows in which one image stands with another caption.

    Args:
        read: gives the bytes at (offset, size).
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._last: tuple[int, int, bytes] = (0, 0, b"")
        self._by_id: dict[int, tuple[int, int, bytes]] = {}
        self._rows = 0

    def of(self, offset: int, size: int, image_id: object = None) -> bytes:
        """The key of the image at `offset`, in the next row."""
        self._rows += 1
        identity = 0 if image_id is None else digest_of_id(image_id)
        first = self._by_id.get(identity, self._last)
        for other in (self._last, first) if first is not self._last else (first,):
            if size and other[1] == size and self._read(*other[:2]) == self._read(offset, size):
                self._last = offset, size, other[2]
                return other[2]
        self._last = offset, size, str(self._rows).encode()
        if identity:
            self._by_id.setdefault(identity, self._last)
        return self._last[2]
