# pyright: reportAttributeAccessIssue=false
# The functions of pyarrow.compute are made when it is imported.
"""Building an index and bringing it up to date: only new and changed images are read, and commits are small."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tercet.config import DataConfig
from tercet.data.augment import Pixels
from tercet.data.builders import is_empty
from tercet.data.images import decode, resize
from tercet.data.listing import find_images, lies_under, read_image
from tercet.data.rows import Rejected
from tercet.data.storage import is_url
from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.search.approximate import QUERIES, ApproximateIndex, build_approximate, needs_build, sample_rows
from tercet.search.index import Index, image_id, image_schema, lance_errors, model_digest, sql_in

BATCH = 32  # images embedded together
READ_AHEAD = 4  # batches read while one is embedded
THREADS = 4
COMMIT_IMAGES, COMMIT_SECONDS = 2048, 20.0
IDS_AT_ONCE = 1000
# Versions of the table that a search in another process may still be reading are kept so long.
KEEP_VERSIONS = timedelta(minutes=10)
LOCK = ".writing"
THUMBNAIL_SIDE = 256
LISTED = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("modified", pa.int64()),
        pa.field("offset", pa.int64()),
    ]
)

Progress = Callable[[int, int], None]  # images done, images to do
# Tables of listed images in, tables of `embedded_schema` out, in any order.
Embed = Callable[[pa.Table], Iterator[pa.Table]]


@dataclass
class IndexReport:
    """What indexing did.

    Attributes:
        added: images that are new.
        changed: images that were embedded again because their file or caption changed.
        unchanged: images that were there already.
        removed: rows whose image is no longer where it was.
        skipped: images that could not be read, with the reason.
        seconds: in total.
        approximate: the approximate index, if it was built.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped: Rejected = field(default_factory=Rejected)
    seconds: float = 0.0
    approximate: ApproximateIndex | None = None


def build_index(
    specs: Sequence[str],
    predictor: Predictor,
    model_name: str,
    path: str,
    progress: Progress = lambda done, total: None,
    embed: Embed | None = None,
) -> tuple[Index, IndexReport]:
    """Bring the index at `path` up to date with the images that `specs` name; make it where there is none.

    Images that the index holds from elsewhere stay in it.

    Args:
        specs: folders, images, shards, tables, annotation files, globs or URLs of these.
        predictor: on the device that embeds.
        model_name: its folder or hub id, recorded in a new index.
        path: folder or URI of the index.
        progress: called as images are done.
        embed: reads and embeds listed images; default `embed_local` with `predictor`.

    Raises:
        TercetError: no image is found, the index was made by another model, another process writes to it, or the disk
            is full.
    """
    started = time.monotonic()
    report = IndexReport()
    with lock_index(path):
        listed = list_images(specs, report.skipped)  # before an index is made: a spec may name nothing
        index = _open_or_create(path, predictor, model_name)
        known = _known_images(index)
        state = compare(listed, known)
        report.unchanged = pc.sum(pc.equal(state, "same")).as_py() or 0
        changed = listed.filter(pc.equal(state, "changed"))["id"]
        due = listed.filter(pc.not_equal(state, "same"))
        embed = embed or partial(embed_local, predictor)
        _embed_and_commit(index, due, changed, embed, report, progress)
        gone = _missing(index, known, listed, specs)
        report.removed = len(gone)
        with lance_errors(f"cannot write {index.path}"):
            for start in range(0, len(gone), IDS_AT_ONCE):
                index.table.delete(sql_in(gone[start : start + IDS_AT_ONCE]))
            # Joins small files, adds new rows to the approximate index, and drops old versions.
            index.table.optimize(cleanup_older_than=KEEP_VERSIONS)
            if needs_build(index.database, index.count):
                feats = _caption_feats(index, predictor)
                report.approximate = build_approximate(index.database, index.table, feats)
    report.seconds = time.monotonic() - started
    return index, report


def list_images(specs: Sequence[str], skipped: Rejected) -> pa.Table:
    """The images that specifications name, as a table of `LISTED`; one that is named twice is listed once.

    `size` and `modified` (microseconds since 1970) are 0 where they are not known before reading.
    """
    columns: dict[str, list[Any]] = {name: [] for name in LISTED.names}
    for image in find_images(specs, skipped):
        columns["id"].append(image_id(image.uri))
        for name in LISTED.names[1:]:
            columns[name].append(getattr(image, name))
    listed = pa.table(columns, schema=LISTED)
    first = pc.index_in(listed["id"], value_set=listed["id"])
    return listed.filter(pc.equal(first, pa.array(np.arange(len(listed)), first.type)))


def compare(listed: pa.Table, known: pa.Table) -> pa.ChunkedArray:
    """Whether each listed image is `new`, `changed` or the `same` as its row of the index.

    An image without size and time, such as one behind a URL, counts as the same.
    """
    row = pc.index_in(listed["id"], value_set=known["id"])
    before = known.take(pc.fill_null(row, 0)) if len(known) else None
    if before is None:
        return pa.chunked_array([pa.array(["new"] * len(listed), pa.string())])
    size = pc.or_(pc.equal(listed["size"], 0), pc.equal(listed["size"], before["size"]))
    modified = pc.equal(listed["modified"], before["modified"].cast(pa.int64()))
    caption = pc.equal(pc.fill_null(listed["caption"], ""), pc.fill_null(before["caption"], ""))
    same = pc.and_(pc.and_(size, modified), caption)
    return pc.if_else(pc.is_null(row), "new", pc.if_else(same, "same", "changed"))


def embedded_schema(embed_dim: int) -> pa.Schema:
    """Columns of embedded images: those of the index, null where the image could not be read, and `error`, why not."""
    fields = [one.with_nullable(True) for one in image_schema(embed_dim)]
    return pa.schema([*fields, pa.field("error", pa.string())])


def embed_local(predictor: Predictor, listed: pa.Table) -> Iterator[pa.Table]:
    """Read in threads, embed on the model's device."""
    size = predictor.model.config.vision.image_size
    waiting: deque[Future[tuple[list[dict[str, Any]], list[Pixels]]]] = deque()
    with ThreadPoolExecutor(THREADS, "tercet-read") as readers:
        try:
            for start in range(0, len(listed), BATCH):
                waiting.append(readers.submit(read_rows, listed.slice(start, BATCH), size))
                if len(waiting) > READ_AHEAD:
                    yield embed_rows(predictor, *waiting.popleft().result())
            while waiting:
                yield embed_rows(predictor, *waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()


def read_rows(listed: pa.Table, image_size: int) -> tuple[list[dict[str, Any]], list[Pixels]]:
    """Read and decode images.

    Returns:
        rows: of the index but for `embedding`, or with `error` where the image cannot be read.
        pixels: uint8 `[image_size, image_size, 3]` of each row without an error.
    """
    rows, pixels = [], []
    for row in listed.to_pylist():
        try:
            data = read_image(row["uri"], row["size"], row["offset"])
            # In full, as every evaluation decodes, so that the embedding equals that of `embed_images`.
            image = decode(data, row["uri"])
        except TercetError as error:
            reason = str(error)
            rows.append(row | {"error": reason if row["uri"] in reason else f"{row['uri']}: {reason}"})
            continue
        height, width = image.shape[:2]
        facts = {"width": width, "height": height, "size": row["size"] or len(data)}
        rows.append(row | facts | {"sha256": hashlib.sha256(data).hexdigest(), "thumbnail": make_thumbnail(image)})
        pixels.append(resize(image, image_size))
    return rows, pixels


def embed_rows(predictor: Predictor, rows: list[dict[str, Any]], pixels: list[Pixels]) -> pa.Table:
    """What `read_rows` gave, with embeddings, as a table of `embedded_schema`."""
    feats = iter(predictor.embed_images(pixels).float().numpy() if pixels else ())
    for row in rows:
        if "error" not in row:
            row["embedding"] = next(feats)
    return pa.Table.from_pylist(rows, schema=embedded_schema(predictor.model.config.embed_dim))


def make_thumbnail(pixels: Pixels) -> bytes:
    """A JPEG whose longer side has at most `THUMBNAIL_SIDE` pixels; small images are not enlarged."""
    scale = THUMBNAIL_SIDE / max(pixels.shape[:2])
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)  # pyright: ignore
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    return np.asarray(cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), quality)[1]).tobytes()


@contextmanager
def lock_index(path: str) -> Iterator[None]:
    """Keep other processes of this machine from writing to the index in the folder `path`; a kill frees the lock.

    Object storage has no locks: there the user must see to it that one process writes at a time.

    Raises:
        TercetError: another process writes to it, or the folder cannot be made.
    """
    if is_url(path):
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise TercetError(f"{path} is a file; choose a folder for the index")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise TercetError(f"another process is writing to {path}; wait until it has ended") from error
    except OSError as error:
        raise TercetError(f"cannot write {path}: {error.strerror or error}") from error


def _open_or_create(path: str, predictor: Predictor, model_name: str) -> Index:
    digest = model_digest(predictor.model)
    if not Index.exists(path):
        return Index.create(path, model_name, digest, predictor.model.config.embed_dim)
    index = Index.open(path)
    if index.model_digest != digest:
        raise TercetError(
            f"{path} was made by another model, {index.model}; index with that one, or choose a new folder"
        )
    return index


def _known_images(index: Index) -> pa.Table:
    with lance_errors(f"cannot read {index.path}"):
        known = index.table.search().select(["id", "caption", "size", "modified"]).to_arrow()
    # Captions of many millions of images are more than the 2 GiB that a `string` column can address.
    return known.set_column(1, "caption", known["caption"].cast(pa.large_string()))


def _missing(index: Index, known: pa.Table, listed: pa.Table, specs: Sequence[str]) -> list[str]:
    """Ids of images of the index that `specs` once named and name no more."""
    missing = known["id"].filter(pc.invert(pc.is_in(known["id"], value_set=listed["id"])))
    patterns = [lies_under(spec) for spec in specs]
    gone: list[str] = []
    for start in range(0, len(missing), IDS_AT_ONCE):
        for row in index.rows(missing.slice(start, IDS_AT_ONCE).to_pylist(), ["id", "uri"]):
            if any(pattern.fullmatch(row["uri"]) for pattern in patterns):
                gone.append(row["id"])
    return gone


def _embed_and_commit(
    index: Index, due: pa.Table, changed: pa.ChunkedArray, embed: Embed, report: IndexReport, progress: Progress
) -> None:
    """Embed and commit; what was embedded before an interruption is committed too."""
    pending: list[pa.Table] = []
    done, committed = 0, time.monotonic()
    progress(0, len(due))
    if not len(due):
        return
    try:
        for rows in embed(due):
            for reason in rows["error"].drop_null().to_pylist():
                report.skipped.add(reason)
            pending.append(rows.filter(pc.is_null(rows["error"])).drop_columns("error"))
            done += len(rows)
            if sum(map(len, pending)) >= COMMIT_IMAGES or time.monotonic() - committed > COMMIT_SECONDS:
                commit(index, pending, changed, report)
                committed = time.monotonic()
            progress(done, len(due))
    finally:
        commit(index, pending, changed, report)


def commit(index: Index, pending: list[pa.Table], changed: pa.ChunkedArray, report: IndexReport) -> None:
    """Write the pending rows, and empty the list.  Rows of `changed` ids replace those that are there.

    Raises:
        TercetError: the disk is full, or the folder cannot be written.
    """
    if not pending:
        return
    rows = pa.concat_tables(pending).cast(index.table.schema)
    pending.clear()
    is_changed = pc.is_in(rows["id"], value_set=changed)
    new, old = rows.filter(pc.invert(is_changed)), rows.filter(is_changed)
    with lance_errors(f"cannot write {index.path}; free some space or choose another folder"):
        if len(new):
            index.table.add(new)
            report.added += len(new)
        if len(old):
            index.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(old)
            report.changed += len(old)


def _caption_feats(index: Index, predictor: Predictor) -> np.ndarray | None:
    """`text_feats` of captions of the index, to measure the approximate index with, `[captions, embed_dim]`."""
    if predictor.model.tokenizer is None:
        return None
    captions = [caption for caption in sample_rows(index.table, 4 * QUERIES, "caption") if caption]
    texts = [caption for caption in captions if not is_empty(caption, DataConfig().max_words)][:QUERIES]
    return predictor.embed_texts(texts).numpy() if texts else None
