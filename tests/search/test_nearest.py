"""The approximate index: found by itself, tuned to its recall, used where it helps, and never wrong about filters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tercet.search import index as index_module
from tercet.search.index import Index
from tercet.search.nearest import RECALL, build_if_large, exact_neighbours, last_build, recall
from tercet.search.table import image_schema

COUNT, DIM = 6000, 16


def fill(path: Path, vectors: np.ndarray, start: int = 0) -> Index:
    index = Index.open(str(path)) if path.exists() else Index.create(str(path), "m", "", vectors.shape[1])
    constants = {"width": 64, "height": 64, "size": 0, "sha256": "", "thumbnail": b""}
    columns = []
    for field in image_schema(vectors.shape[1], index.made):
        if field.name == "embedding":
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]))
        elif field.name in ("id", "uri"):
            columns.append(pa.array([f"{number:016x}" for number in range(start, start + len(vectors))]))
        elif field.name == "modified":
            columns.append(pa.array([0] * len(vectors), pa.int64()).cast(field.type))
        else:
            columns.append(pa.array([constants.get(field.name)] * len(vectors), field.type))
    index.table.add(pa.Table.from_arrays(columns, schema=index.table.schema))
    return index


def draw(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = np.random.default_rng(9).normal(size=(40, DIM))[rng.integers(40, size=count)]
    vectors = vectors + 0.5 * rng.normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_the_approximate_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = draw(COUNT, 0)
    index = fill(tmp_path / "index", vectors)
    assert build_if_large(index) is None and index.build is None  # few images: every vector is compared
    queries = draw(30, 1)
    truth = exact_neighbours(index, queries)
    scores = queries @ vectors.T
    assert truth == [{f"{place:016x}" for place in np.argsort(-own)[:10]} for own in scores]

    build = build_if_large(index, lambda: draw(20, 2), exact_below=1000)
    assert build is not None and build.rows == COUNT and build.recall >= RECALL
    assert build.caption_recall is not None and build.caption_recall >= RECALL
    assert last_build(Index.open(str(tmp_path / "index")).database) == build == index.build
    assert recall(index.table, queries, truth, build.probes) >= 0.97
    monkeypatch.setattr(index_module, "EXACT_BELOW", 1000)
    found = index.nearest(queries[0], 10)
    assert len({one.entry.id for one in found} & truth[0]) >= 9
    best = max(found, key=lambda one: one.cosine)
    assert best.cosine == pytest.approx(float(scores[0, int(best.entry.id, 16)]), abs=1e-5)  # exact, not of 8 bits
    assert [one.cosine for one in found] == sorted([one.cosine for one in found], reverse=True)
    assert {one.entry.id for one in index.nearest(queries[0], 10, exact=True)} == truth[0]
    # A filter that leaves few images compares all of them, wherever their cells are.
    few = index.nearest(queries[0], 10, where="id like '000000000000000_'")
    assert sorted(int(one.entry.id, 16) for one in few) == sorted(np.argsort(-scores[0, :16])[:10].tolist())


def test_many_at_once_are_each_alone(tmp_path: Path) -> None:
    index, queries = fill(tmp_path / "index", draw(COUNT, 0)), draw(9, 1)
    where = "id like '00000000000000__'"
    for _ in range(2):  # every vector compared, then the approximate index
        for given, exact in ((None, False), (None, True), (where, False)):
            many = index.nearest_many(queries, 12, given, exact)
            assert [len(found) for found in many] == [12] * len(queries)
            for found, query in zip(many, queries, strict=True):
                alone = index.nearest(query, 12, given, exact)
                assert [one.entry for one in found] == [one.entry for one in alone]
                assert [one.cosine for one in found] == pytest.approx([one.cosine for one in alone], abs=1e-6)
        build_if_large(index, exact_below=1000)
    assert index.build is not None
    nothing = index.nearest_many(queries, 12, "width > 64")
    assert nothing == [[] for _ in queries]


def test_built_anew_when_the_images_have_doubled(tmp_path: Path) -> None:
    index = fill(tmp_path / "index", draw(2000, 0))
    first = build_if_large(index, exact_below=1000)
    assert first is not None and first.caption_recall is None
    fill(tmp_path / "index", draw(1500, 3), 2000)
    index = Index.open(str(tmp_path / "index"))
    assert build_if_large(index, exact_below=1000) is None
    index.table.optimize()
    fill(tmp_path / "index", draw(1500, 4), 3500)
    second = build_if_large(Index.open(str(tmp_path / "index")), lambda: draw(20, 2), exact_below=1000)
    assert second is not None and second.rows == 5000 and second.caption_recall is not None
