"""The approximate index: built by itself above a size, tuned to the recall that is asked for, measured against exact.

Vectors are kept in cells (IVF) as 8-bit numbers; a search reads the cells nearest to it and compares the best of what
it finds with the vectors themselves.  How many cells it must read depends on the images, so it is found by trying:
the fewest with which `RECALL` of the exact results is reached, by images of the index as queries and by their captions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from tercet.search.table import BUILDS, lance_errors

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

    from tercet.search.index import Index

# Below, reading every vector takes milliseconds, and is exact.
EXACT_BELOW = 50_000
RECALL, RECALL_AT = 0.985, 10  # a little above 0.98, since a sample measures it
CELL = 1000  # images a cell
PROBES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
REFINE = 4  # candidates that are compared exactly, for each image asked for
QUERIES = 128
# Vectors a cell, and rounds, that the centres are found with: what more of either brings is far below 0.01 of recall.
SAMPLE, ROUNDS = 64, 20
GROWTH = 2.0  # the centres are found anew when there are so many times as many images


@dataclass(frozen=True)
class Build:
    """An approximate index as it was built.

    Attributes:
        kind: as LanceDB names it.
        rows: images that it was built on.
        cells: parts that the vectors are in.
        probes: cells that a search reads.
        refine: candidates compared exactly, for each image asked for.
        recall: share of the ten nearest images that it finds, of image queries.
        caption_recall: the same of captions as queries; None without captions.
        seconds: that building took, without measuring.
        built: ISO 8601, UTC.
    """

    kind: str
    rows: int
    cells: int
    probes: int
    refine: int
    recall: float
    caption_recall: float | None
    seconds: float
    built: str


def build_if_large(
    index: Index, caption_feats: Callable[[], np.ndarray] | None = None, exact_below: int = EXACT_BELOW
) -> Build | None:
    """Build the approximate index where there are images enough and none fits; None where nothing was to be done.

    Args:
        index: with no other writer.
        caption_feats: gives `text_feats` of captions to measure with, float32 `[captions, embed_dim]`.
        exact_below: images below which every vector is read.
    """
    rows = index.count
    last = last_build(index.database)
    if rows < exact_below or (last is not None and last.rows / GROWTH <= rows <= GROWTH * last.rows):
        return None
    from lancedb.index import IvfSq

    cells = max(16, round(rows / CELL))
    started = time.monotonic()
    with lance_errors(f"cannot build the approximate index of {index.path}"):
        config = IvfSq("cosine", num_partitions=cells, sample_rate=SAMPLE, max_iterations=ROUNDS)
        index.table.create_index("embedding", config=config, replace=True)
        seconds = time.monotonic() - started
        build = _tuned(index, rows, cells, seconds, caption_feats() if caption_feats else np.zeros((0, 1), np.float32))
        _note(index.database, build)
    index.refresh_build()
    return build


def last_build(database: DBConnection) -> Build | None:
    """The newest build that was noted, if any."""
    if BUILDS not in database.list_tables().tables:
        return None
    rows: list[dict[str, Any]] = database.open_table(BUILDS).to_arrow().to_pylist()
    newest = max(rows, key=lambda row: row["built"], default=None)
    return None if newest is None else Build(**newest)


def probes_for(build: Build, count: int) -> int:
    """Cells to read for `count` images: twice as many where more are asked for than the recall was measured at."""
    return min(build.cells, build.probes * (1 if count <= RECALL_AT else 2))


def approximate_query(table: Table, vectors: np.ndarray, probes: int, refine: int) -> Any:
    """A query by vectors `[queries, embed_dim]` that reads `probes` cells for each."""
    return _vector_query(table, vectors).nprobes(probes).refine_factor(refine)


def _tuned(index: Index, rows: int, cells: int, seconds: float, caption_feats: np.ndarray) -> Build:
    """The least probes that reach the recall, for either kind of query."""
    images = sample_embeddings(index, QUERIES)
    kinds = [images, caption_feats[:QUERIES]] if len(caption_feats) else [images]
    together = exact_neighbours(index, np.concatenate(kinds))
    truths = [together[: len(images)], together[len(images) :]][: len(kinds)]
    recalls: list[float] = []
    tried = [probes for probes in PROBES if probes < cells] or [cells]
    probes = tried[-1]
    for probes in tried:
        recalls = [recall(index.table, queries, truth, probes) for queries, truth in zip(kinds, truths, strict=True)]
        if min(recalls) >= RECALL:
            break
    return Build(
        "IVF_SQ",
        rows,
        cells,
        probes,
        REFINE,
        recalls[0],
        recalls[1] if len(recalls) > 1 else None,
        seconds,
        datetime.now(UTC).isoformat(),
    )


def recall(table: Table, queries: np.ndarray, truths: Sequence[set[str]], probes: int) -> float:
    """Share of the exact results of queries `[queries, embed_dim]` that reading `probes` cells finds."""
    query = approximate_query(table, queries, probes, REFINE).limit(RECALL_AT).select(["id", "_distance"])
    found = [{row["id"] for row in rows} for rows in rows_by_vector(query, len(queries))]
    return sum(len(own & truth) for own, truth in zip(found, truths, strict=True)) / sum(map(len, truths))


def exact_neighbours(index: Index, queries: np.ndarray) -> list[set[str]]:
    """Ids of the `RECALL_AT` nearest images of each of `queries` `[queries, embed_dim]`, by one pass over the table."""
    directions = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    best = np.full((len(queries), RECALL_AT), -np.inf, np.float32)
    names = np.full(best.shape, "", dtype=object)
    for batch in index.table.search().select(["id", "embedding"]).to_batches(65_536):
        vectors = batch.column("embedding").flatten().to_numpy().reshape(batch.num_rows, -1)
        scores = np.concatenate([best, directions @ vectors.T], axis=1)
        ids = np.array(batch.column("id").to_pylist(), dtype=object)
        kept = np.argpartition(-scores, RECALL_AT - 1, axis=1)[:, :RECALL_AT]
        old = np.take_along_axis(names, np.minimum(kept, RECALL_AT - 1), axis=1)
        names = np.where(kept < RECALL_AT, old, ids[np.maximum(kept - RECALL_AT, 0)])
        best = np.take_along_axis(scores, kept, axis=1)
    return [set(own.tolist()) - {""} for own in names]


def exact_query(table: Table, vectors: np.ndarray) -> Any:
    """A query by vectors `[queries, embed_dim]` that reads every vector."""
    return _vector_query(table, vectors).bypass_vector_index()


def rows_by_vector(query: Any, count: int) -> list[list[dict[str, Any]]]:
    """The rows that a query by `count` vectors finds, apart for each, the nearest first."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for row in query.to_arrow().to_pylist():
        found[row.get("query_index", 0)].append(row)  # which vector it was found for; not there with a single one
    return found


def _vector_query(table: Table, vectors: np.ndarray) -> Any:
    query: Any = table.search(list(vectors) if len(vectors) > 1 else vectors[0], vector_column_name="embedding")
    return query.distance_type("cosine")


def sample_embeddings(index: Index, count: int) -> np.ndarray:
    """Embeddings of images spread over the table, slightly moved so that none finds itself at distance 0.

    Returns:
        float32 `[count, embed_dim]`.
    """
    rows = index.count
    places = np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(int)).tolist()
    with lance_errors(f"cannot read {index.path}"):
        found = index.table.take_offsets(places).select(["embedding"]).to_arrow()
    vectors = np.array(found["embedding"].to_pylist(), np.float32)
    noise = np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)
    return vectors + 0.1 * noise / math.sqrt(vectors.shape[1])


def sample_captions(index: Index, count: int) -> list[str]:
    """Captions of images spread over the table; fewer where there are fewer."""
    rows = index.count
    places = np.unique(np.linspace(0, rows - 1, min(4 * count, rows)).astype(int)).tolist()
    with lance_errors(f"cannot read {index.path}"):
        found = index.table.take_offsets(places).select(["caption"]).to_arrow()["caption"].to_pylist()
    return [caption for caption in found if caption][:count]


def _note(database: DBConnection, build: Build) -> None:
    import pyarrow as pa

    kinds = {"str": pa.string(), "int": pa.int64()}
    # Annotations are text here; the rest are numbers with a fraction, or none.
    schema = pa.schema([(part.name, kinds.get(str(part.type), pa.float64())) for part in fields(build)])
    table = pa.Table.from_pylist([asdict(build)], schema=schema)
    if BUILDS in database.list_tables().tables:
        database.open_table(BUILDS).add(table)
    else:
        database.create_table(BUILDS, table)
