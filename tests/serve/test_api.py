"""What every address answers, held against the model and the index called directly."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_runs import PICTURES, Serving, serving
from torch import Tensor

import tercet
from tercet.predictor import Predictor
from tercet.search.index import Index
from tercet.search.search import Query, Searcher
from tercet.serve.settings import ServeSettings
from tercet.tasks.answering import Answer
from tercet.tasks.explaining import Explanation
from tiny_model import SCENES, TEXTS, make_model


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PICTURE = {"base64": as_base64(png(SCENES.array(0)))}


def fault(response: httpx.Response, status: int) -> dict[str, str]:
    """The error of a response, in the one shape that all have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"code", "message"} and all(isinstance(value, str) and value for value in error.values())
    return error


class TestSearch:
    @pytest.mark.parametrize(
        ("body", "query"),
        [
            ({"text": "a red circle"}, Query("a red circle")),
            ({"text": "a red circle", "rerank": 0, "k": 5}, Query("a red circle", rerank=0, k=5)),
            ({"text": "a heart", "without": "red", "k": 3}, Query("a heart", without="red", k=3)),
            ({"text": "a heart", "where": "width < 100 and caption like '%red%'"}, None),
        ],
    )
    def test_by_words(self, server: Serving, body: dict[str, object], query: Query | None) -> None:
        query = query or Query(str(body["text"]), where=str(body["where"]))
        response = server.post("/v1/search", body)
        assert response.status_code == 200, response.text
        hits = response.json()["hits"]
        expected = Searcher(server.index, server.predictor).search(query)
        assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
        assert len(hits) == min(query.k, len(expected)) and hits
        for hit, right in zip(hits, expected, strict=True):
            assert hit["cosine"] == pytest.approx(right.cosine, abs=1e-5)
            assert hit["match"] == (None if right.match is None else pytest.approx(right.match, abs=1e-5))
            assert (hit["caption"], hit["width"], hit["height"]) == (right.caption, 64, 64)
            assert hit["dual_rank"] == right.dual_rank

    def test_by_image_and_by_like(self, server: Serving, pictures: Path, first_id: str) -> None:
        entry = server.index.entry(first_id)
        data = Path(entry.uri).read_bytes()
        by_image = server.post("/v1/search", {"image": {"base64": as_base64(data)}}).json()["hits"]
        assert by_image[0]["id"] == first_id and by_image[0]["cosine"] == pytest.approx(1, abs=1e-4)
        assert by_image[0]["match"] is None
        by_id = server.post("/v1/search", {"image": {"id": first_id}}).json()["hits"]
        assert [hit["id"] for hit in by_id] == [hit["id"] for hit in by_image[1:]] + [
            hit["id"] for hit in by_id[len(by_image) - 1 :]
        ]
        both = server.post("/v1/search", {"image": {"id": first_id}, "text": "a red circle"}).json()["hits"]
        assert all(hit["match"] is not None for hit in both)
        address = f"data:image/png;base64,{as_base64(data)}"
        assert server.post("/v1/search", {"image": {"base64": address}}).json()["hits"][0]["id"] == first_id

    def test_paths_are_told_only_when_asked(self, server: Serving, serve: Callable[..., Serving]) -> None:
        hit = server.post("/v1/search", {"text": "a heart"}).json()["hits"][0]
        assert hit["uri"] is None and hit["name"].startswith("scene-") and "/" not in hit["name"]
        open_server = serve(show_uris=True)
        assert open_server.post("/v1/search", {"text": "a heart"}).json()["hits"][0]["uri"].endswith(hit["name"])

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "the body: give text, image or both"),
            ({"text": ""}, "text: string should have at least 1 character"),
            ({"text": "?!"}, "nothing is left of the text '?!'"),
            ({"text": "a", "k": 0}, "k: input should be greater than or equal to 1"),
            ({"text": "a", "k": 10**6}, "k: input should be less than or equal to 200"),
            ({"text": "a", "wherre": "x"}, "wherre: extra inputs are not permitted"),
            ({"text": "a", "where": "1=1; drop"}, "cannot read the filter at"),
            ({"image": {"id": "a", "base64": "b"}}, "image: give either id or base64"),
            ({"image": {}}, "image: give either id or base64"),
        ],
    )
    def test_refuses(self, server: Serving, body: dict[str, object], message: str) -> None:
        assert message in fault(server.post("/v1/search", body), 422)["message"]


def test_match(server: Serving) -> None:
    found = server.post("/v1/match", {"image": PICTURE, "texts": TEXTS}).json()["matches"]
    chances, cosines = (
        server.predictor.match([SCENES.array(0)], TEXTS),
        server.predictor.similarity([SCENES.array(0)], TEXTS),
    )
    assert isinstance(chances, Tensor) and isinstance(cosines, Tensor)
    assert [each["text"] for each in found] == TEXTS
    assert [each["match"] for each in found] == pytest.approx(chances[0].tolist(), abs=1e-5)
    assert [each["cosine"] for each in found] == pytest.approx(cosines[0].tolist(), abs=1e-5)


def test_classify(server: Serving) -> None:
    body = {"image": PICTURE, "labels": ["a red circle", "a blue star"], "templates": ["{}", "one {}"]}
    found = server.post("/v1/classify", body).json()["labels"]
    expected = server.predictor.classify(SCENES.array(0), ["a red circle", "a blue star"], ["{}", "one {}"])
    assert isinstance(expected, dict)
    assert [(each["text"], pytest.approx(each["score"], abs=1e-5)) for each in found] == list(expected.items())
    error = fault(server.post("/v1/classify", {**body, "templates": ["no place"]}), 422)
    assert "needs one {}" in error["message"]


def test_ask(server: Serving) -> None:
    for answers in ([], ["red", "blue"]):
        found = server.post("/v1/ask", {"image": PICTURE, "question": "what colour is it?", "answers": answers}).json()
        alone = server.predictor.answer(SCENES.array(0), "what colour is it?", answers or None)
        assert isinstance(alone, Answer)
        assert found["answer"] == alone.text and found["score"] == pytest.approx(alone.score, abs=1e-5)
        assert [each["text"] for each in found["others"]] == [text for text, _ in alone.others]


def test_explain(server: Serving, first_id: str) -> None:
    found = server.post("/v1/explain", {"image": {"id": first_id}, "text": "a red circle"}).json()
    alone = server.predictor.ground(server.index.image(first_id), "a red circle")
    assert isinstance(alone, Explanation)
    np.testing.assert_allclose(found["heatmap"], alone.heatmap.numpy(), rtol=1e-3, atol=1e-6)
    assert [each["word"] for each in found["words"]] == ["a", "red", "circle"]
    peaks = [np.max(each["heatmap"]) for each in found["words"]]
    assert [each["strength"] for each in found["words"]] == pytest.approx(
        [peak / max(peaks) for peak in peaks], rel=1e-4
    )


def test_explain_an_answer(server: Serving, first_id: str) -> None:
    body = {"image": {"id": first_id}, "text": "is it a red circle?"}
    found = server.post("/v1/explain", {**body, "answer": True}).json()
    alone = server.predictor.ground(server.index.image(first_id), body["text"], mode="answer")
    assert isinstance(alone, Explanation)
    np.testing.assert_allclose(found["heatmap"], alone.heatmap.numpy(), rtol=1e-3, atol=1e-6)
    assert [each["word"] for each in found["words"]][-2:] == ["red", "circle"]
    told = server.post("/v1/ask", {"image": {"id": first_id}, "question": body["text"]}).json()
    assert found["answer"] == told["answer"]
    other = server.post("/v1/explain", body).json()
    assert other["answer"] is None and other["heatmap"] != found["heatmap"]


def test_embed(server: Serving) -> None:
    found = server.post("/v1/embed", {"images": [PICTURE], "texts": TEXTS}).json()
    np.testing.assert_allclose(
        found["image_feats"], server.predictor.embed_images([SCENES.array(0)]).numpy(), atol=1e-5
    )
    np.testing.assert_allclose(found["text_feats"], server.predictor.embed_texts(TEXTS).numpy(), atol=1e-5)
    assert "give images, texts or both" in fault(server.post("/v1/embed", {}), 422)["message"]


def test_images_of_the_index_by_id(server: Serving, first_id: str) -> None:
    image = server.client.get(f"/v1/images/{first_id}")
    assert image.status_code == 200 and image.headers["content-type"] == "image/png"
    assert image.content == Path(server.index.entry(first_id).uri).read_bytes()
    thumbnail = server.client.get(f"/v1/thumbnails/{first_id}")
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (64, 64)
    for kind in ("images", "thumbnails"):
        for unknown in ("0" * 16, "nonsense", "' or 1=1 --"):
            assert "no image of that id" in fault(server.client.get(f"/v1/{kind}/{unknown}"), 404)["message"]
    body = {"image": {"id": "0" * 16}}
    assert "no image of that id" in fault(server.post("/v1/search", body), 404)["message"]
    assert "no image of that id" in fault(server.post("/v1/match", {**body, "texts": ["a"]}), 404)["message"]


def test_images_indexed_last(server: Serving) -> None:
    table = server.index.table.to_arrow()
    expected = table["id"].to_pylist()[::-1]
    for query, count in (("", PICTURES), ("?limit=5", 5), ("?limit=1", 1), ("?limit=200", PICTURES)):
        images = server.client.get(f"/v1/images{query}").json()["images"]
        assert [image["id"] for image in images] == expected[:count]
    entry = server.index.entry(images[0]["id"])
    assert images[0] == {
        **{"id": entry.id, "name": Path(entry.uri).name, "uri": None},
        **{"caption": entry.caption, "width": 64, "height": 64},
    }
    for wrong in ("0", "-1", "201", "1e9", "x", ""):
        assert "limit" in fault(server.client.get(f"/v1/images?limit={wrong}"), 422)["message"]


def test_health_and_metrics(server: Serving) -> None:
    assert server.client.get("/healthz").json() == {"status": "alive"}
    assert server.client.get("/readyz").json() == {"status": "ready"}
    about = server.client.get("/v1/about").json()
    assert about["images"] == PICTURES and about["answers_questions"] is True and about["embed_dim"] == 16
    server.post("/v1/match", {"image": PICTURE, "texts": ["a red circle"]})
    metrics = server.client.get("/metrics").text
    assert 'tercet_requests_total{method="POST",path="/v1/match",status="200"}' in metrics
    assert 'tercet_batch_jobs_count{kind="match"}' in metrics
    assert f"tercet_index_images {PICTURES}.0" in metrics


def test_the_description_is_whole(server: Serving) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        *(f"/v1/{name}" for name in ("search", "match", "ask", "classify", "explain", "embed", "about")),
        *("/v1/images", "/v1/images/{id}", "/v1/thumbnails/{id}", "/healthz", "/readyz"),
    }
    # What would load its scripts from elsewhere is not there.
    for page in ("/docs", "/redoc"):
        fault(server.client.get(page), 404)


def test_errors_have_one_shape(server: Serving) -> None:
    assert "nothing at this address" in fault(server.client.get("/v1/nothing"), 404)["message"]
    not_allowed = server.client.delete("/v1/search")
    assert "DELETE is not for this address" in fault(not_allowed, 405)["message"]
    assert not_allowed.headers["allow"] == "POST"
    form = server.client.post("/v1/search", data={"text": "a"})
    assert "send Content-Type: application/json" in fault(form, 415)["message"]
    half = server.client.post("/v1/search", content=b'{"text": ', headers={"content-type": "application/json"})
    assert "not JSON" in fault(half, 400)["message"]


def test_a_model_without_answers_says_so(index_folder: Path) -> None:
    with serving(Index.open(str(index_folder)), Predictor(make_model()), ServeSettings(port=0)) as plain:
        assert plain.client.get("/v1/about").json()["answers_questions"] is False
        error = fault(plain.post("/v1/ask", {"image": PICTURE, "question": "what colour?"}), 422)
        assert "no head for answer; fine-tune it first" in error["message"]


def test_a_key_is_asked_for(serve: Callable[..., Serving]) -> None:
    key = "k" * 32
    closed = serve(key=key)
    for method, path in (("GET", "/v1/about"), ("POST", "/v1/search"), ("GET", "/metrics")):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {key}"}):
            refused = closed.client.request(method, path, headers=headers)
            assert "Authorization: Bearer KEY" in fault(refused, 401)["message"]
            assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/static/page.js"):
        assert closed.client.get(path).status_code == 200
    good = {"authorization": f"Bearer {key}"}
    assert closed.client.get("/v1/about", headers=good).status_code == 200
    assert closed.client.post("/v1/search", json={"text": "a heart"}, headers=good).status_code == 200


def test_other_names_and_origins_are_refused_unless_allowed(server: Serving, serve: Callable[..., Serving]) -> None:
    assert "--hosts NAME" in fault(server.client.get("/", headers={"host": "rebound.example"}), 421)["message"]
    port = httpx.URL(server.url).port
    for name in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost"):
        assert server.client.get("/healthz", headers={"host": name}).status_code == 200
    foreign = {"origin": "https://photos.example"}
    assert "access-control-allow-origin" not in server.client.get("/healthz", headers=foreign).headers
    shared = serve(origins=("https://photos.example",), hosts=("photos.example",))
    assert shared.client.get("/healthz", headers={"host": "photos.example"}).status_code == 200
    allowed = shared.client.post("/v1/search", json={}, headers=foreign)
    assert allowed.status_code == 422
    assert allowed.headers["access-control-allow-origin"] == "https://photos.example"
    other = shared.client.post("/v1/search", json={}, headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    asked = {**foreign, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert shared.client.options("/v1/search", headers=asked).status_code == 200


def test_every_answer_has_the_security_headers(server: Serving, first_id: str) -> None:
    for path in ("/", "/static/page.js", f"/v1/thumbnails/{first_id}", "/v1/nothing", "/healthz"):
        headers = server.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"]


def test_requests_at_once_share_batches(server: Serving) -> None:
    before = server.client.get("/metrics").text
    body = {"image": PICTURE, "texts": ["a red circle"]}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/match", body).json(), range(64)))
    values = [answer["matches"][0]["match"] for answer in answers]
    assert values == pytest.approx([values[0]] * 64, abs=1e-5)
    after = server.client.get("/metrics").text
    batches = _value(after, "count") - _value(before, "count")
    assert _value(after, "sum") - _value(before, "sum") == 64
    assert batches < 40


def _value(metrics: str, part: str) -> float:
    start = f'tercet_batch_jobs_{part}{{kind="match"}} '
    return next((float(line.removeprefix(start)) for line in metrics.splitlines() if line.startswith(start)), 0.0)


def test_beyond_the_queue_is_429(serve: Callable[..., Serving]) -> None:
    busy = serve(queue=2, window=1.0)  # the window holds the first two
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(busy.post, "/v1/search", {"text": "a heart"}) for _ in range(6)]
        responses = [future.result() for future in futures]
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200, 200, 429, 429, 429, 429]
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert "ask again in a second" in fault(refused, 429)["message"]
    assert busy.post("/v1/search", {"text": "a heart"}).status_code == 200


def test_no_answer_in_time_is_503(serve: Callable[..., Serving]) -> None:
    slow = serve(request_seconds=0.2, window=1.5)
    started = time.monotonic()
    refused = slow.post("/v1/search", {"text": "a heart"})
    assert "no answer within 0.2 seconds" in fault(refused, 503)["message"]
    assert time.monotonic() - started < 1.2


def test_stopping_answers_what_was_asked(index_folder: Path, model_folder: Path) -> None:
    settings = ServeSettings(port=0, window=1.5)
    with (
        httpx.Client(timeout=30) as client,
        ThreadPoolExecutor(8) as pool,
        serving(Index.open(str(index_folder)), tercet.load(model_folder), settings) as running,
    ):
        futures = [pool.submit(client.post, f"{running.url}v1/search", json={"text": "a heart"}) for _ in range(8)]
        while "tercet_queue 8.0" not in running.client.get("/metrics").text:
            time.sleep(0.02)
    assert [future.result().status_code for future in futures] == [200] * 8
