"""Indexing on a Ray cluster gives the table of one machine, even when a worker is lost on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from scene_files import png_of
from tercet.cli import main
from tercet.predictor import Predictor
from tercet.search.build import build_index
from tercet.search.cluster import embed_on_cluster
from tercet.search.index import Index
from tiny_model import SCENES

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow
COPIES = 500


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


def test_the_same_table_though_a_worker_is_killed(
    cluster: None, predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    for number in range(COPIES):
        (pictures / f"{number}.png").write_bytes(png_of(SCENES[number % 4]))
    (pictures / "broken.png").write_bytes(b"no image")
    here, _ = build_index([str(pictures)], predictor, "m", str(tmp_path / "here"))
    killed: list[int] = []

    def embed(listed: pa.Table) -> Iterator[pa.Table]:
        stream = embed_on_cluster(predictor, listed)
        yield next(stream)
        for process in psutil.process_iter(["pid", "cmdline"]):
            if "MapWorker" in " ".join(process.info["cmdline"] or []) and not killed:
                os.kill(process.info["pid"], signal.SIGKILL)
                killed.append(process.info["pid"])
        yield from stream

    there, report = build_index([str(pictures)], predictor, "m", str(tmp_path / "there"), embed=embed)
    assert killed
    assert report.added == COPIES + 4 and len(report.skipped) == 1 and "broken.png" in report.skipped[0]
    tables = [index.table.to_arrow().sort_by("id") for index in (here, there)]
    embeddings = [np.array(table["embedding"].to_pylist()) for table in tables]
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-5)
    assert tables[0].drop_columns("embedding").equals(tables[1].drop_columns("embedding"))


def test_the_command_line_takes_the_engine(cluster: None, model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "index")
    assert main(["index", str(pictures), "--model", str(model_folder), "--output", path, "--engine", "ray"]) == 0
    assert Index.open(path).count == 4
