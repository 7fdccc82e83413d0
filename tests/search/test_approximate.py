"""The approximate index: built above a size, tuned to its recall, and never wrong about filters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tercet.search import approximate
from tercet.search import index as index_module
from tercet.search.approximate import RECALL, build_approximate, exact_rows, measure_recall, needs_build
from tercet.search.index import Index, image_schema

COUNT, DIM = 6000, 16


def fill(path: Path, vectors: np.ndarray) -> Index:
    index = Index.create(str(path), "m", "", vectors.shape[1])
    row = {"uri": "u", "width": 64, "height": 64, "size": 0, "modified": 0, "sha256": "", "thumbnail": b""}
    rows = [{**row, "id": f"{number:016x}", "embedding": vector} for number, vector in enumerate(vectors)]
    index.table.add(pa.Table.from_pylist(rows, schema=image_schema(vectors.shape[1])))
    return index


def sample(count: int, seed: int) -> np.ndarray:
    """Unit vectors in 40 clusters."""
    rng = np.random.default_rng(seed)
    vectors = np.random.default_rng(9).normal(size=(40, DIM))[rng.integers(40, size=count)]
    vectors = vectors + 0.5 * rng.normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_recall_order_and_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = sample(COUNT, 0), sample(30, 1)
    index = fill(tmp_path / "index", vectors)
    assert index.approximate is None
    scores = queries @ vectors.T
    nearest = [set(row.tolist()) for row in np.argsort(-scores)[:, :10]]
    truth = exact_rows(index.table, queries)
    assert [set(row.tolist()) for row in truth] == nearest  # of a table without deletions, row ids are row numbers

    built = build_approximate(index.database, index.table, sample(20, 2))
    assert built.rows == COUNT and built.recall >= RECALL
    assert built.caption_recall is not None and built.caption_recall >= RECALL
    index = Index.open(str(tmp_path / "index"))
    assert index.approximate == built
    assert measure_recall(index.table, queries, truth, built.probes) >= 0.97
    unlike = np.random.default_rng(3).normal(size=(30, DIM)).astype(np.float32)  # between clusters
    assert measure_recall(index.table, unlike, exact_rows(index.table, unlike), 1) < 0.9

    monkeypatch.setattr(index_module, "EXACT_BELOW", 1000)
    (found,) = index.nearest(queries[:1], 10)
    assert len({int(hit.id, 16) for hit in found} & nearest[0]) >= 9
    cosines = [hit.cosine for hit in found]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] == pytest.approx(scores[0, int(found[0].id, 16)], abs=1e-5)  # not of 8-bit numbers
    (exact,) = index.nearest(queries[:1], 10, exact=True)
    assert {int(hit.id, 16) for hit in exact} == nearest[0]
    # A filter that few images pass compares all of them, whatever their cells.
    (few,) = index.nearest(queries[:1], 10, where="id like '000000000000000_'")
    assert sorted(int(hit.id, 16) for hit in few) == sorted(np.argsort(-scores[0, :16])[:10].tolist())


def test_many_queries_equal_each_alone(tmp_path: Path) -> None:
    index, queries = fill(tmp_path / "index", sample(COUNT, 0)), sample(9, 1)
    where = "id like '00000000000000__'"
    for _ in range(2):  # every vector compared, then the approximate index
        for given, exact in ((None, False), (None, True), (where, False)):
            many = index.nearest(queries, 12, given, exact)
            assert [len(hits) for hits in many] == [12] * len(queries)
            for hits, query in zip(many, queries, strict=True):
                (alone,) = index.nearest(query[None], 12, given, exact)
                assert [hit.id for hit in hits] == [hit.id for hit in alone]
                assert [hit.cosine for hit in hits] == pytest.approx([hit.cosine for hit in alone], abs=1e-6)
        build_approximate(index.database, index.table)
        index = Index.open(str(tmp_path / "index"))
    assert index.approximate is not None and index.approximate.caption_recall is None
    assert index.nearest(queries, 12, "width > 64") == [[] for _ in queries]


def test_built_above_a_size_and_when_the_images_have_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "EXACT_BELOW", 1000)
    index = fill(tmp_path / "index", sample(2000, 0))
    assert [needs_build(index.database, rows) for rows in (999, 1000)] == [False, True]
    build_approximate(index.database, index.table)
    needed = [needs_build(index.database, rows) for rows in (999, 1000, 4000, 4001)]
    assert needed == [False, False, False, True]
    index.table.add(index.table.to_arrow())
    assert build_approximate(index.database, index.table, sample(20, 2)).rows == 4000
    again = Index.open(str(tmp_path / "index")).approximate
    assert again is not None and again.rows == 4000 and again.caption_recall is not None
