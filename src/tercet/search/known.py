"""What a table holds already, in arrays of numbers: which of the listed images are new, changed, or gone."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import numpy as np

from tercet.data.listing import ListedImage
from tercet.search.index import Index, image_id
from tercet.search.table import lance_errors

State = Literal["new", "changed", "same", "again"]
COLUMNS = ["id", "caption", "size", "modified"]


class KnownImages:
    """The rows of an index by id, 32 bytes each, and which of them were found again."""

    def __init__(self, index: Index) -> None:
        ids: list[np.ndarray] = []
        marks: list[np.ndarray] = []
        with lance_errors(f"cannot read {index.path}"):
            for batch in index.table.search().select(COLUMNS).to_batches():
                rows = batch.to_pydict()
                ids.append(np.array([int(one, 16) for one in rows["id"]], np.uint64))
                modified = batch.column("modified").cast("int64").to_numpy(zero_copy_only=False)
                captions = [_caption_mark(caption) for caption in rows["caption"]]
                marks.append(np.stack([np.array(rows["size"], np.int64), modified, np.array(captions, np.int64)], 1))
        unsorted = np.concatenate(ids) if ids else np.zeros(0, np.uint64)
        order = np.argsort(unsorted)
        self._ids = unsorted[order]
        self._marks = np.concatenate(marks)[order] if marks else np.zeros((0, 3), np.int64)
        self._found = np.zeros(len(order), bool)
        self._new: set[int] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, image: ListedImage) -> State:
        """Whether a listed image is in the table as it is, in another state, or not; `again` when it was listed before.

        An image without size and time, such as one behind a URL, counts as the same.
        """
        key = int(image_id(image.uri), 16)
        place = int(np.searchsorted(self._ids, np.uint64(key)))
        if place == len(self._ids) or int(self._ids[place]) != key:
            if key in self._new:
                return "again"
            self._new.add(key)
            return "new"
        if self._found[place]:
            return "again"
        self._found[place] = True
        size, modified, caption = self._marks[place].tolist()
        as_before = (image.size in (0, size)) and image.modified == modified
        return "same" if as_before and caption == _caption_mark(image.caption) else "changed"

    def lost(self, index: Index, under: list[re.Pattern[str]]) -> list[str]:
        """Ids of the rows that were not found, of those whose URIs are like one of `under`."""
        if self._found.all():
            return []
        missing = {f"{int(key):016x}" for key in self._ids[~self._found]}
        gone: list[str] = []
        with lance_errors(f"cannot read {index.path}"):
            for batch in index.table.search().select(["id", "uri"]).to_batches():
                for one, uri in zip(*batch.to_pydict().values(), strict=True):
                    if one in missing and any(pattern.fullmatch(uri) for pattern in under):
                        gone.append(one)
        return gone


def _caption_mark(caption: str | None) -> int:
    if caption is None:
        return 0
    return int.from_bytes(
        hashlib.blake2b(caption.encode("utf-8", "replace"), digest_size=8).digest(), "big", signed=True
    )
