"""Every endpoint against the predictor and the index called directly; keys, hosts, the queue and stopping."""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_runs import PICTURES, Serving, error_of, serving

import tercet
from scene_files import png_of
from tercet.cli import main
from tercet.search.index import Index
from tercet.search.search import Query, Searcher
from tercet.serve.limits import ServeSettings
from tiny_model import SCENES, TEXTS, make_model

PICTURE = {"base64": base64.b64encode(png_of(SCENES[0])).decode()}
HEART = {"text": "a heart"}


def answer(server: Serving, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """What an endpoint answers with success."""
    response = server.post(f"/v1/{name}", body)
    assert response.status_code == 200, response.text
    return response.json()


def search(server: Serving, **body: Any) -> list[dict[str, Any]]:
    return answer(server, "search", body)["hits"]


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a red circle"},
        {"text": "a red circle", "rerank": 0, "k": 5},
        {"text": "a heart", "without": "red", "k": 3},
        {"text": "a heart", "where": "width < 100 and caption like '%red%'"},
    ],
)
def test_search_by_text(server: Serving, body: dict[str, Any]) -> None:
    hits = search(server, **body)
    expected = Searcher(server.index, server.predictor).search(Query(**body))
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected] and hits
    for hit, right in zip(hits, expected, strict=True):
        assert hit["cosine"] == pytest.approx(right.cosine, abs=1e-5)
        assert hit["match"] == (None if right.match is None else pytest.approx(right.match, abs=1e-5))
        assert (hit["caption"], hit["width"], hit["height"]) == (right.caption, 64, 64)
        assert hit["dual_rank"] == right.dual_rank


def test_search_by_image_and_by_id(server: Serving, first_id: str) -> None:
    data = base64.b64encode(server.index.image(first_id)).decode()
    by_id = search(server, image={"id": first_id}, k=PICTURES)
    for encoded in (data, f"data:image/png;base64,{data}"):
        first, *others = search(server, image={"base64": encoded}, k=PICTURES)
        assert first["id"] == first_id and first["cosine"] == pytest.approx(1, abs=1e-4) and first["match"] is None
        assert [hit["id"] for hit in by_id] == [hit["id"] for hit in others]
    both = search(server, image={"id": first_id}, text="a red circle")
    assert all(hit["match"] is not None for hit in both)


def test_uris_are_shown_only_if_asked(server: Serving, serve: Callable[..., Serving]) -> None:
    hit = search(server, **HEART)[0]
    assert hit["uri"] is None and hit["name"].startswith("scene-") and "/" not in hit["name"]
    assert search(serve(show_uris=True), **HEART)[0]["uri"].endswith(f"/{hit['name']}")


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("search", {}, "text, image"),
        ("search", {"text": ""}, "text"),
        ("search", {"text": "?!"}, "'?!'"),
        ("search", {"text": "a", "k": 0}, "k"),
        ("search", {"text": "a", "k": 10**6}, "200"),
        ("search", {"text": "a", "wherre": "x"}, "wherre"),
        ("search", {"text": "a", "where": "1=1; drop"}, "'; drop'"),
        ("search", {"image": {"id": "a", "base64": "b"}}, "either id or base64"),
        ("search", {"image": {}}, "either id or base64"),
        ("classify", {"image": PICTURE, "labels": ["a", "b"], "templates": ["no braces"]}, "{}"),
        ("embed", {}, "images, texts"),
    ],
)
def test_wrong_requests(server: Serving, path: str, body: dict[str, object], named: str) -> None:
    assert named in error_of(server.post(f"/v1/{path}", body), 422)


def test_match_classify_and_embed(server: Serving) -> None:
    image, predictor = SCENES[0].image, server.predictor
    matches = answer(server, "match", {"image": PICTURE, "texts": TEXTS})["matches"]
    assert [each["text"] for each in matches] == TEXTS
    for key, expected in (("match", predictor.match([image], TEXTS)), ("cosine", predictor.similarity([image], TEXTS))):
        np.testing.assert_allclose([[each[key] for each in matches]], expected, rtol=0, atol=1e-5)

    labels, templates = ["a red circle", "a blue star"], ["{}", "one {}"]
    body = {"image": PICTURE, "labels": labels, "templates": templates}
    found = answer(server, "classify", body)["labels"]
    expected: Any = predictor.classify(image, labels, templates)
    assert [(each["text"], pytest.approx(each["score"], abs=1e-5)) for each in found] == list(expected.items())

    feats = answer(server, "embed", {"images": [PICTURE], "texts": TEXTS})
    np.testing.assert_allclose(feats["image_feats"], predictor.embed_images([image]), atol=1e-5)
    np.testing.assert_allclose(feats["text_feats"], predictor.embed_texts(TEXTS), atol=1e-5)


def test_ask(server: Serving, index_folder: Path) -> None:
    body = {"image": PICTURE, "question": "what colour is it?"}
    for answers in ([], ["red", "blue"]):
        found = answer(server, "ask", {**body, "answers": answers})
        alone: Any = server.predictor.answer(SCENES[0].image, body["question"], answers or None)
        assert found["answer"] == alone.text and found["score"] == pytest.approx(alone.score, abs=1e-5)
        assert [each["text"] for each in found["others"]] == [text for text, _ in alone.others]
    with serving(Index.open(str(index_folder)), tercet.Predictor(make_model()), ServeSettings(port=0)) as plain:
        assert plain.client.get("/v1/about").json()["answers_questions"] is False
        assert "answer" in error_of(plain.post("/v1/ask", body), 422)


def test_explain(server: Serving, first_id: str) -> None:
    body = {"image": {"id": first_id}, "text": "is it a red circle?"}
    heatmaps = []
    for mode in ("itm", "answer"):
        found = answer(server, "explain", {**body, "answer": mode == "answer"})
        alone: Any = server.predictor.explain(server.index.image(first_id), body["text"], mode=mode)  # pyright: ignore
        np.testing.assert_allclose(found["heatmap"], alone.heatmap.numpy(), rtol=1e-3, atol=1e-6)
        assert [each["word"] for each in found["words"]][-2:] == ["red", "circle"]
        peaks = np.array([np.max(each["heatmap"]) for each in found["words"]])
        np.testing.assert_allclose([each["strength"] for each in found["words"]], peaks / peaks.max(), rtol=1e-4)
        assert found["answer"] == alone.answer and (found["answer"] is not None) == (mode == "answer")
        heatmaps.append(found["heatmap"])
    assert heatmaps[0] != heatmaps[1]


def test_images_by_id(server: Serving, first_id: str) -> None:
    image = server.client.get(f"/v1/images/{first_id}")
    assert image.status_code == 200 and image.headers["content-type"] == "image/png"
    assert image.content == Path(server.index.entry(first_id).uri).read_bytes()
    thumbnail = server.client.get(f"/v1/thumbnails/{first_id}")
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (64, 64)
    for unknown in ("0" * 16, "nonsense", "' or 1=1 --"):
        for response in (
            server.client.get(f"/v1/images/{unknown}"),
            server.client.get(f"/v1/thumbnails/{unknown}"),
            server.post("/v1/search", {"image": {"id": unknown}}),
            server.post("/v1/match", {"image": {"id": unknown}, "texts": ["a"]}),
        ):
            assert "no image of that id" in error_of(response, 404)


def test_images_indexed_last(server: Serving) -> None:
    expected = server.index.table.to_arrow()["id"].to_pylist()[::-1]
    for query, count in (("", PICTURES), ("?limit=5", 5), ("?limit=200", PICTURES)):
        images = server.client.get(f"/v1/images{query}").json()["images"]
        assert [image["id"] for image in images] == expected[:count]
    entry = server.index.entry(images[0]["id"])
    shown = {"id": entry.id, "name": Path(entry.uri).name, "uri": None, "caption": entry.caption}
    assert images[0] == {**shown, "width": 64, "height": 64}
    for wrong in ("0", "201", "1e9", "x", ""):
        assert "limit" in error_of(server.client.get(f"/v1/images?limit={wrong}"), 422)


def test_health_metrics_and_description(server: Serving) -> None:
    assert server.client.get("/healthz").json() == {"status": "alive"}
    assert server.client.get("/readyz").json() == {"status": "ready"}
    about = server.client.get("/v1/about").json()
    assert (about["images"], about["answers_questions"], about["embed_dim"]) == (PICTURES, True, 16)
    answer(server, "match", {"image": PICTURE, "texts": ["a red circle"]})
    metrics = server.client.get("/metrics").text
    assert 'tercet_requests_total{method="POST",path="/v1/match",status="200"}' in metrics
    assert 'tercet_batch_jobs_count{call="match_each"}' in metrics
    assert f"tercet_index_images {PICTURES}.0" in metrics
    assert set(server.client.get("/openapi.json").json()["paths"]) == {
        *(f"/v1/{name}" for name in ("search", "match", "ask", "classify", "explain", "embed", "about")),
        *("/v1/images", "/v1/images/{id}", "/v1/thumbnails/{id}", "/healthz", "/readyz"),
    }


def test_errors_have_one_shape(server: Serving) -> None:
    for path in ("/v1/nothing", "/docs", "/redoc"):  # the usual pages of documentation load scripts from elsewhere
        assert "/openapi.json" in error_of(server.client.get(path), 404)
    not_allowed = server.client.delete("/v1/search")
    assert "DELETE" in error_of(not_allowed, 405) and not_allowed.headers["allow"] == "POST"
    half = server.client.post("/v1/search", content=b'{"text": ', headers={"content-type": "application/json"})
    assert "not JSON" in error_of(half, 400)


def test_a_key_is_needed(serve: Callable[..., Serving]) -> None:
    key = "k" * 32
    client = serve(key=key).client
    for method, path in (("GET", "/v1/about"), ("POST", "/v1/search"), ("GET", "/metrics")):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {key}"}):
            refused = client.request(method, path, headers=headers)
            assert "Authorization: Bearer KEY" in error_of(refused, 401)
            assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/static/page.js"):
        assert client.get(path).status_code == 200
    client.headers["authorization"] = f"Bearer {key}"
    assert client.get("/v1/about").status_code == client.post("/v1/search", json=HEART).status_code == 200


def test_other_hosts_and_origins_are_refused_unless_allowed(server: Serving, serve: Callable[..., Serving]) -> None:
    assert "--hosts NAME" in error_of(server.client.get("/", headers={"host": "rebound.example"}), 421)
    port = httpx.URL(server.url).port
    for name in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost"):
        assert server.client.get("/healthz", headers={"host": name}).status_code == 200
    allow = "access-control-allow-origin"
    foreign, other = {"origin": "https://photos.example"}, {"origin": "https://other.example"}
    assert allow not in server.client.get("/healthz", headers=foreign).headers
    shared = serve(origins=("https://photos.example",), hosts=("photos.example",)).client
    assert shared.get("/healthz", headers={"host": "photos.example"}).status_code == 200
    allowed = shared.post("/v1/search", json={}, headers=foreign)
    assert allowed.status_code == 422 and allowed.headers[allow] == "https://photos.example"
    assert allow not in shared.post("/v1/search", json={}, headers=other).headers
    asked = {**foreign, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert shared.options("/v1/search", headers=asked).status_code == 200


def test_every_answer_has_the_security_headers(server: Serving, first_id: str) -> None:
    fixed = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}
    fixed["cross-origin-resource-policy"] = "same-origin"
    for path in ("/", "/static/page.js", f"/v1/thumbnails/{first_id}", "/v1/nothing", "/healthz"):
        headers = server.client.get(path).headers
        assert fixed.items() <= dict(headers).items() and headers["cache-control"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
    page = server.client.get("/static/page.js")
    unchanged = server.client.get("/static/page.js", headers={"if-none-match": page.headers["etag"]})
    assert unchanged.status_code == 304 and page.headers["cache-control"] == "no-cache"


def test_concurrent_requests_share_batches(server: Serving) -> None:
    def batches(part: str) -> float:
        start = f'tercet_batch_jobs_{part}{{call="match_each"}} '
        lines = server.client.get("/metrics").text.splitlines()
        return next((float(line.removeprefix(start)) for line in lines if line.startswith(start)), 0.0)

    before = batches("count"), batches("sum")
    body = {"image": PICTURE, "texts": ["a red circle"]}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: answer(server, "match", body), range(64)))
    values = [found["matches"][0]["match"] for found in answers]
    assert values == pytest.approx([values[0]] * 64, abs=1e-5)
    assert batches("sum") - before[1] == 64 and batches("count") - before[0] < 40


def test_beyond_the_queue_is_429(serve: Callable[..., Serving]) -> None:
    busy = serve(queue=2, window=1.0)  # the window holds the first two
    with ThreadPoolExecutor(6) as pool:
        responses = sorted(pool.map(lambda _: busy.post("/v1/search", HEART), range(6)), key=lambda it: it.status_code)
    assert [response.status_code for response in responses] == [200, 200, 429, 429, 429, 429]
    assert int(responses[-1].headers["retry-after"]) >= 1
    assert "--queue" in error_of(responses[-1], 429)
    assert search(busy, **HEART)


def test_no_answer_in_time_is_503(serve: Callable[..., Serving]) -> None:
    slow = serve(request_seconds=0.2, window=1.5)
    started = time.monotonic()
    assert "0.2 seconds" in error_of(slow.post("/v1/search", HEART), 503)
    assert time.monotonic() - started < 1.2


def test_stopping_answers_what_was_asked(index_folder: Path, model_folder: Path) -> None:
    settings = ServeSettings(port=0, window=1.5)
    with (
        httpx.Client(timeout=30) as client,
        ThreadPoolExecutor(8) as pool,
        serving(Index.open(str(index_folder)), tercet.load(model_folder), settings) as running,
    ):
        futures = [pool.submit(client.post, f"{running.url}v1/search", json=HEART) for _ in range(8)]
        while "tercet_queue 8.0" not in running.client.get("/metrics").text:
            time.sleep(0.02)
    assert [future.result().status_code for future in futures] == [200] * 8


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert name in error and "pip install 'tercet[serve]'" in error
