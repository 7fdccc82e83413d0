"""Parquet and Arrow (Feather) tables, whose image column holds bytes, {bytes, path} or paths.  Needs pyarrow.

Once a table is open, images are read as byte ranges and pyarrow has no more part in it.  An uncompressed Arrow file is
read in place.  Parquet, and Arrow that is compressed, cannot be read at random without unpacking hundreds of images to
get one, so their image column is copied once into a file of the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tercet.config import DataConfig
from tercet.data.packed import StringPacker, encode
from tercet.data.rows import PairCollector, Pairs, Problems, SplitFilter, require_pairs
from tercet.data.storage import FileImages, RangeImages, cache_folder, is_url, local_copy
from tercet.errors import TercetError
from tercet.files import write_atomic

ROWS_AT_ONCE = 256


@dataclass
class Places:
    """Where each row's image lies in one file: offsets int64 [rows]; sizes int64 [rows], 0 where there is none."""

    file: str
    offsets: np.ndarray
    sizes: np.ndarray


class Table(Protocol):
    """Columns by name, read a few rows at a time."""

    schema: Any

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Record batches of these columns, in order."""
        ...


class ParquetTable:
    """A Parquet file."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet

        self._file: Any = pyarrow.parquet.ParquetFile(path)
        self.schema: Any = self._file.schema_arrow

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Record batches of these columns, in order."""
        return _validated(self._file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns))


class ArrowTable:
    """An Arrow IPC file (Feather) or stream, mapped into memory."""

    def __init__(self, path: str) -> None:
        import pyarrow

        self._map: Any = pyarrow.memory_map(path)
        try:
            self._table: Any = pyarrow.ipc.open_file(self._map).read_all()
        except pyarrow.ArrowInvalid:  # the other of the two layouts, which `datasets` writes
            self._map.seek(0)
            self._table = pyarrow.ipc.open_stream(self._map).read_all()
        self.schema: Any = self._table.schema
        self._map.seek(0)
        self._start: int = self._map.read_buffer().address

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Record batches of these columns, in order."""
        return _validated(self._table.select(columns).to_batches())

    def offset_of(self, address: int, size: int) -> int | None:
        """Where in the file the `size` bytes at `address` lie; None when they were unpacked elsewhere."""
        offset = address - self._start
        return offset if 0 <= offset <= self._map.size() - size else None


def read_table(
    file: str, suffix: str | None, data: DataConfig, problems: Problems
) -> tuple[Pairs, FileImages | RangeImages]:
    """The pairs that a Parquet or Arrow file holds, and where their images lie.

    Raises:
        TercetError: pyarrow is not there, the file cannot be read, a column is missing, or no row gives a pair.
    """
    table, path = _open(file)
    with _damage_named(file):
        return _read(table, path, file, suffix, data, problems)


def _read(
    table: Table, path: str, file: str, suffix: str | None, data: DataConfig, problems: Problems
) -> tuple[Pairs, FileImages | RangeImages]:
    image, caption = data.image_column, data.caption_column
    names: list[str] = table.schema.names
    for key, column in (("image_column", image), ("caption_column", caption)):
        _require_column(file, table, key, column)
    wanted = [caption, *(name for name in ("image_id", "split") if name in names and name not in (image, caption))]
    chosen = SplitFilter(suffix)
    collector = PairCollector(problems, data.max_words)
    by_path = _holds_paths(file, table, image)
    places = None if by_path else _places(table, path, image)
    rows, paths = array("q"), StringPacker()
    for number, row in enumerate(_rows(table, [image, *wanted] if by_path else wanted)):
        where = f"{file} row {number + 1}"
        name = _path_of(row[image]) if by_path else where
        if not name or (places is not None and not places.sizes[number]):
            problems.add(f"{where}: {image!r} is empty")
        elif chosen.accepts(row.get("split")) and collector.add(where, name, row[caption], row.get("image_id")):
            rows.append(number)
            paths.add(encode(name))
    chosen.check(file)
    require_pairs(collector, file, f"rows with {image!r} and {caption!r}")
    pairs = collector.finish()
    if places is None:
        root = data.image_root if data.image_root is not None else str(Path(path).parent)
        files = FileImages(root, paths.pack().take(pairs.rows))
        files.require_some(file)
        return pairs, files
    kept = np.array(rows, np.int64)[pairs.rows]
    index = np.zeros(len(kept), np.int32)
    return pairs, RangeImages([places.file], index, places.offsets[kept], places.sizes[kept])


@dataclass(frozen=True, slots=True)
class TableImage:
    """An image of a table: its caption, and its path or where it lies (offset, size) in `places_file`."""

    caption: str | None
    place: str | tuple[int, int]


def table_images(file: str, data: DataConfig) -> Iterator[TableImage | None]:
    """The images of all rows, None where a row has none; captions where there is such a column.

    Raises:
        TercetError: pyarrow is not there, the file cannot be read, or it has no column of images.
    """
    table, path = _open(file)
    image, caption = data.image_column, data.caption_column
    _require_column(file, table, "image_column", image)
    captions = [caption] if caption in table.schema.names else []
    by_path = _holds_paths(file, table, image)
    root = Path(data.image_root) if data.image_root is not None else Path(path).parent
    places = None if by_path else _places(table, path, image)
    rows = _rows(table, [image, *captions] if by_path else captions) if by_path or captions else itertools.repeat({})
    for number in range(len(places.sizes)) if places is not None else itertools.count():
        row = next(rows, None)
        if row is None:
            return
        said = row.get(caption)
        said = said[0] if isinstance(said, list) and said else said
        said = said if isinstance(said, str) else None
        if places is not None:
            place = (int(places.offsets[number]), int(places.sizes[number]))
            yield TableImage(said, place) if place[1] else None
        else:
            name = _path_of(row[image])
            yield TableImage(said, name if is_url(name) else os.path.abspath(root / name)) if name else None  # noqa: PTH100


def places_file(file: str, data: DataConfig) -> str:
    """The file whose byte ranges are the images of a table: itself, or the copy of its image column.

    Raises:
        TercetError: the table cannot be read.
    """
    table, path = _open(file)
    _require_column(file, table, "image_column", data.image_column)
    return _places(table, path, data.image_column).file


def _require_column(file: str, table: Table, key: str, column: str) -> None:
    names: list[str] = table.schema.names
    if column not in names:
        raise TercetError(f"{file}: no column {column!r}; set data.{key} to one of those there: {', '.join(names)}")


def _open(file: str) -> tuple[Table, str]:
    """The opened table and its path on this machine."""
    try:
        import pyarrow  # noqa: F401 - to say so where it is not installed
    except ImportError as error:
        raise TercetError(f"{file}: reading this needs pyarrow; pip install 'tercet[hub-data]'") from error
    path = local_copy(file)
    with _damage_named(file):
        return (ParquetTable(path) if path.endswith(".parquet") or _is_parquet(path) else ArrowTable(path)), path


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


def _validated(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, each checked whole: pyarrow trusts offsets, and follows damaged ones out of its memory."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _is_parquet(path: str) -> bool:
    with Path(path).open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _rows(table: Table, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.batches(columns):
        yield from batch.to_pylist()


def _path_of(value: Any) -> str:
    name = value.get("path") if isinstance(value, dict) else value
    return name if isinstance(name, str) else ""


def _holds_paths(file: str, table: Table, column: str) -> bool:
    """Whether the images are files that the column names; a struct without bytes in its first rows names them."""
    import pyarrow

    kind = table.schema.field(column).type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return True
    if pyarrow.types.is_struct(kind):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        if "bytes" in fields and _is_bytes(fields["bytes"]):
            first = next(table.batches([column]), None)
            empty = first is None or _bytes_of(first.column(0)).null_count == len(first)
            return empty and "path" in fields
        if "path" in fields and "bytes" not in fields:
            return True
    elif _is_bytes(kind):
        return False
    raise TercetError(
        f"{file}: column {column!r} is {kind}; images must be bytes, a path, or a struct of bytes and path"
    )


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _places(table: Table, path: str, column: str) -> Places:
    """Where the images lie: in the table itself when it is mapped as it is, else in a copy in the cache folder."""
    if isinstance(table, ArrowTable):
        mapped = _mapped_places(table, path, column)
        if mapped is not None:
            return mapped
    state = Path(path).stat()
    name = hashlib.sha256(f"{Path(path).resolve()} {state.st_size} {state.st_mtime_ns} {column}".encode()).hexdigest()[
        :24
    ]
    copy = cache_folder() / "tables" / f"{Path(path).stem}-{name}.images"
    index = copy.with_suffix(".sizes.npy")
    if copy.is_file() and index.is_file():
        sizes = np.load(index, allow_pickle=False)
    else:
        sizes = _copy_images(table, path, column, copy)
        packed = io.BytesIO()
        np.save(packed, sizes)
        write_atomic(index, packed.getvalue())
    return Places(str(copy), np.cumsum(sizes) - sizes, sizes)


def _mapped_places(table: ArrowTable, path: str, column: str) -> Places | None:
    offsets: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for batch in table.batches([column]):
        values, ends, lengths = _binary(batch.column(0))
        start = table.offset_of(values.address, values.size) if values is not None else 0
        if start is None:
            return None
        offsets.append(ends[:-1] + start)
        sizes.append(lengths)
    if not offsets:
        return Places(path, np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Places(path, np.concatenate(offsets), np.concatenate(sizes))


def _copy_images(table: Table, path: str, column: str, copy: Path) -> np.ndarray:
    """Write the images of all rows one after the other to `copy`; returns their sizes, int64 [rows]."""
    sizes: list[np.ndarray] = [np.zeros(0, np.int64)]
    temporary = None
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=copy.parent, prefix=f".{copy.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            for batch in table.batches([column]):
                values, ends, lengths = _binary(batch.column(0))
                for start, length in zip(ends.tolist(), lengths.tolist(), strict=False):
                    if length:
                        stream.write(memoryview(values)[start : start + length])
                sizes.append(lengths)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(copy)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if error.errno is None:  # pyarrow's, about the table; the system's errors have a number
            raise
        raise TercetError(
            f"cannot copy the images of {path} to {copy.parent}: {error.strerror or error}; "
            "set TERCET_CACHE to a folder with room for them"
        ) from error
    return np.concatenate(sizes)


def _bytes_of(column: Any) -> Any:
    """The binary array of an image column, null also where a struct as a whole is null."""
    import pyarrow

    if pyarrow.types.is_struct(column.type):
        return column.flatten()[column.type.get_field_index("bytes")]
    return column


def _binary(column: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """A column's buffer, the ends of its values there, int64 [rows + 1], and their sizes, int64 [rows], 0 for null."""
    import pyarrow

    column = _bytes_of(column)
    kind = np.dtype(np.int64 if pyarrow.types.is_large_binary(column.type) else np.int32)
    _, ends, values = column.buffers()
    if values is None:
        return None, np.zeros(len(column) + 1, np.int64), np.zeros(len(column), np.int64)
    counted = np.frombuffer(ends, kind, len(column) + 1, column.offset * kind.itemsize).astype(np.int64)
    null = column.is_null().to_numpy(zero_copy_only=False)
    return values, counted, np.where(null, 0, np.diff(counted))
