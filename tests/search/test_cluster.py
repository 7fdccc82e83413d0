"""Indexing on a Ray cluster: the table that one machine makes, also when a worker is lost on the way."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tercet.data.listing import find_images
from tercet.data.rows import Problems
from tercet.model.tercet import Tercet
from tercet.search.building import Embedded, build_index
from tercet.search.index import Index

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"health_check_period_ms": 1000},
    )
    yield
    ray.shutdown()


def same_rows(first: Index, second: Index) -> None:
    tables = [index.table.to_arrow().sort_by("id") for index in (first, second)]
    for name in tables[0].schema.names:
        if name != "embedding":
            assert tables[0][name].to_pylist() == tables[1][name].to_pylist(), name
    embeddings = [np.array(table["embedding"].to_pylist()) for table in tables]
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-5)


def test_the_same_table_though_a_worker_is_killed(
    cluster: None, model: Tercet, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tercet.search import cluster as engine

    (pictures / "broken.png").write_bytes(b"no image")
    specs = [str(pictures), "scenes:test"]
    here, _ = build_index(specs, model, "m", str(tmp_path / "here"))
    killed: list[int] = []

    def embed(images: list) -> Iterator[Embedded]:
        stream = engine.embed_on_cluster(model, images)
        yield next(stream)
        for process in psutil.process_iter(["pid", "cmdline"]):
            if "MapWorker" in " ".join(process.info["cmdline"] or []) and not killed:
                os.kill(process.info["pid"], signal.SIGKILL)
                killed.append(process.info["pid"])
        yield from stream

    there, report = build_index(specs, model, "m", str(tmp_path / "there"), embed=embed)
    assert killed
    assert report.added == 504 and len(report.broken) == 1 and "broken.png" in report.broken[0]
    same_rows(here, there)


def test_the_command_line_takes_the_engine(
    cluster: None, model_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tercet.cli import main

    words = ["index", str(pictures), "--model", str(model_folder), "--to", str(tmp_path / "index"), "--engine", "ray"]
    assert main(words) == 0
    assert "4 images (4 new" in capsys.readouterr().out
    assert Index.open(str(tmp_path / "index")).count == len(
        list(itertools.islice(find_images([str(pictures)], Problems()), 9))
    )
