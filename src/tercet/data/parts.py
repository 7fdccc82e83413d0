"""Where the images of a table lie: files below one folder, or byte ranges of one tar shard or Arrow file.

The columns of a part are one Arrow record batch, in memory or mapped from an index on the disk:

    name     binary   path below the folder, or key in the shard
    texts    list     captions of the image
    offset, size      int64, where its bytes lie in the shard or Arrow file (absent for files)
    mark     uint32   CRC-32 of the tar header before them (tar shards alone)
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.data.storage import LARGEST_IMAGE, is_file, is_url, missing, open_to_read, read_image, read_range
from tercet.errors import TercetError

TAR_BLOCK = 512
SEQUENTIAL_BLOCK = 1024  # neighbouring images that a training reads about the same time, and the disk in one go
READ_AHEAD = 256 << 20  # bytes of a block that the system is asked to read at once
IMAGES_PROBED = 16
TEXTS = pa.large_list(pa.large_string())


@dataclass
class FilePart:
    """Images that are files of their own.

    Attributes:
        folder: folder or URL that the names start from.
        columns: `name` and `texts`.
    """

    folder: str
    columns: pa.RecordBatch
    block_size = 1

    @classmethod
    def of(cls, folder: str, names: Any, texts: Any = None) -> FilePart:
        """Images by their names, binary, and the texts of each; without `texts` they have none."""
        names = names if isinstance(names, pa.Array) else pa.array(names, pa.large_binary())
        texts = pa.array([[]] * len(names), TEXTS) if texts is None else texts
        return cls(folder, pa.RecordBatch.from_arrays([names, texts], ["name", "texts"]))

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def counts(self) -> np.ndarray:
        """Texts of each image, int32 `[images]`."""
        return list_lengths(self.columns.column("texts"))

    def texts(self, row: int) -> list[str]:
        """Texts of image `row`."""
        return self.columns.column("texts")[row].as_py()

    def name(self, row: int) -> bytes:
        """Path of image `row` below the folder."""
        return self.columns.column("name")[row].as_py()

    def key(self, row: int) -> str:
        """What names image `row` in messages."""
        return self.name(row).decode("utf-8", "replace")

    def location(self, row: int) -> str:
        """Absolute path or URL of image `row`."""
        path = self.path(row)
        return path if is_url(path) else os.path.abspath(path)  # noqa: PTH100 - links stay as they are

    def path(self, row: int) -> str:
        """Path or URL of image `row`."""
        name = os.fsdecode(self.name(row))
        if is_url(name):
            return name
        return f"{self.folder.rstrip('/')}/{name}" if is_url(self.folder) else str(Path(self.folder) / name)

    def read(self, row: int) -> bytes:
        """The bytes of image `row`.  Raises OSError or TercetError when it cannot be read."""
        return read_image(self.path(row))

    def select(self, rows: np.ndarray) -> FilePart:
        """The images `rows`, int64 `[selected]`."""
        return FilePart(self.folder, self.columns.take(pa.array(rows)))

    def require_some(self, file: str) -> None:
        """Raise TercetError when none of a few images spread over the part exists: the folder is surely wrong."""
        if is_url(self.folder) or not len(self):
            return
        probed = np.unique(np.linspace(0, len(self) - 1, IMAGES_PROBED).astype(int)).tolist()
        paths = [self.path(row) for row in probed]
        if any(is_url(path) or is_file(path) for path in paths):
            return
        name = os.fsdecode(self.name(probed[0]))
        fix = "set data.image_root to the folder that the names start from"
        if "\\" in name and os.sep != "\\":
            fix = "its names hold backslashes; write them with /"
        elif os.path.isabs(name):  # noqa: PTH117 - of a name
            fix = "its names are absolute paths, which data.image_root does not change; write them relative to a folder"
        hint = missing(paths[0]).partition(paths[0])[2]
        raise TercetError(f"{file}: none of its images exists, such as {paths[0]}{hint}; {fix}")


class RangePart:
    """Images that are byte ranges of one file, such as a tar shard or an Arrow file.

    Args:
        file: path or URL as the user gave it.
        columns: `name`, `texts`, `offset`, `size` and, for tar shards, `mark`.
        rows: int64 `[images]`, which rows of the columns it has; None: all.
        container: the local file that holds the bytes, where that is not `file`.
    """

    block_size = SEQUENTIAL_BLOCK

    def __init__(
        self, file: str, columns: pa.RecordBatch, rows: np.ndarray | None = None, container: str | None = None
    ) -> None:
        self.file = file
        self.container = container
        self.rows = rows
        self.count = len(columns)  # of the columns
        self._columns: pa.RecordBatch | None = columns

    @property
    def columns(self) -> pa.RecordBatch:
        """The columns, loaded now in a process that has none yet."""
        if self._columns is None:
            self._columns = self.load_columns()
        return self._columns

    def load_columns(self) -> pa.RecordBatch:
        """The columns in a process that has none yet."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.count if self.rows is None else len(self.rows)

    @property
    def counts(self) -> np.ndarray:
        """Texts of each image, int32 `[images]`."""
        counts = list_lengths(self.columns.column("texts"))
        return counts if self.rows is None else counts[self.rows]

    def texts(self, row: int) -> list[str]:
        """Texts of image `row`."""
        lists = self.columns.column("texts")
        first, end = self._ends(lists, self.physical(row), len(lists.values))
        return [self._string(lists.values, index) for index in range(first, end)]

    def key(self, row: int) -> str:
        """What names image `row` in messages: `shard.tar#KEY`, `table.parquet#ROW`."""
        return f"{self.file}#{self._string(self.columns.column('name'), self.physical(row))}"

    def _string(self, strings: Any, row: int) -> str:
        data = strings.buffers()[2]
        first, end = self._ends(strings, row, 0 if data is None else data.size)
        if data is None or first == end:
            return ""
        return bytes(memoryview(data)[first:end]).decode("utf-8", "replace")

    def _ends(self, array: Any, row: int, limit: int) -> tuple[int, int]:
        """Where value `row` of a large array begins and ends.

        Arrow itself trusts offsets, and follows damaged ones out of its memory; checking all of them first would read
        whole indexes.
        """
        offsets = np.frombuffer(array.buffers()[1], np.int64, 2, 8 * (array.offset + row))
        first, end = offsets.tolist()
        if not 0 <= first <= end <= limit:
            raise TercetError(f"the index of {self.file} is damaged; delete it to have it made again")
        return first, end

    def location(self, row: int) -> str:
        """As `key`, with an absolute path."""
        key = self.key(row)
        return key if is_url(key) else os.path.abspath(key)  # noqa: PTH100 - links stay as they are

    def byte_range(self, row: int) -> tuple[int, int]:
        """Offset and size of image `row` in its file."""
        row = self.physical(row)
        return int(self.columns.column("offset")[row].as_py()), int(self.columns.column("size")[row].as_py())

    def physical(self, row: int) -> int:
        """The row of the columns that image `row` is."""
        return row if self.rows is None else int(self.rows[row])

    def select(self, rows: np.ndarray) -> RangePart:
        """The images `rows`, int64 `[selected]`, of the same columns."""
        selected = object.__new__(type(self))
        selected.__dict__.update(self.__dict__)
        selected.rows = rows if self.rows is None else self.rows[rows]
        return selected

    def open(self) -> int:
        """A handle to read images by.  Raises TercetError when the file is gone."""
        return open_to_read(self.container or self.file)

    def read(self, row: int, handle: int) -> bytes:
        """The bytes of image `row`.

        Raises:
            TercetError: the file was cut short or replaced since it was opened.
        """
        offset, size = self.byte_range(row)
        if size > LARGEST_IMAGE:
            raise TercetError(f"{self.key(row)}: {size} bytes are no image")
        marked = "mark" in self.columns.schema.names
        header = TAR_BLOCK if marked else 0
        data = read_range(handle, offset - header, header + size)
        if len(data) < header + size:
            raise self._changed(f"it was cut short to {os.fstat(handle).st_size} bytes")
        if marked and zlib.crc32(data[:header]) != self.columns.column("mark")[self.physical(row)].as_py():
            raise self._changed(f"byte {offset - header} holds something else")
        return data[header:]

    def read_ahead(self, row: int, handle: int) -> None:
        """Have the system read the whole block that image `row` lies in."""
        first = self.physical(row) // self.block_size * self.block_size
        last = min(self.count, first + self.block_size) - 1
        offsets, sizes = self.columns.column("offset"), self.columns.column("size")
        start = max(0, offsets[first].as_py() - TAR_BLOCK)
        length = offsets[last].as_py() + sizes[last].as_py() - start
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(handle, start, min(length, READ_AHEAD), os.POSIX_FADV_WILLNEED)

    def _changed(self, how: str) -> TercetError:
        return TercetError(f"{self.file} has changed since it was indexed: {how}; start again to read the new one")


Part = FilePart | RangePart


def list_lengths(lists: Any) -> np.ndarray:
    """int32 `[lists]`, the length of each of a large list array without nulls."""
    return np.diff(lists.offsets.to_numpy()).astype(np.int32)
