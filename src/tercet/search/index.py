"""An index: a LanceDB table with a row for each image, and what made it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tercet.data.images import BrokenImage
from tercet.data.listing import read_image
from tercet.data.storage import is_url
from tercet.errors import TercetError
from tercet.search.filters import checked_filter
from tercet.search.nearest import (
    EXACT_BELOW,
    Build,
    approximate_query,
    exact_query,
    last_build,
    probes_for,
    rows_by_vector,
)
from tercet.search.table import ENTRY_COLUMNS, IMAGES, Made, connect, image_schema, lance_errors, read_made

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table
    from torch import Tensor

    from tercet.model.tercet import Tercet

HEX = frozenset("0123456789abcdef")
ID_LENGTH = 16
BUILD_SECONDS = 60.0


@dataclass(frozen=True)
class Entry:
    """An image of an index.

    Attributes:
        id: 16 hexadecimal digits that follow from `uri`.
        uri: where it lies.
        caption: the first that came with it.
        width: pixels.
        height: pixels.
    """

    id: str
    uri: str
    caption: str | None
    width: int
    height: int


@dataclass(frozen=True)
class Neighbour:
    """An image near to a query; `cosine` says how near, `sha256` which bytes were embedded."""

    entry: Entry
    cosine: float
    sha256: str


class Index:
    """Images with their embeddings.  What another process adds is seen within seconds.

    Attributes:
        path: folder or URI.
        model: folder or hub id of the model that embedded the images.
        model_digest: tells whether another model is the same; see `model_digest`.
        created: ISO 8601, UTC.
    """

    def __init__(self, path: str, database: DBConnection, table: Table) -> None:
        self.path = path
        self.database = database
        self.table = table
        self.made = read_made(table.schema, path)
        self.model, self.model_digest, self.created = self.made.model, self.made.model_digest, self.made.created
        self._build: Build | None = None
        self._build_read = float("-inf")
        self.embed_dim: int = table.schema.field("embedding").type.list_size

    @classmethod
    def open(cls, path: str) -> Index:
        """Open an index.

        Raises:
            TercetError: the extra is not installed, or there is no index at `path`, or it is damaged.
        """
        path = str(path)
        if not is_url(path) and not Path(path).is_dir():
            raise TercetError(f"no index at {path}; make one: tercet index IMAGES --model MODEL --to {path}")
        database = connect(path)
        with lance_errors(f"{path} is damaged, or no index"):
            names = database.list_tables().tables
        if IMAGES not in names:
            raise TercetError(f"{path} holds no index; make one: tercet index IMAGES --model MODEL --to {path}")
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
        database = connect(path)
        made = Made(model, digest, datetime.now(UTC).isoformat(timespec="seconds"))
        with lance_errors(f"cannot make an index at {path}"):
            return cls(path, database, database.create_table(IMAGES, schema=image_schema(embed_dim, made)))

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
    def updated(self) -> str:
        """When the table was last changed: ISO 8601, UTC."""
        with lance_errors(f"cannot read {self.path}"):
            newest: datetime = self.table.list_versions()[-1]["timestamp"]
        return newest.astimezone(UTC).isoformat(timespec="seconds")

    def entry(self, image_id: str) -> Entry:
        """What is known of an image.

        Raises:
            TercetError: the index has no such image.
        """
        return _entry(self._row(image_id, ENTRY_COLUMNS))

    def newest(self, count: int) -> list[Entry]:
        """The images that were indexed last, `count` at most, the last first."""
        with lance_errors(f"cannot read {self.path}"):
            query = self.table.search().select(list(ENTRY_COLUMNS)).limit(count)
            rows = query.offset(max(0, self.table.count_rows() - count)).to_arrow().to_pylist()
        return [_entry(row) for row in reversed(rows)]

    def thumbnail(self, image_id: str) -> bytes:
        """A small JPEG of an image, of `THUMBNAIL_SIDE` pixels at most; there even when the image itself is gone.

        Raises:
            TercetError: the index has no such image.
        """
        return self._row(image_id, ["thumbnail"])["thumbnail"]

    def thumbnails(self, image_ids: Sequence[str]) -> dict[str, bytes]:
        """`thumbnail` of several images; ids that the index does not have are left out."""
        return {row["id"]: row["thumbnail"] for row in self.rows(image_ids, ["id", "thumbnail"])}

    def image(self, image_id: str) -> bytes:
        """The image's file as it was indexed, from where it lies.

        Raises:
            TercetError: the index has no such image, or its file is gone or is not the same any more.
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
        lost = next((image_id for image_id in image_ids if image_id not in rows), None)
        if lost is not None:
            raise TercetError(f"no image {lost!r} in {self.path}")
        return np.array([rows[image_id] for image_id in image_ids], np.float32)

    def rows(self, image_ids: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of the images of these ids, in no order; ids that the index does not have are left out."""
        known = [image_id for image_id in image_ids if _is_id(image_id)]
        if not known:
            return []
        listed = ", ".join(f"'{image_id}'" for image_id in known)
        with lance_errors(f"cannot read {self.path}"):
            query = self.table.search().where(f"id IN ({listed})").select(list(columns)).limit(len(known))
            return query.to_arrow().to_pylist()

    def nearest(
        self, feats: Tensor | np.ndarray, count: int, where: str | None = None, exact: bool = False
    ) -> list[Neighbour]:
        """The images whose embeddings are nearest to `feats` `[embed_dim]`, the nearest first.

        Every vector is compared where there are few, or few that the filter leaves; else the approximate index answers.

        Args:
            feats: of any length; only its direction counts.
            count: how many at most.
            where: a filter; see `tercet.search.filters`.
            exact: compare every vector, however many there are.

        Raises:
            TercetError: the filter cannot be read, or the table cannot.
        """
        return self.nearest_many(np.asarray(feats, np.float32)[None], count, where, exact)[0]

    def nearest_many(
        self, feats: Tensor | np.ndarray, count: int, where: str | None = None, exact: bool = False
    ) -> list[list[Neighbour]]:
        """What `nearest` gives of each of `feats` `[queries, embed_dim]`, in one query to the table.

        Raises:
            TercetError: as `nearest`.
        """
        vectors = np.asarray(feats, np.float32)
        sql = None if where is None else checked_filter(where)
        with lance_errors(f"cannot search {self.path}" if where is None else f"cannot search by the filter {where!r}"):
            build = None if exact else self.build
            if build is None or (sql is not None and self.table.count_rows(sql) < EXACT_BELOW):
                query = exact_query(self.table, vectors)
            else:
                query = approximate_query(self.table, vectors, probes_for(build, count), build.refine)
            query = query.limit(count).select([*ENTRY_COLUMNS, "sha256", "_distance"])
            if sql is not None:
                query = query.where(sql, prefilter=True)
            found = rows_by_vector(query, len(vectors))
        return [[Neighbour(_entry(row), 1.0 - row["_distance"], row["sha256"]) for row in rows] for rows in found]

    @property
    def build(self) -> Build | None:
        """The approximate index as it is, None while every vector is compared; looked up once a minute."""
        if time.monotonic() - self._build_read > BUILD_SECONDS:
            self.refresh_build()
        return self._build

    def refresh_build(self) -> None:
        """Look up the approximate index again."""
        self._build = last_build(self.database)
        self._build_read = time.monotonic()

    def _row(self, image_id: str, columns: Sequence[str]) -> dict[str, Any]:
        rows = self.rows([image_id], columns)
        if not rows:
            raise TercetError(f"no image {image_id!r} in {self.path}")
        return rows[0]


def image_id(uri: str) -> str:
    """The id of the image at `uri`; among 100 million images two share one with a chance of 0.03 %."""
    return hashlib.blake2b(uri.encode("utf-8", "surrogateescape"), digest_size=ID_LENGTH // 2).hexdigest()


def model_digest(model: Tercet) -> str:
    """SHA-256 of what an embedding depends on: the image encoder, its projection and the size that it reads."""
    digest = hashlib.sha256(f"{model.config.vision.image_size} {model.config.vision.patch_size}".encode())
    for part in (model.vision, model.vision_projection):
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _is_id(image_id: str) -> bool:
    return len(image_id) == ID_LENGTH and set(image_id) <= HEX


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(row["id"], row["uri"], row["caption"], row["width"], row["height"])
