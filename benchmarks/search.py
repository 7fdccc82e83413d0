"""The default approximate index of `tercet index` against exact search on a million synthetic vectors, as JSON.

    python benchmarks/search.py            # 1,000,000 vectors of 256 dimensions: some minutes, 3 GB of disk
    python benchmarks/search.py --quick    # 60,000 vectors of 64 dimensions

The vectors come in clusters of unequal sizes, with most of their spread in few directions, as embeddings have; queries
are further samples, and for `shifted` samples with an offset, as text features have against image features.
FAISS's HNSW and flat index search the same vectors in the same run, where FAISS is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.device import processor_name
from tercet.search.approximate import build_approximate
from tercet.search.index import Index

BATCH = 50_000
K = 10
WARM = 20


class Clusters:
    """Unit vectors in clusters.

    Args:
        dim: of the vectors.
        clusters: how many, of Zipf-like sizes.
    """

    def __init__(self, dim: int, clusters: int) -> None:
        rng = np.random.default_rng(1)
        spectrum = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
        self.spectrum = spectrum / np.linalg.norm(spectrum)
        self.centres = rng.normal(size=(clusters, dim)).astype(np.float32) * self.spectrum
        self.turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0].astype(np.float32)
        self.shift = rng.normal(size=dim).astype(np.float32) / np.sqrt(dim)
        shares = np.arange(1, clusters + 1) ** -0.5
        self.shares = shares / shares.sum()

    def draw(self, count: int, seed: int, shift: float = 0.0) -> np.ndarray:
        """float32 `[count, dim]`, the same for the same seed."""
        rng = np.random.default_rng(seed)
        own = self.centres[rng.choice(len(self.shares), count, p=self.shares)]
        vectors = own + 0.6 * rng.normal(size=own.shape).astype(np.float32) * self.spectrum
        vectors = vectors @ self.turn + shift * self.shift
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def photographs(vectors: np.ndarray, first: int, schema: pa.Schema) -> pa.Table:
    """Rows for `vectors`, numbered from `first`, whose other columns vary as those of photographs do.

    A column of one value would be compressed to nothing, and LanceDB then unpacks a million of them to read ten.
    Thumbnails are left empty, to save gigabytes: a search does not read them.
    """
    count = len(vectors)
    rng = np.random.default_rng(first)
    numbers = range(first, first + count)
    sides = np.array([(640, 480), (480, 640), (1024, 683), (4032, 3024), (3024, 4032)])[rng.integers(5, size=count)]
    columns = {
        "id": [f"{number:016x}" for number in numbers],
        "uri": [f"photographs/{number // 1000:04}/{number:07}.jpg" for number in numbers],
        "caption": [f"photograph {number} of a million" if number % 2 else None for number in numbers],
        "width": sides[:, 0],
        "height": sides[:, 1],
        "size": rng.integers(20_000, 4_000_000, count),
        "modified": rng.integers(10**15, 2 * 10**15, count),
        "offset": pa.nulls(count),
        "sha256": [hashlib.sha256(b"%d" % number).hexdigest() for number in numbers],
        "thumbnail": [b""] * count,
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
    }
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def fill(path: str, vectors: np.ndarray) -> tuple[Index, float]:
    """An index of `vectors` and the seconds that writing took."""
    index = Index.create(path, "synthetic", "", vectors.shape[1])
    schema = index.table.schema
    seconds = 0.0
    for start in range(0, len(vectors), BATCH):
        rows = photographs(vectors[start : start + BATCH], start, schema)
        started = time.monotonic()
        index.table.add(rows)
        seconds += time.monotonic() - started
    started = time.monotonic()
    index.table.optimize()
    return index, seconds + time.monotonic() - started


def timed(search: Callable[[np.ndarray], Sequence[int]], queries: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Recall@10, and wall and processor time of one query at a time, in milliseconds."""
    for query in queries[:WARM]:
        search(query)
    wall, busy, right = [], [], 0
    for query, own in zip(queries, truth, strict=True):
        cpu, started = time.process_time(), time.perf_counter()
        found = search(query)
        wall.append(1000 * (time.perf_counter() - started))
        busy.append(1000 * (time.process_time() - cpu))
        right += len(set(found) & set(own.tolist()))
    return {
        "recall": round(right / truth.size, 4),
        "p50_ms": round(statistics.median(wall), 2),
        "p95_ms": round(float(np.quantile(wall, 0.95)), 2),
        "p50_processor_ms": round(statistics.median(busy), 2),
    }


def exact_truth(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Numbers of the ten nearest of each query, int64 `[queries, 10]`."""
    scores = np.concatenate([queries @ vectors[start : start + BATCH].T for start in range(0, len(vectors), BATCH)], 1)
    return np.argpartition(-scores, K, axis=1)[:, :K]


def measure_faiss(vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray, folder: Path) -> dict[str, Any] | str:
    """FAISS's flat index and its HNSW with the least `efSearch` that reaches a recall of 0.98."""
    try:
        import faiss
    except ImportError:
        return "skipped: faiss-cpu is not installed"
    result: dict[str, Any] = {}
    for name, make in (
        ("flat", lambda dim: faiss.IndexFlatIP(dim)),
        ("hnsw", lambda dim: faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)),
    ):
        started = time.monotonic()
        index: Any = make(vectors.shape[1])
        for start in range(0, len(vectors), BATCH):
            index.add(vectors[start : start + BATCH])
        seconds = time.monotonic() - started
        faiss.write_index(index, str(folder / name))

        def search(query: np.ndarray, index: Any = index) -> list[int]:
            return index.search(query[None], K)[1][0].tolist()

        facts: dict[str, Any] = {}
        for ef in (32, 64, 128, 256, 512) if name == "hnsw" else (None,):
            if ef is not None:
                index.hnsw.efSearch = ef
            facts = timed(search, queries, truth) | ({"ef": ef} if ef else {})
            if facts["recall"] >= 0.98:
                break
        facts |= {"build_s": round(seconds, 1), "megabytes": round((folder / name).stat().st_size / 1e6, 1)}
        result[name] = facts
    return result


def folder_size(folder: Path) -> float:
    """Megabytes of all files below `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw, index, search."""
    clusters = Clusters(arguments.dim, max(64, arguments.count // 1000))
    parts = range(0, arguments.count, BATCH)
    vectors = np.concatenate([clusters.draw(min(BATCH, arguments.count - start), 100 + start) for start in parts])
    kinds = {"same": clusters.draw(arguments.queries, 2), "shifted": clusters.draw(arguments.queries, 3, shift=1.0)}
    truths = {name: exact_truth(vectors, queries) for name, queries in kinds.items()}
    folder = Path(tempfile.mkdtemp(prefix="tercet-search-", dir=arguments.folder))
    try:
        index, filled = fill(str(folder / "index"), vectors)
        plain = folder_size(folder / "index")
        exact = timed(lambda query: _numbers(index, query, exact=True), kinds["same"][:WARM], truths["same"][:WARM])
        cpu, started = time.process_time(), time.monotonic()
        build = build_approximate(index.database, index.table, clusters.draw(128, 4, shift=1.0))
        index = Index.open(str(folder / "index"))
        result = {
            "name": "search",
            "vectors": arguments.count,
            "dim": arguments.dim,
            "k": K,
            "index": "IVF_SQ",
            "cells": build.cells,
            "probes": build.probes,
            "build_s": round(build.seconds, 1),
            "build_and_tune_s": round(time.monotonic() - started, 1),
            "build_and_tune_processor_s": round(time.process_time() - cpu, 1),
            "write_s": round(filled, 1),
            "vectors_megabytes": round(plain, 1),
            "index_megabytes": round(folder_size(folder / "index") - plain, 1),
            "exact": exact,
        }
        for name, queries in kinds.items():
            result[name] = timed(lambda query: _numbers(index, query), queries, truths[name])
        if arguments.faiss:
            result["faiss"] = measure_faiss(vectors, kinds["same"], truths["same"], folder)
        result["machine"] = {"processor": processor_name(), "python": platform.python_version()}
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _numbers(index: Index, query: np.ndarray, exact: bool = False) -> list[int]:
    return [int(hit.id, 16) for hit in index.nearest(query[None], K, exact=exact)[0]]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="60,000 vectors of 64 dimensions")
    parser.add_argument("--count", type=int, help="vectors; default 1,000,000")
    parser.add_argument("--dim", type=int, help="dimensions; default 256")
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--folder", help="where the index is made and deleted; default the system's temporary folder")
    parser.add_argument("--no-faiss", dest="faiss", action="store_false", help="without FAISS")
    arguments = parser.parse_args()
    arguments.count = arguments.count or (60_000 if arguments.quick else 1_000_000)
    arguments.dim = arguments.dim or (64 if arguments.quick else 256)
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
