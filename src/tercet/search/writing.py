"""Writing to the table of an index: rows in batches, each commit whole or not at all; one writer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tercet.data.storage import is_url
from tercet.errors import TercetError
from tercet.search.index import Index, image_id
from tercet.search.preparing import Prepared
from tercet.search.table import lance_errors

if TYPE_CHECKING:
    import pyarrow as pa

COMMIT_IMAGES = 2048
COMMIT_SECONDS = 20.0
IDS_AT_ONCE = 1000
# Versions that a search in another process may still be reading are kept so long.
KEPT = timedelta(minutes=10)
LOCK = ".writing"


@contextmanager
def lock_index(path: str) -> Iterator[None]:
    """Keep other processes of this machine from writing to the index in the folder `path`; a kill opens the lock.

    Object storage has no locks: there, one writer at a time is the user's care.

    Raises:
        TercetError: another process writes to it, or the folder cannot be made.
    """
    if is_url(path):
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise TercetError(f"{path} is a file; choose a folder for the index")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise TercetError(f"another process is writing to {path}; wait until it has ended") from error
    except OSError as error:
        raise TercetError(f"cannot write {path}: {error.strerror or error}") from error


class TableWriter:
    """Gathers rows and commits them.

    Attributes:
        added: rows committed that are new.
        replaced: rows committed that took another's place.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.added = 0
        self.replaced = 0
        self._rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}

    @property
    def waiting(self) -> int:
        """Rows that are not committed yet."""
        return len(self._rows[False]) + len(self._rows[True])

    def put(self, prepared: Prepared, image_feats: np.ndarray, replaces: bool) -> None:
        """Add the row of an image, or replace the one that it has."""
        image = prepared.image
        self._rows[replaces].append(
            {
                "id": image_id(image.uri),
                "uri": image.uri,
                "caption": image.caption,
                "width": prepared.width,
                "height": prepared.height,
                "size": image.size,
                "modified": image.modified,
                "offset": image.offset,
                "sha256": prepared.sha256,
                "thumbnail": prepared.thumbnail,
                "embedding": image_feats,
            }
        )

    def commit(self) -> None:
        """Write the rows that wait, and flush them to the disk.

        Raises:
            TercetError: the disk is full, or the folder cannot be written.
        """
        with lance_errors(f"cannot write {self.index.path}; free some space or choose another folder"):
            if self._rows[False]:
                self.index.table.add(self._table(self._rows[False]))
                self.added += len(self._rows[False])
            if self._rows[True]:
                merge = self.index.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(self._table(self._rows[True]))
                self.replaced += len(self._rows[True])
        self._rows = {False: [], True: []}

    def delete(self, image_ids: list[str]) -> None:
        """Drop the rows of these ids."""
        with lance_errors(f"cannot write {self.index.path}"):
            for start in range(0, len(image_ids), IDS_AT_ONCE):
                listed = ", ".join(f"'{one}'" for one in image_ids[start : start + IDS_AT_ONCE])
                self.index.table.delete(f"id IN ({listed})")

    def compact(self) -> None:
        """Join small files, take new rows into the approximate index, and drop what no search reads any more."""
        with lance_errors(f"cannot write {self.index.path}"):
            self.index.table.optimize(cleanup_older_than=KEPT)

    def _table(self, rows: list[dict[str, Any]]) -> pa.Table:
        import pyarrow as pa

        schema = self.index.table.schema
        columns = []
        for field in schema:
            values = [row[field.name] for row in rows]
            if field.name == "embedding":
                flat = pa.array(np.concatenate(values).astype(np.float32))
                columns.append(pa.FixedSizeListArray.from_arrays(flat, self.index.embed_dim))
            elif field.name == "modified":
                columns.append(pa.array(values, pa.int64()).cast(field.type))
            else:
                columns.append(pa.array(values, field.type))
        return pa.Table.from_arrays(columns, schema=schema)
