# pyright: reportAttributeAccessIssue=false
# The functions of pyarrow.compute are made when it is imported.
"""The approximate index: built above a size, tuned to a recall, measured against exact search.

Vectors are kept in cells (IVF) as 8-bit numbers.  A search reads the cells nearest to its query and compares the best
candidates with the vectors themselves.  How many cells it must read depends on the images, so it is measured: the
fewest with which `RECALL` of the exact results is found, for queries near to images of the index and for captions.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

APPROXIMATE = "approximate"
EXACT_BELOW = 50_000  # images; comparing so many vectors takes milliseconds
RECALL, RECALL_AT = 0.985, 10  # a little above 0.98, since a sample measures it
CELL = 1000  # images a cell
PROBES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
REFINE = 4  # candidates compared exactly, for each image asked for
QUERIES = 128
# Vectors a cell, and rounds, to find the centres with; LanceDB's defaults take three times as long for the same recall.
SAMPLE, ROUNDS = 64, 20
GROWTH = 2.0  # the index is built again when there are so many times as many images, or as few


@dataclass(frozen=True)
class ApproximateIndex:
    """How the approximate index was built, and what it reaches.

    Attributes:
        rows: images that it was built on.
        cells: parts that the vectors are in.
        probes: cells that a search reads.
        recall: share of the ten nearest images that it finds, for queries near to images.
        caption_recall: the same for captions; None without captions.
        seconds: of building, without tuning.
    """

    rows: int
    cells: int
    probes: int
    recall: float
    caption_recall: float | None
    seconds: float

    def probes_for(self, count: int) -> int:
        """Cells to read for `count` images: twice as many above the count that the recall was measured at."""
        return min(self.cells, self.probes * (1 if count <= RECALL_AT else 2))


def read_approximate(database: DBConnection) -> ApproximateIndex | None:
    """The approximate index of a database, if it has one."""
    if APPROXIMATE not in database.list_tables().tables:
        return None
    return ApproximateIndex(**database.open_table(APPROXIMATE).to_arrow().to_pylist()[0])


def needs_build(database: DBConnection, rows: int) -> bool:
    """Whether `rows` images need an approximate index that is not there, or another than the one that is."""
    last = read_approximate(database)
    return rows >= EXACT_BELOW and not (last and last.rows / GROWTH <= rows <= GROWTH * last.rows)


def build_approximate(
    database: DBConnection, table: Table, caption_feats: np.ndarray | None = None
) -> ApproximateIndex:
    """Build the approximate index and find the fewest probes that reach `RECALL`.

    Args:
        database: where the result is kept.
        table: of images, with no other writer.
        caption_feats: `text_feats` of captions to measure with, float32 `[captions, embed_dim]`.
    """
    from lancedb.index import IvfSq

    rows = table.count_rows()
    cells = max(16, round(rows / CELL))
    started = time.monotonic()
    config = IvfSq("cosine", num_partitions=cells, sample_rate=SAMPLE, max_iterations=ROUNDS)
    table.create_index("embedding", config=config, replace=True)
    seconds = time.monotonic() - started

    kinds = [_sample_queries(table)]
    if caption_feats is not None and len(caption_feats):
        kinds.append(caption_feats[:QUERIES])
    truth = np.split(exact_rows(table, np.concatenate(kinds)), [len(kinds[0])])
    recalls: list[float] = []
    probes = 0
    for probes in [probes for probes in PROBES if probes < cells] or [cells]:
        recalls = [measure_recall(table, queries, own, probes) for queries, own in zip(kinds, truth, strict=False)]
        if min(recalls) >= RECALL:
            break
    built = ApproximateIndex(rows, cells, probes, recalls[0], recalls[1] if len(recalls) > 1 else None, seconds)
    mode = "overwrite" if APPROXIMATE in database.list_tables().tables else "create"
    database.create_table(APPROXIMATE, pa.Table.from_pylist([asdict(built)]), mode=mode)
    return built


def exact_query(table: Table, vectors: np.ndarray) -> Any:
    """A query by vectors `[queries, embed_dim]` that compares every vector."""
    return _query(table, vectors).bypass_vector_index()


def approximate_query(table: Table, vectors: np.ndarray, probes: int) -> Any:
    """A query by vectors `[queries, embed_dim]` that reads `probes` cells for each."""
    return _query(table, vectors).nprobes(probes).refine_factor(REFINE)


def split_by_query(found: pa.Table, queries: int) -> list[pa.Table]:
    """What a query by several vectors found, a table for each vector."""
    if queries == 1:
        return [found]
    return [found.filter(pc.equal(found["query_index"], query)) for query in range(queries)]


def exact_rows(table: Table, queries: np.ndarray) -> np.ndarray:
    """Row ids of the `RECALL_AT` nearest images of `queries`, `[queries, RECALL_AT]`, by one pass over the table."""
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    best = np.full((len(queries), RECALL_AT), -np.inf, np.float32)
    rows = np.zeros(best.shape, np.uint64)
    for batch in table.search().select(["embedding"]).with_row_id(True).to_batches(16_384):
        vectors = batch["embedding"].flatten().to_numpy().reshape(batch.num_rows, -1)
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        numbers = np.broadcast_to(batch["_rowid"].to_numpy(), (len(queries), batch.num_rows))
        top = np.argpartition(-scores, RECALL_AT - 1, axis=1)[:, :RECALL_AT]
        best = np.take_along_axis(scores, top, axis=1)
        rows = np.take_along_axis(np.concatenate([rows, numbers], axis=1), top, axis=1)
    return rows


def measure_recall(table: Table, queries: np.ndarray, truth: np.ndarray, probes: int) -> float:
    """Share of the exact results `truth` `[queries, RECALL_AT]` that reading `probes` cells finds."""
    query = approximate_query(table, queries, probes).limit(RECALL_AT).select(["_distance"]).with_row_id(True)
    found = [part["_rowid"].to_numpy() for part in split_by_query(query.to_arrow(), len(queries))]
    return sum(np.isin(own, rows).sum() for own, rows in zip(truth, found, strict=True)) / truth.size


def sample_rows(table: Table, count: int, column: str) -> list[Any]:
    """A column of up to `count` rows spread over the table."""
    offsets = np.unique(np.linspace(0, table.count_rows() - 1, count).astype(int)).tolist()
    return table.take_offsets(offsets).select([column]).to_arrow()[column].to_pylist()


def _sample_queries(table: Table) -> np.ndarray:
    """Embeddings of the table, slightly moved so that none finds itself at distance 0, `[queries, embed_dim]`."""
    vectors = np.array(sample_rows(table, QUERIES, "embedding"), np.float32)
    noise = np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)
    return vectors + 0.1 * noise / math.sqrt(vectors.shape[1])


def _query(table: Table, vectors: np.ndarray) -> Any:
    query: Any = table.search(list(vectors) if len(vectors) > 1 else vectors[0], vector_column_name="embedding")
    return query.distance_type("cosine")
