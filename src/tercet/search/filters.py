"""Filters over the columns of an index, such as `width > 800 and caption like '%dog%'`.

A filter may come from a stranger.  It is taken apart into words, of which only columns, comparisons and values pass; so
it holds no function, no query within, and no second statement when LanceDB's SQL reads it.
"""

from __future__ import annotations

import difflib
import re

from tercet.errors import TercetError

COLUMNS = ("id", "uri", "caption", "width", "height", "size", "modified", "sha256")
KEYWORDS = ("and", "or", "not", "in", "like", "ilike", "between", "is", "null", "true", "false", "timestamp", "date")
LONGEST = 2000
DEEPEST = 16
TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<number>-?\d+(?:\.\d+)?)(?![\w.])
    | (?P<word>[A-Za-z_]\w*)
    | (?P<mark><=|>=|<>|!=|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)
EXAMPLE = "as in: width >= 800 and caption like '%dog%'"


def checked_filter(where: str) -> str:
    """`where` as SQL that can do nothing but compare columns with values.

    Raises:
        TercetError: it names something else; the message says which word.
    """
    if len(where) > LONGEST:
        raise TercetError(f"the filter has {len(where)} characters; {LONGEST} are allowed")
    parts: list[str] = []
    position = depth = 0
    end = len(where.rstrip())
    while position < end:
        match = TOKEN.match(where, position, end)
        if match is None:
            raise TercetError(f"the filter cannot be read at {where[position:end].strip()[:20]!r}; {EXAMPLE}")
        position = match.end()
        parts.append(_checked(match))
        depth += {"(": 1, ")": -1}.get(parts[-1], 0)
        if not 0 <= depth <= DEEPEST:
            raise TercetError(f"the filter's brackets do not fit, or go deeper than {DEEPEST}")
    if not parts or depth:
        raise TercetError(f"the filter is {'cut short' if parts else 'empty'}; {EXAMPLE}")
    return " ".join(parts)


def _checked(match: re.Match[str]) -> str:
    """One word of a filter as SQL."""
    if match["text"]:
        quote = match["text"][0]
        inside = match["text"][1:-1].replace(quote * 2, quote)
        if "\0" in inside:
            raise TercetError("the filter holds a null character")
        return "'" + inside.replace("'", "''") + "'"
    if match["word"]:
        word = match["word"].lower()
        if word in KEYWORDS or word in COLUMNS:
            return word
        near = difflib.get_close_matches(word, COLUMNS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(COLUMNS)}; text goes in quotes"
        raise TercetError(f"the filter knows no {match['word']!r}; {hint}")
    return "=" if match["mark"] == "==" else match["number"] or match["mark"]
