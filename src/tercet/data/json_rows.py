"""What readers of annotation files share: rows as JSON objects with their places for messages, and where images lie."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tercet.config import DataConfig
from tercet.data.json_text import list_items, parse_json, parse_line, skip_space
from tercet.data.rows import SplitFilter
from tercet.data.storage import is_file, is_url, read_text
from tercet.errors import TercetError


def read_objects(file: str, suffix: str | None = None, inside: str | None = None) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or of JSON lines, each with its file and row for messages.

    Args:
        file: path or URL.
        suffix: take the rows of this `split` alone; needed where rows carry different ones.
        inside: when the file is one object, the key that holds the list.

    Raises:
        TercetError: not JSON, cut short, or an entry that is no object.
    """
    chosen = SplitFilter(suffix)
    for where, value in _json_values(file, read_text(file), inside):
        if not isinstance(value, dict):
            raise TercetError(f"{where}: {type(value).__name__} {str(value)[:60]!r} is no object with keys")
        if chosen.accepts(value.get("split")):
            yield where, value
    chosen.check(file)


def text_of(row: dict, where: str, *keys: str) -> str:
    """The text under the first of `keys` that the row has.

    Raises:
        TercetError: it has none of them, or there is no text under it; names file and row.
    """
    for key in keys:
        if key in row:
            if isinstance(row[key], str) and row[key]:
                return row[key]
            raise TercetError(f"{where}: {key!r} is {str(row[key])[:60]!r}, not a text")
    raise TercetError(f"{where}: no {' or '.join(map(repr, keys))}; the keys there are {', '.join(map(str, row))}")


def image_root(file: str, data: DataConfig) -> str:
    """The folder that the image paths of `file` start from."""
    if data.image_root is not None:
        return data.image_root
    return file.rsplit("/", 1)[0] if is_url(file) else str(Path(file).parent)


def choose_layout(root: str, layouts: Sequence[Sequence[str]]) -> int:
    """Which of several ways to lay out a data set's images is the one on this disk.

    Args:
        root: the folder that paths start from.
        layouts: for each way, where a few images would lie.

    Returns:
        The first way by which any of the images is there; 0 when there is none, or `root` is a URL.
    """
    if is_url(root):
        return 0
    found = (index for index, paths in enumerate(layouts) if any(is_file(Path(root) / path) for path in paths))
    return next(found, 0)


def _json_values(file: str, text: str, inside: str | None) -> Iterator[tuple[str, Any]]:
    start = skip_space(text, 0)
    if text[start : start + 1] == "[":
        for number, value in enumerate(list_items(file, text, start + 1), 1):
            yield f"{file} row {number}", value
        return
    if inside is not None:
        whole = parse_json(text, file)
        if not isinstance(whole, dict) or not isinstance(whole.get(inside), list):
            raise TercetError(f"{file}: neither a list of objects nor an object with a list of {inside!r}")
        for number, value in enumerate(whole[inside], 1):
            yield f"{file} {inside} {number}", value
        return
    # Split at newlines alone: str.splitlines would cut a text at U+2028, which JSON allows inside a string.
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        yield where, parse_line(line, where)
