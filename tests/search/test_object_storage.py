"""An index in object storage, over S3 to a local server: made, searched, brought up to date."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tercet.predictor import Predictor
from tercet.search.build import build_index
from tercet.search.index import Index
from tercet.search.search import Query, Searcher
from tiny_model import TEXTS

moto_server = pytest.importorskip("moto.server", reason="needs pip install 'moto[server]'")
pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        made = urllib.request.Request(f"http://{host}:{port}/pictures", method="PUT")
        urllib.request.urlopen(made, timeout=60).close()
        yield "s3://pictures"
    finally:
        server.stop()


def test_an_index_in_object_storage(bucket: str, predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    remote, here = f"{bucket}/my.index", str(tmp_path / "index")
    for path in (remote, here):
        index, report = build_index([str(pictures)], predictor, "model", path)
        assert (report.added, index.count) == (4, 4)
    query = Query(text=TEXTS[0], k=3)
    found, expected = (Searcher(Index.open(path), predictor).search(query) for path in (remote, here))
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    np.testing.assert_allclose([hit.cosine for hit in found], [hit.cosine for hit in expected], atol=1e-6)
    assert Index.open(remote).thumbnail(found[0].id) == Index.open(here).thumbnail(found[0].id)

    (pictures / "a.png").unlink()
    (pictures / "b.jpg").write_bytes((pictures / "more/c.png").read_bytes())
    index, report = build_index([str(pictures)], predictor, "model", remote)
    assert (report.removed, report.changed, report.unchanged, index.count) == (1, 1, 2, 3)
    assert {Path(entry.uri).name for entry in index.newest(10)} == {"b.jpg", "c.png", "d.webp"}
