"""The LanceDB table of an index: its columns, how it is opened, and the errors of LanceDB in a user's words.

```
INDEX/               a folder, or a URI of object storage
  images.lance/      a row an image; its schema says which model made it
  builds.lance/      a row each time the approximate index was built, with its recall
```
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tercet.errors import TercetError

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.db import DBConnection

FORMAT_VERSION = 1
IMAGES, BUILDS = "images", "builds"
# What `Entry` shows, and a filter may name.
ENTRY_COLUMNS = ("id", "uri", "caption", "width", "height")
FILTER_COLUMNS = (*ENTRY_COLUMNS, "size", "modified", "sha256")
# A server sees what another process adds within so long.
REFRESH = timedelta(seconds=5)


@dataclass(frozen=True)
class Made:
    """What an index was made with; kept in the schema of its table.

    Attributes:
        model: folder or hub id.
        model_digest: `model_digest` of it.
        created: ISO 8601, UTC.
        format_version: of the table.
    """

    model: str
    model_digest: str
    created: str
    format_version: int = FORMAT_VERSION


def connect(path: str) -> DBConnection:
    """The database in the folder or at the URI `path`.

    Raises:
        TercetError: the extra is not installed, or there is no way to `path`.
    """
    try:
        import lancedb
        import pyarrow  # noqa: F401 - what the rows are made of
    except ImportError as error:
        raise TercetError("an index needs LanceDB; pip install 'tercet[search]'") from error
    with lance_errors(f"cannot open {path}"):
        return lancedb.connect(path, read_consistency_interval=REFRESH)


def image_schema(embed_dim: int, made: Made) -> pa.Schema:
    """Columns of the table of images."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("caption", pa.string()),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("modified", pa.timestamp("us", "UTC"), nullable=False),
            pa.field("offset", pa.int64()),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("thumbnail", pa.binary(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), embed_dim), nullable=False),
        ],
        metadata={"tercet": json.dumps(asdict(made))},
    )


def read_made(schema: pa.Schema, path: str) -> Made:
    """What the table of `schema` was made with.

    Raises:
        TercetError: it is no table of ours, or of a newer format.
    """
    try:
        facts: dict[str, Any] = json.loads((schema.metadata or {})[b"tercet"])
        made = Made(**facts)
    except (KeyError, ValueError, TypeError) as error:
        raise TercetError(f"{path}: its table was not made by `tercet index`; name another folder") from error
    if made.format_version > FORMAT_VERSION:
        raise TercetError(f"{path}: made by a newer version of tercet; upgrade, or index the images again")
    return made


@contextmanager
def lance_errors(what: str) -> Iterator[None]:
    """Word LanceDB's errors for a user, `what` first."""
    try:
        yield
    except TercetError:
        raise
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise TercetError(f"{what}: {' '.join(str(error).split())[:300]}") from error
