"""The benchmarks of search and serving run, and what they report can be believed."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path


def test_search(tmp_path: Path) -> None:
    settings = argparse.Namespace(count=4000, dim=16, queries=30, folder=str(tmp_path), faiss=False)
    result = import_module("search").measure(settings)
    assert result["exact"]["recall"] == 1 and result["same"]["recall"] >= 0.97 and result["shifted"]["recall"] >= 0.95
    assert 0 < result["same"]["p50_ms"] <= result["same"]["p95_ms"]
    assert not list(tmp_path.iterdir())


def test_calls_together_and_one_by_one() -> None:
    result = import_module("serve").measure_calls("tiny", images=8, loads=["embed", "search"], jobs=4, rounds=1)
    assert set(result["ratio"]) == {"embed", "search"} and min(result["ratio"].values()) > 0
