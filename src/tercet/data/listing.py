"""Images alone, wherever they lie: folders, tar shards, tables, annotation files; captions where given.

`find_images` lists them without reading them; `read_image` reads one by what the listing says of it, in any process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet.config import DataConfig
from tercet.data.arrow_files import images_file
from tercet.data.parts import FilePart, RangePart
from tercet.data.readers import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    expand_braces,
    find_files,
    open_sources,
    suffix_of,
)
from tercet.data.rows import Rejected
from tercet.data.storage import is_url, local_copy, open_to_read, read_bytes, read_range
from tercet.data.table import SampleTable
from tercet.errors import TercetError

GLOB_MARKS = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image that was found, not yet read.

    Attributes:
        uri: its path, URL, `SHARD.tar#KEY`, or `TABLE.parquet#ROW`.
        caption: the first that is given with it.
        size: bytes; 0 where that is not known before reading.
        modified: microseconds since 1970 at which its file was last changed; 0 where that is not known.
        offset: of its first byte in its file; None when the file is the image.
    """

    uri: str
    caption: str | None = None
    size: int = 0
    modified: int = 0
    offset: int | None = None


def find_images(specs: Sequence[str], rejected: Rejected) -> Iterator[ListedImage]:
    """The images that specifications name, in order; one that two of them name comes twice.

    A specification is an image, or whatever `open_sources` reads; images of folders, shards and tables need no caption.

    Args:
        specs: the specifications.
        rejected: takes what is skipped, such as the end of a shard that was cut short.

    Raises:
        TercetError: a specification names nothing, or names no image.
    """
    for spec in specs:
        found = 0
        for table in _open(spec):
            rejected.extend(table.rejected)
            for image in _list(table):
                found += 1
                yield image
        if not found:
            raise TercetError(
                f"{spec}: no image found; looked for {', '.join(sorted(IMAGE_SUFFIXES))}, tar shards and tables"
            )


def read_image(uri: str, size: int = 0, offset: int | None = None) -> bytes:
    """The bytes of a listed image.

    Raises:
        TercetError: it is gone, or its file has become shorter.
    """
    if offset is None:
        return read_bytes(uri)
    file = uri.rpartition("#")[0]
    handle = open_to_read(images_file(file) if suffix_of(file) in TABLE_SUFFIXES else local_copy(file))
    try:
        data = read_range(handle, offset, size)
    finally:
        os.close(handle)
    if len(data) < size:
        raise TercetError(f"{file} is shorter than when it was indexed; index it again")
    return data


def lies_under(spec: str) -> re.Pattern[str]:
    """What the URIs of the images that `spec` names, or once named, look like."""
    file = spec if is_url(spec) or Path(spec).exists() else spec.rpartition("#")[0] or spec
    patterns = []
    for name in expand_braces(file):
        name = name if is_url(name) else os.path.abspath(name)  # noqa: PTH100 - links stay as they are
        end = "/.*" if not is_url(name) and Path(name).is_dir() else "(#.*)?"
        patterns.append(_glob_pattern(name) + end)
    return re.compile("|".join(patterns))


def _open(spec: str) -> Iterator[SampleTable]:
    """The images of a specification, file by file, so that the first are listed before the last are found."""
    files, suffix = find_files(spec)
    for file in files:
        kind = suffix_of(file)
        if suffix not in (None, "all") and kind in {".tar", *TABLE_SUFFIXES}:
            raise TercetError(
                f"{spec}: an index takes shards and tables whole, not split {suffix!r}; name the files of that split"
            )
        path = file if is_url(file) else os.path.abspath(file)  # noqa: PTH100 - links stay as they are
        if kind in IMAGE_SUFFIXES and (is_url(path) or not Path(path).is_dir()):
            yield SampleTable([FilePart.of(".", [os.fsencode(path)])])
        else:
            whole = suffix or ("all" if kind in {".tar", *TABLE_SUFFIXES} else None)
            yield open_sources([path if whole is None else f"{path}#{whole}"], DataConfig(), need_captions=False)


def _list(table: SampleTable) -> Iterator[ListedImage]:
    for part in table.parts:
        of_container = 0
        if isinstance(part, RangePart) and not is_url(part.file):
            of_container = Path(part.file).stat().st_mtime_ns // 1000
        for row in range(len(part)):
            caption = next((text.strip() for text in part.texts(row)), None)
            uri = part.location(row)
            if isinstance(part, RangePart):
                offset, size = part.byte_range(row)
                yield ListedImage(uri, caption, size, of_container, offset)
            else:
                size, modified = _status(uri)
                yield ListedImage(uri, caption, size, modified)


def _status(path: str) -> tuple[int, int]:
    """Size and time of change; 0 for URLs and for links to nowhere, which reading will report."""
    try:
        status = os.stat(path)  # noqa: PTH116 - called for every file of large folders
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns // 1000


def _glob_pattern(name: str) -> str:
    """A regular expression of the names that a glob matches; `*` and `?` stay within a folder, `**` does not."""
    if not GLOB_MARKS.search(name):
        return re.escape(name)
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", name)
    kinds = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        kinds.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part)) for part in parts
    )
