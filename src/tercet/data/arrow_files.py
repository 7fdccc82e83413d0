"""Parquet and Arrow (Feather) files, and `datasets.Dataset`: images as bytes, {bytes, path} or paths in one column.

Images are read as byte ranges of a file.  An uncompressed Arrow file is read in place.  Parquet, and Arrow that is
compressed, cannot be read at random without unpacking hundreds of images to get one, so their image column is copied
once into an Arrow file of the cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from tercet.config import DataConfig
from tercet.data.builders import ImageKeys, PairBuilder, nothing_found
from tercet.data.parts import RangePart
from tercet.data.rows import Rejected, SplitFilter
from tercet.data.storage import cache_folder, local_copy, open_to_read, read_range
from tercet.data.table import SampleTable, shared_ids
from tercet.errors import TercetError
from tercet.files import atomic_stream

ROWS_AT_ONCE = 256


class ArrowSource:
    """Columns by name, read a few rows at a time.

    Attributes:
        name: for messages.
        folder: that paths of images start from.
        identity: changes with the content.
        schema: names and types of the columns.
    """

    def __init__(self, file: str) -> None:
        self.name = file
        path = local_copy(file)
        status = Path(path).stat()
        self.path = path
        self.folder = str(Path(path).parent)
        self.identity = f"{Path(path).resolve()} {status.st_size} {status.st_mtime_ns}"
        with Path(path).open("rb") as stream:
            parquet = stream.read(4) == b"PAR1"
        self._parquet = pyarrow.parquet.ParquetFile(path) if parquet or path.endswith(".parquet") else None
        self._table = None if self._parquet is not None else self._map(path)
        self.schema: pa.Schema = self._parquet.schema_arrow if self._parquet is not None else self._table.schema  # type: ignore[union-attr]

    def _map(self, path: str) -> pa.Table:
        self._mapped = pa.memory_map(path)
        try:
            table = pa.ipc.open_file(self._mapped).read_all()
        except pa.ArrowInvalid:  # the other of the two layouts, which `datasets` writes
            self._mapped.seek(0)
            table = pa.ipc.open_stream(self._mapped).read_all()
        self._mapped.seek(0)
        self._start = self._mapped.read_buffer().address
        return table

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Record batches of these columns, in order, each checked whole: Arrow trusts offsets, also damaged ones."""
        if self._parquet is not None:
            found = self._parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns)
        else:
            assert self._table is not None
            found = self._table.select(columns).to_batches()
        for batch in found:
            batch.validate(full=True)
            yield batch

    def offset_of(self, buffer: pa.Buffer) -> int | None:
        """Where in the file a buffer lies; None when it was unpacked elsewhere."""
        if self._parquet is not None:
            return None
        offset = buffer.address - self._start
        return offset if 0 <= offset <= self._mapped.size() - buffer.size else None


class DatasetSource:
    """A `datasets.Dataset` of Hugging Face."""

    def __init__(self, dataset: Any) -> None:
        self.name = f"dataset {dataset.split}"
        self.folder = "."
        self.identity = str(dataset._fingerprint)
        self.path = f"dataset-{dataset.split}"
        self.schema: pa.Schema = dataset.features.arrow_schema
        self._dataset = dataset

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Record batches of these columns, in order."""
        for table in self._dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
            yield from table.to_batches()

    def offset_of(self, buffer: pa.Buffer) -> int | None:
        """None: the images are copied."""
        return None


def read_arrow(file: Any, suffix: str | None, data: DataConfig, need_captions: bool = True) -> SampleTable:
    """The pairs of a Parquet or Arrow file, or of a `datasets.Dataset`.

    Args:
        file: path, URL or dataset.
        suffix: the split after '#', if any.
        data: names of the columns, root of image paths.
        need_captions: skip the images without a caption.

    Raises:
        TercetError: the file cannot be read, a column is missing, or no row gives a pair.
    """
    name = file if isinstance(file, str) else "the dataset"
    with _damage_named(name):
        source = ArrowSource(file) if isinstance(file, str) else DatasetSource(file)
        return _read(source, suffix, data, need_captions)


def _read(
    source: ArrowSource | DatasetSource, suffix: str | None, data: DataConfig, need_captions: bool
) -> SampleTable:
    image, caption, names = data.image_column, data.caption_column, source.schema.names
    for key, column in (("image_column", image), *([("caption_column", caption)] if need_captions else [])):
        if column not in names:
            there = ", ".join(names)
            raise TercetError(f"{source.name}: no column {column!r}; set data.{key} to one of those there: {there}")
    chosen, builder = SplitFilter(suffix), PairBuilder(Rejected(), data.max_words)
    by_path = _holds_paths(source, image)
    images = None if by_path else _Images(source, image)
    wanted = [name for name in dict.fromkeys((caption, "image_id", "split")) if name in names and name != image]
    rows = array("q")
    for number, row in enumerate(_rows(source, [image, *wanted] if by_path or not wanted else wanted)):
        where = f"{source.name} row {number + 1}"
        name = str(number)
        if by_path:
            path = row[image].get("path") if isinstance(row[image], dict) else row[image]
            name = path if isinstance(path, str) else ""
        key = None if images is None else images.key(number, row.get("image_id")) + str(row.get("split")).encode()
        if not name or (images is not None and not images.sizes[number]):
            builder.rejected.add(f"{where}: {image!r} is empty")
        elif chosen.accepts(row.get("split")):
            texts = row.get(caption)
            if not need_captions:
                builder.append(name, _texts_of(texts), row.get("image_id"), key)
            elif not builder.add(where, name, texts, row.get("image_id"), key):
                continue
            rows.append(number)
    chosen.check(source.name)
    if not len(builder):
        raise nothing_found(source.name, f"rows with {image!r} and {caption!r}", builder.rejected, need_captions)
    pairs = builder.finish()
    if images is None:
        folder = data.image_root if data.image_root is not None else source.folder
        return pairs.in_files(source.name, folder, builder.rejected)
    kept = np.array(rows, np.int64)[pairs.rows]
    arrays = [pairs.names, pairs.texts, pa.array(images.offsets[kept]), pa.array(images.sizes[kept])]
    columns = pa.RecordBatch.from_arrays(arrays, ["name", "texts", "offset", "size"])
    part = RangePart(source.name, columns, container=images.file)
    return SampleTable([part], builder.rejected, shared_ids(pairs.ids))


@functools.lru_cache(maxsize=64)
def images_file(file: str, column: str = "image") -> str:
    """The file whose byte ranges are the images of an Arrow or Parquet file: itself, or the copy of its image column.

    Raises:
        TercetError: the file cannot be read.
    """
    with _damage_named(file):
        return _Images(ArrowSource(file), column).file


@contextlib.contextmanager
def _damage_named(file: str) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into one error that names it."""
    try:
        yield
    except TercetError:
        raise
    except Exception as error:  # besides its own, pyarrow raises KeyError, UnicodeDecodeError, OverflowError, ...
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TercetError(f"cannot read {file}: {reason}; it may be cut short or damaged") from error


def _rows(source: ArrowSource | DatasetSource, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in source.batches(columns):
        yield from batch.to_pylist()


def _texts_of(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _holds_paths(source: ArrowSource | DatasetSource, column: str) -> bool:
    """Whether the images are files that the column names; a struct without bytes in its first rows names them."""
    kind = source.schema.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    if pa.types.is_struct(kind):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        if "bytes" in fields and _is_bytes(fields["bytes"]):
            first = next(source.batches([column]), None)
            empty = first is None or _bytes_of(first.column(0)).null_count == len(first)
            return empty and "path" in fields
        if "path" in fields and "bytes" not in fields:
            return True
    elif _is_bytes(kind):
        return False
    raise TercetError(
        f"{source.name}: column {column!r} is {kind}; images must be bytes, a path, or a struct of bytes and path"
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class _Images:
    """Where the images of all rows lie.

    Attributes:
        file: that holds them: the Arrow file itself where it is mapped as it is, else a copy in the cache folder.
        offsets, sizes: int64 `[rows]`; a size of 0 where a row has no image.
    """

    def __init__(self, source: ArrowSource | DatasetSource, column: str) -> None:
        found = _ranges(source, column)
        self.file = source.path
        if found is None:
            name = hashlib.sha256(f"{source.identity} {column}".encode()).hexdigest()[:24]
            copy = cache_folder() / "tables" / f"{Path(source.path).stem}-{name}.arrow"
            if not copy.is_file():
                _copy_images(source, column, copy)
            found = _ranges(ArrowSource(str(copy)), "bytes")
            assert found is not None
            self.file = str(copy)
        self.offsets, self.sizes = found
        self._handle = open_to_read(self.file)
        self._keys = ImageKeys(lambda offset, size: read_range(self._handle, offset, size))

    def key(self, row: int, image_id: object) -> bytes:
        """Tells the image of the next row from others."""
        return self._keys.of(int(self.offsets[row]), int(self.sizes[row]), image_id)

    def __del__(self) -> None:
        if "_handle" in self.__dict__:
            os.close(self._handle)


def _ranges(source: ArrowSource | DatasetSource, column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Offsets and sizes of the images in the source's own file; None where they lie in no file as they are."""
    offsets, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for batch in source.batches([column]):
        images = _bytes_of(batch.column(0))
        kind = np.dtype(np.int64 if pa.types.is_large_binary(images.type) else np.int32)
        _, ends, values = images.buffers()
        start = 0 if values is None else source.offset_of(values)
        if start is None:
            return None
        counted = np.zeros(len(images) + 1, np.int64)
        if values is not None:
            counted = np.frombuffer(ends, kind, len(images) + 1, images.offset * kind.itemsize).astype(np.int64)
        offsets.append(counted[:-1] + start)
        sizes.append(np.where(images.is_null().to_numpy(zero_copy_only=False), 0, np.diff(counted)))
    return np.concatenate(offsets), np.concatenate(sizes)


def _copy_images(source: ArrowSource | DatasetSource, column: str, copy: Path) -> None:
    """Write the images of all rows into an uncompressed Arrow file of one column, `bytes`."""
    schema = pa.schema([("bytes", pa.large_binary())])
    try:
        with atomic_stream(copy) as stream, pa.ipc.new_file(stream, schema) as writer:
            for batch in source.batches([column]):
                images = _bytes_of(batch.column(0)).cast(pa.large_binary())
                writer.write_batch(pa.RecordBatch.from_arrays([images], schema=schema))
    except TercetError as error:
        raise TercetError(f"{error}; set TERCET_CACHE to a folder with room for the images of {source.name}") from error


def _bytes_of(column: Any) -> Any:
    """The binary array of an image column, null also where a struct as a whole is null."""
    if pa.types.is_struct(column.type):
        return column.flatten()[column.type.get_field_index("bytes")]
    return column
