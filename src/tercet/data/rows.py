"""What all readers of annotation files share: rejected rows, the choice of a split, and JSON that others wrote.

Every mistake in a file is one message that names the file and the row.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from tercet.config import DataConfig
from tercet.data.storage import is_file, is_url, read_text
from tercet.errors import TercetError

# What the parser raises: ValueError also for a number of thousands of digits, RecursionError for nested brackets.
JSON_ERRORS = (ValueError, RecursionError)
SPLIT_ALIASES = {"validation": "val", "dev": "val"}
MESSAGES_KEPT = 1000
T = TypeVar("T")
_SPACE = re.compile(r"[ \t\r\n]*")


class Rejected(Sequence[str]):
    """Messages of rejected rows.  The length counts all of them; only the first thousand messages are kept."""

    def __init__(self, messages: Sequence[str] = (), total: int | None = None) -> None:
        self._messages = list(messages)[:MESSAGES_KEPT]
        self._total = len(messages) if total is None else total

    def add(self, message: str) -> None:
        """Count one rejected row."""
        self._total += 1
        if len(self._messages) < MESSAGES_KEPT:
            self._messages.append(message)

    def extend(self, other: Sequence[str]) -> None:
        """Count the rejected rows of another source."""
        self._messages += list(other)[: MESSAGES_KEPT - len(self._messages)]
        self._total += len(other)

    def __len__(self) -> int:
        return self._total

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._messages[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def summary(self) -> str:
        """What an error about the whole file ends with: how many rows were rejected, and why the first."""
        return f"; {len(self)} rejected, the first: {self[0]}" if self else ""

    def lines(self, limit: int = 20) -> list[str]:
        """What to print: the first `limit` messages and how many more there are."""
        shown = self._messages[:limit]
        return [*shown, f"and {len(self) - len(shown)} more"] if len(self) > len(shown) else shown


class SplitFilter:
    """Which rows of a file to take, by their `split`: `flickr8k.json#test`, `coco.json#train+restval`, `all.json#all`.

    Without a suffix every row is taken, unless the rows carry different splits: then training on the file would
    silently train on its test rows, so that is an error.
    """

    def __init__(self, suffix: str | None) -> None:
        self.suffix = suffix
        self.wanted = None if suffix in (None, "", "all") else {_canonical(name) for name in (suffix or "").split("+")}
        self.seen: Counter[str] = Counter()

    def accepts(self, split: object) -> bool:
        """Whether a row with this `split` value (None: the row has none) is taken."""
        name = "" if split is None else str(split)
        self.seen[name] += 1
        return self.wants(name)

    def wants(self, name: str) -> bool:
        """Whether rows of a split, '' for none, are taken."""
        return self.wanted is None or _canonical(name) in self.wanted

    def check(self, file: str) -> None:
        """Raise TercetError when the suffix matched no row, or none was given for rows of several splits."""
        there = ", ".join(f"{name or '(none)'} ({count})" for name, count in self.seen.items())
        if self.wanted is not None:
            if self.seen and not any(self.wants(name) for name in self.seen):
                raise TercetError(f"{file}: no row of split {self.suffix!r}; the splits there are {there}")
        elif self.suffix != "all" and len(self.seen) > 1:
            first = next(name for name in self.seen if name)
            raise TercetError(
                f"{file} holds several splits, {there}; choose one, as in {file}#{first}, or {file}#all for every row"
            )


def _canonical(split: str) -> str:
    return SPLIT_ALIASES.get(split, split)


def parse_json(text: str, where: str) -> Any:
    """The value that `text` holds; `where` names it in messages.

    Raises:
        TercetError: it is not JSON; names the line and column.
    """
    try:
        return json.loads(text)
    except JSON_ERRORS as error:
        raise broken_json(where, text, error) from error


def parse_line(line: str, where: str) -> Any:
    """The value on one line of JSON lines; `where` names file and line in messages.

    Raises:
        TercetError: it is not JSON; names the column.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise TercetError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    except JSON_ERRORS as error:
        raise broken_json(where, line, error) from error


def list_items(file: str, text: str, position: int) -> Iterator[Any]:
    """The items of a JSON list whose text goes on at `position`, after its opening bracket, one in memory at a time.

    Raises:
        TercetError: it is not JSON; names the line and column.
    """
    decoder = json.JSONDecoder()
    position = skip_space(text, position)
    if text[position : position + 1] == "]":
        return
    while True:
        try:
            value, position = decoder.raw_decode(text, position)
            position = skip_space(text, position)
            mark = text[position : position + 1]
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except JSON_ERRORS as error:
            raise broken_json(file, text, error) from error
        yield value
        if mark == "]":
            return
        position = skip_space(text, position + 1)


def lines_of(file: str, text: str) -> Iterator[tuple[str, str]]:
    """The lines of a text that are not empty, each with its file and number for messages.

    Only line feeds end a line: `str.splitlines` would cut a caption at U+2028, which JSON allows inside a string.
    """
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if line.strip():
            yield f"{file} line {number}", line


def skip_space(text: str, position: int) -> int:
    """The first position from `position` on that holds no white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def broken_json(where: str, text: str, error: ValueError | RecursionError) -> TercetError:
    """The error for a text that is not JSON."""
    if isinstance(error, RecursionError):
        return TercetError(f"{where}: nested too deep to be JSON of ours")
    if not isinstance(error, json.JSONDecodeError):
        return TercetError(f"{where}: not JSON that can be read: a number in it has thousands of digits")
    at_end = text[error.pos :].strip() == "" or "Unterminated string" in error.msg
    what = "the JSON ends too early; the file was cut short" if at_end else f"not JSON: {error.msg}"
    return TercetError(f"{where}: {what} (line {error.lineno}, column {error.colno}, character {error.pos})")


def read_objects(file: str, suffix: str | None = None) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or of JSON lines, each with its file and row for messages.

    Args:
        file: path or URL.
        suffix: take the rows of this `split` alone; needed where rows carry different ones.

    Raises:
        TercetError: not JSON, cut short, or an entry that is no object.
    """
    chosen = SplitFilter(suffix)
    for where, value in _values(file, read_text(file)):
        if not isinstance(value, dict):
            raise TercetError(f"{where}: {type(value).__name__} {str(value)[:60]!r} is no object with keys")
        if chosen.accepts(value.get("split")):
            yield where, value
    chosen.check(file)


def _values(file: str, text: str) -> Iterator[tuple[str, Any]]:
    start = skip_space(text, 0)
    if text[start : start + 1] == "[":
        for number, value in enumerate(list_items(file, text, start + 1), 1):
            yield f"{file} row {number}", value
    else:
        for where, line in lines_of(file, text):
            yield where, parse_line(line, where)


def get_field(row: object, where: str, key: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """What a row of JSON has under `key`.

    Raises:
        TercetError: it is no object, lacks the key, or the value is not valid; names file, row and key.
    """
    if not isinstance(row, dict):
        raise TercetError(f"{where}: {type(row).__name__} {str(row)[:60]!r} is no object with keys")
    if key not in row:
        raise TercetError(f"{where}: no {key!r}; the keys there are {', '.join(map(str, row))}")
    if not is_valid(row[key]):
        raise TercetError(f"{where}: {key!r} is {str(row[key])[:60]!r}, not {expected}")
    return row[key]


def is_text(value: object) -> bool:
    """Whether a value is a string with more than white space in it."""
    return isinstance(value, str) and bool(value.strip())


def is_id(value: object) -> bool:
    """Whether a value can name something in another list: a number or a text."""
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def is_coordinate(value: object) -> bool:
    """Whether a value can be a position in an image: finite, and within a million pixels."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1_000_000 < value < 1_000_000


def are_texts(value: object) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def text_of(row: dict, where: str, *keys: str) -> str:
    """The text under the first of `keys` that the row has.

    Raises:
        TercetError: it has none of them, or what it holds is no text; names file and row.
    """
    found = next((key for key in keys if key in row), None)
    if found is None:
        raise TercetError(f"{where}: no {' or '.join(map(repr, keys))}; the keys there are {', '.join(map(str, row))}")
    return get_field(row, where, found, lambda value: isinstance(value, str) and value != "", "a text")


def image_root(file: str, data: DataConfig) -> str:
    """The folder that the image paths of `file` start from."""
    if data.image_root is not None:
        return data.image_root
    return file.rsplit("/", 1)[0] if is_url(file) else str(Path(file).parent)


def choose_layout(root: str, layouts: Sequence[T], paths: Callable[[T], Iterable[str]]) -> T:
    """The layout of a data set's images that this disk has.

    Args:
        root: the folder that paths start from.
        layouts: those to try.
        paths: of a few images in a layout.

    Returns:
        The first layout by which any of the images exists; the first when there is none, or `root` is a URL.
    """
    if is_url(root):
        return layouts[0]
    found = (layout for layout in layouts if any(is_file(Path(root) / path) for path in paths(layout)))
    return next(found, layouts[0])


def digest(data: bytes) -> int:
    """64 bits that stand for `data`; among 100 million rows two differ wrongly with a chance of 0.03 %."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def digest_of_id(image_id: object) -> int:
    """64 bits that stand for an `image_id`, whatever JSON made of it; never 0."""
    return digest(repr(image_id).encode("utf-8", "replace")) or 1


def shorten(value: object) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe_row(row: object, column: str, where: str) -> str:
    """Why `row` has no usable `column`."""
    if not isinstance(row, dict):
        return f"{where}: {type(row).__name__} {shorten(row)} is not an object with an image and a caption"
    if column not in row:
        return f"{where}: no {column!r}; the keys there are {', '.join(map(str, row))}"
    return f"{where}: {column!r} is {type(row[column]).__name__} {shorten(row[column])}, not a file name"
