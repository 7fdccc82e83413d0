"""The files of the page at `/`, read once; no path of a request is ever looked up on the disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page.

    Attributes:
        data: its bytes.
        kind: its media type.
        tag: changes with the bytes.
    """

    data: bytes
    kind: str
    tag: str


def read_page() -> dict[str, PageFile]:
    """The files by name; `index.html` is the page itself."""
    found = {}
    for entry in files("tercet.serve").joinpath("static").iterdir():
        suffix = f".{entry.name.rpartition('.')[2]}"
        if suffix in _KINDS:
            data = entry.read_bytes()
            found[entry.name] = PageFile(data, _KINDS[suffix], f'"{hashlib.sha256(data).hexdigest()[:16]}"')
    return found
