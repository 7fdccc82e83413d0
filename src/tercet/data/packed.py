"""Compact storage of a collection's strings: one numpy buffer and offsets instead of a Python object a row.

A Python list of millions of strings makes the memory of every worker process grow, since reading an object writes its
reference count and so copies its page.  Numpy buffers have no such counts, and stay shared after a fork.
"""

from __future__ import annotations

from array import array

import numpy as np


class PackedStrings:
    """An immutable list of strings in UTF-8: `data` uint8 [bytes] and `offsets` int64 [strings + 1]."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data = data
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        """The string as text that can always be printed; use `raw` for a file name."""
        return self.raw(index).decode("utf-8", "replace")

    def raw(self, index: int) -> bytes:
        """The bytes of string `index`."""
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def take(self, indices: np.ndarray) -> PackedStrings:
        """The strings at `indices` int64 [count], in that order, copied into a new buffer."""
        lengths = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Byte j of string i of the result comes from start[i] + j: shift a running count by each string's displacement.
        displacement = np.repeat(self.offsets[indices] - offsets[:-1], lengths)
        return PackedStrings(self.data[np.arange(offsets[-1]) + displacement], offsets)


class StringPacker:
    """Collects strings one by one and packs them."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def add(self, text: str | bytes) -> None:
        """Append one string.  File names that are not UTF-8 keep their bytes; lone surrogates become '?'."""
        self._data += text if isinstance(text, bytes) else encode(text)
        self._offsets.append(len(self._data))

    def pack(self) -> PackedStrings:
        """The strings so far, in an immutable buffer."""
        return PackedStrings(np.frombuffer(bytes(self._data), np.uint8), np.array(self._offsets, np.int64))


def encode(text: str) -> bytes:
    """UTF-8, where the surrogates that stand for undecodable bytes of a file name become those bytes again."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")
