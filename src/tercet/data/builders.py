"""From the rows of a file to Arrow columns: images with their captions, the bad ones rejected with a reason."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.data.parts import FilePart
from tercet.data.rows import Rejected, digest, digest_of_id, shorten
from tercet.data.table import SampleTable, shared_ids
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
        self._names = Strings(pa.large_binary())
        self._texts = Strings(pa.large_string())
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

    def in_files(self, file: str, folder: str, rejected: Sequence[str]) -> SampleTable:
        """A table of these images of `file` as files below `folder`.  Raises TercetError when none of a few exists."""
        part = FilePart.of(folder, self.names, self.texts)
        part.require_some(file)
        return SampleTable([part], rejected, shared_ids(self.ids))


def nothing_found(file: str, looked_for: str, rejected: Rejected, need_captions: bool) -> TercetError:
    """The error for a file without a single usable row."""
    what = "no image with a caption" if need_captions else "no image"
    return TercetError(f"{file}: {what} found; looked for {looked_for}{rejected.summary()}")


class Strings:
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
