"""JSON of others: whole, or a list item by item; whatever is wrong with it is one error that names the place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tercet.errors import TercetError

# What the parser raises: ValueError also for a number of thousands of digits, RecursionError for nested brackets.
JSON_ERRORS = (ValueError, RecursionError)
_SPACE = re.compile(r"[ \t\r\n]*")


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
    except JSON_ERRORS as error:
        raise TercetError(f"{where}: {line_fault(line, error)}") from error


def list_items(file: str, text: str, position: int) -> Iterator[Any]:
    """The items of a JSON list whose text goes on at `position`, after its opening bracket.

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


def skip_space(text: str, position: int) -> int:
    """The first place from `position` on where no white space stands."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def broken_json(where: str, text: str, error: ValueError | RecursionError) -> TercetError:
    """The error for a text that is not JSON."""
    return TercetError(f"{where}: {json_fault(text, error)}")


def line_fault(line: str, error: ValueError | RecursionError) -> str:
    """What is wrong with a line that is not JSON, and where in it."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return json_fault(line, error)


def json_fault(text: str, error: ValueError | RecursionError) -> str:
    """What is wrong with a text that is not JSON, and where."""
    if isinstance(error, RecursionError):
        return "nested too deep to be JSON of ours"
    if not isinstance(error, json.JSONDecodeError):
        return "not JSON that can be read: a number in it has thousands of digits"
    at_end = text[error.pos :].strip() == "" or "Unterminated string" in error.msg
    what = "the JSON ends too early; the file was cut short" if at_end else f"not JSON: {error.msg}"
    return f"{what} (line {error.lineno}, column {error.colno}, character {error.pos})"
