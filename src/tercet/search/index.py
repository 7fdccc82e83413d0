"""An index: a LanceDB table with a row for each image and its embedding.

```
INDEX/                 a folder, or a URI of object storage
  images.lance/        a row an image; the schema's metadata names the model that embedded them
  approximate.lance/   one row: how the approximate index was built, and its measured recall
```
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tercet.data.images import BrokenImage
from tercet.data.listing import read_image
from tercet.data.storage import is_url
from tercet.errors import TercetError
from tercet.search.approximate import (
    EXACT_BELOW,
    ApproximateIndex,
    approximate_query,
    exact_query,
    read_approximate,
    split_by_query,
)

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table
    from torch import Tensor

    from tercet.model.tercet import Tercet

FORMAT_VERSION = 1
IMAGES = "images"
ENTRY_COLUMNS = ("id", "uri", "caption", "width", "height", "sha256")
ID_LENGTH = 16
# A search sees what another process adds, and a new approximate index, within so long.
REFRESH = timedelta(seconds=5)
APPROXIMATE_REFRESH = 60.0

FILTER_COLUMNS = ("id", "uri", "caption", "width", "height", "size", "modified", "sha256")
KEYWORDS = ("and", "or", "not", "in", "like", "ilike", "between", "is", "null", "true", "false", "timestamp", "date")
FILTER_LENGTH, FILTER_DEPTH = 2000, 16
FILTER_EXAMPLE = "as in: width >= 800 and caption like '%dog%'"
TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<number>-?\d+(?:\.\d+)?)(?![\w.])
    | (?P<word>[A-Za-z_]\w*)
    | (?P<mark><=|>=|<>|!=|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Entry:
    """An image of an index.

    Attributes:
        id: 16 hexadecimal digits, derived from `uri`.
        uri: where the image is: a path, a URL, `SHARD.tar#KEY` or `TABLE.parquet#ROW`.
        caption: the first that came with it.
        width: pixels.
        height: pixels.
        sha256: of the bytes that were embedded.
    """

    id: str
    uri: str
    caption: str | None
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class Hit(Entry):
    """An image that a search found.

    Attributes:
        cosine: similarity to the query by the dual encoder, -1 to 1.
        dual_rank: its rank by the dual encoder alone, from 1.
        match: probability that it shows the text, by the fusion encoder; None where it was not re-ranked.
    """

    cosine: float
    dual_rank: int
    match: float | None = None


class Index:
    """Images with their embeddings.  Changes by another process are seen within seconds.

    Attributes:
        path: folder or URI.
        model: folder or hub id of the model that embedded the images.
        model_digest: identifies that model's image encoder; see `model_digest`.
        embed_dim: length of an embedding.
    """

    def __init__(self, path: str, database: DBConnection, table: Table) -> None:
        try:
            made: dict[str, Any] = json.loads((table.schema.metadata or {})[b"tercet"])
            self.model, self.model_digest, version = made["model"], made["model_digest"], made["format_version"]
        except (KeyError, ValueError, TypeError) as error:
            raise TercetError(f"{path}: its table was not made by `tercet index`; name another folder") from error
        if version > FORMAT_VERSION:
            raise TercetError(f"{path}: made by a newer version of tercet; upgrade, or index the images again")
        self.path, self.database, self.table = path, database, table
        self.embed_dim: int = table.schema.field("embedding").type.list_size
        self._approximate: ApproximateIndex | None = None
        self._approximate_read = float("-inf")

    @classmethod
    def open(cls, path: str) -> Index:
        """Open an index.

        Raises:
            TercetError: the extra is not installed, there is no index at `path`, or it is damaged.
        """
        path = str(path)
        if not cls.exists(path):
            raise TercetError(f"no index at {path}; make one: tercet index IMAGES --model MODEL --output {path}")
        database = connect(path)
        with lance_errors(f"{path} is damaged; index the images again"):
            index = cls(path, database, database.open_table(IMAGES))
            index.table.count_rows()
        return index

    @classmethod
    def create(cls, path: str, model: str, digest: str, embed_dim: int) -> Index:
        """Make an index without images.

        Raises:
            TercetError: there is one already, or the folder cannot be written.
        """
        made = {
            "model": model,
            "model_digest": digest,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "format_version": FORMAT_VERSION,
        }
        schema = image_schema(embed_dim).with_metadata({"tercet": json.dumps(made)})
        database = connect(path)
        with lance_errors(f"cannot make an index at {path}"):
            return cls(path, database, database.create_table(IMAGES, schema=schema))

    @staticmethod
    def exists(path: str) -> bool:
        """Whether there is an index at `path`; a folder without one may hold other things."""
        if not is_url(path) and not Path(path).is_dir():
            return False
        with lance_errors(f"cannot read {path}"):
            return IMAGES in connect(path).list_tables().tables

    @property
    def count(self) -> int:
        """How many images there are."""
        with lance_errors(f"cannot read {self.path}"):
            return self.table.count_rows()

    @property
    def approximate(self) -> ApproximateIndex | None:
        """The approximate index; None while every vector is compared."""
        if time.monotonic() - self._approximate_read > APPROXIMATE_REFRESH:
            self._approximate, self._approximate_read = read_approximate(self.database), time.monotonic()
        return self._approximate

    def entry(self, image_id: str) -> Entry:
        """What is known of an image.

        Raises:
            TercetError: the index has no such image.
        """
        return Entry(**self._row(image_id, ENTRY_COLUMNS))

    def newest(self, count: int) -> list[Entry]:
        """The images that were indexed last, at most `count`, the last first."""
        with lance_errors(f"cannot read {self.path}"):
            query = self.table.search().select(list(ENTRY_COLUMNS)).limit(count)
            rows = query.offset(max(0, self.table.count_rows() - count)).to_arrow().to_pylist()
        return [Entry(**row) for row in reversed(rows)]

    def thumbnail(self, image_id: str) -> bytes:
        """A small JPEG of an image, kept in the index itself.

        Raises:
            TercetError: the index has no such image.
        """
        return self._row(image_id, ["thumbnail"])["thumbnail"]

    def thumbnails(self, image_ids: Sequence[str]) -> dict[str, bytes]:
        """`thumbnail` of several images; unknown ids are skipped."""
        return {row["id"]: row["thumbnail"] for row in self.rows(image_ids, ["id", "thumbnail"])}

    def image(self, image_id: str) -> bytes:
        """The image's file as it was indexed.

        Raises:
            TercetError: the index has no such image, or its file is gone or has changed.
        """
        row = self._row(image_id, ["uri", "size", "offset", "sha256"])
        data = read_image(row["uri"], row["size"], row["offset"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise BrokenImage(row["uri"], "it has changed since it was indexed; index it again")
        return data

    def embeddings(self, image_ids: Sequence[str]) -> np.ndarray:
        """`image_feats` of images, float32 `[images, embed_dim]`.

        Raises:
            TercetError: the index lacks one.
        """
        rows = {row["id"]: row["embedding"] for row in self.rows(image_ids, ["id", "embedding"])}
        for image_id in image_ids:
            if image_id not in rows:
                raise TercetError(f"no image {image_id!r} in {self.path}")
        return np.array([rows[image_id] for image_id in image_ids], np.float32)

    def rows(self, image_ids: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of the images of these ids, in no order; unknown ids are skipped."""
        known = [image_id for image_id in image_ids if re.fullmatch(f"[0-9a-f]{{{ID_LENGTH}}}", image_id)]
        if not known:
            return []
        with lance_errors(f"cannot read {self.path}"):
            query = self.table.search().where(sql_in(known)).select(list(columns)).limit(len(known))
            return query.to_arrow().to_pylist()

    def nearest(
        self, feats: Tensor | np.ndarray, count: int, where: str | None = None, exact: bool = False
    ) -> list[list[Hit]]:
        """The images nearest to each of `feats` `[queries, embed_dim]`, the nearest first, in one query to the table.

        Every vector is compared where there are few, or few pass the filter; else the approximate index answers.

        Args:
            feats: of any length; only the direction counts.
            count: how many images a query, at most.
            where: a filter; see `checked_filter`.
            exact: compare every vector, however many there are.

        Raises:
            TercetError: the filter or the table cannot be read.
        """
        vectors = np.asarray(feats, np.float32)
        sql = None if where is None else checked_filter(where)
        with lance_errors(f"cannot search {self.path}" if where is None else f"cannot search by the filter {where!r}"):
            approximate = None if exact else self.approximate
            if approximate is None or (sql is not None and self.table.count_rows(sql) < EXACT_BELOW):
                query = exact_query(self.table, vectors)
            else:
                query = approximate_query(self.table, vectors, approximate.probes_for(count))
            query = query.limit(count).select([*ENTRY_COLUMNS, "_distance"])
            if sql is not None:
                query = query.where(sql, prefilter=True)
            found = split_by_query(query.to_arrow(), len(vectors))
        return [
            [
                Hit(*(row[name] for name in ENTRY_COLUMNS), cosine=1.0 - row["_distance"], dual_rank=rank)
                for rank, row in enumerate(table.to_pylist(), 1)
            ]
            for table in found
        ]

    def _row(self, image_id: str, columns: Sequence[str]) -> dict[str, Any]:
        rows = self.rows([image_id], columns)
        if not rows:
            raise TercetError(f"no image {image_id!r} in {self.path}")
        return rows[0]


def image_schema(embed_dim: int) -> pa.Schema:
    """Columns of the table of images."""
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
        ]
    )


def image_id(uri: str) -> str:
    """The id of the image at `uri`.  Among 100 million images, two share one with a probability of 0.03 %."""
    return hashlib.blake2b(uri.encode("utf-8", "surrogateescape"), digest_size=ID_LENGTH // 2).hexdigest()


def model_digest(model: Tercet) -> str:
    """SHA-256 of what an embedding depends on: the image encoder, its projection and its input size."""
    digest = hashlib.sha256(f"{model.config.vision.image_size} {model.config.vision.patch_size}".encode())
    for part in (model.vision, model.vision_projection):
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def connect(path: str) -> DBConnection:
    """The database in the folder or at the URI `path`.

    Raises:
        TercetError: the extra is not installed, or `path` cannot be reached.
    """
    try:
        import lancedb
    except ImportError as error:
        raise TercetError("an index needs LanceDB; pip install 'tercet[search]'") from error
    with lance_errors(f"cannot open {path}"):
        return lancedb.connect(path, read_consistency_interval=REFRESH)


@contextmanager
def lance_errors(what: str) -> Iterator[None]:
    """Turn LanceDB's errors into one line that begins with `what`."""
    try:
        yield
    except TercetError:
        raise
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise TercetError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def sql_in(image_ids: Sequence[str]) -> str:
    """A filter for rows of these ids, which must be hexadecimal."""
    return f"id IN ({', '.join(repr(image_id) for image_id in image_ids)})"


def checked_filter(where: str) -> str:
    """A filter such as `width > 800 and caption like '%dog%'`, as SQL that only compares columns with values.

    The filter may come from a stranger.  Only columns, comparisons and values pass: no function, subquery or second
    statement reaches LanceDB.

    Raises:
        TercetError: it holds something else; the message says what.
    """
    if len(where) > FILTER_LENGTH:
        raise TercetError(f"the filter has {len(where)} characters; {FILTER_LENGTH} are allowed")
    parts: list[str] = []
    position = depth = 0
    end = len(where.rstrip())
    while position < end:
        token = TOKEN.match(where, position, end)
        if token is None:
            raise TercetError(f"cannot read the filter at {where[position:end].strip()[:20]!r}; {FILTER_EXAMPLE}")
        position = token.end()
        parts.append(_checked_token(token))
        depth += {"(": 1, ")": -1}.get(parts[-1], 0)
        if not 0 <= depth <= FILTER_DEPTH:
            raise TercetError(f"the filter's brackets do not match, or nest deeper than {FILTER_DEPTH}")
    if not parts or depth:
        raise TercetError(f"the filter is {'cut short' if parts else 'empty'}; {FILTER_EXAMPLE}")
    return " ".join(parts)


def _checked_token(token: re.Match[str]) -> str:
    if token["text"]:
        quote = token["text"][0]
        inside = token["text"][1:-1].replace(quote * 2, quote)
        if "\0" in inside:
            raise TercetError("the filter holds a null character")
        return "'" + inside.replace("'", "''") + "'"
    if token["word"]:
        word = token["word"].lower()
        if word in KEYWORDS or word in FILTER_COLUMNS:
            return word
        near = difflib.get_close_matches(word, FILTER_COLUMNS, 1)
        columns = f"the columns are {', '.join(FILTER_COLUMNS)}; text goes in quotes"
        raise TercetError(
            f"unknown word {token['word']!r} in the filter; {f'did you mean {near[0]}?' if near else columns}"
        )
    return "=" if token["mark"] == "==" else token["number"] or token["mark"]
