"""What a stranger may send: every answer is a clear 4xx in the one shape, and the server stays up within its memory."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image
from serve_runs import Serving, error_of

JSON = {"content-type": "application/json"}
POST = b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HTML = b"<!doctype html><html><script>alert(1)</script></html>"


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour whose pixels take three thousand times its bytes."""
    line = b"\0" + bytes(3 * width)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def exchange(server: Serving, data: bytes, seconds: float = 10.0) -> bytes:
    """Send raw bytes, and read until the server closes the connection."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@pytest.fixture(autouse=True)
def stays_up(server: Serving) -> object:
    """After every test the server answers as before."""
    yield
    assert server.client.get("/readyz").status_code == 200


class TestBodies:
    def test_too_large_as_announced(self, server: Serving) -> None:
        response = server.client.post("/v1/search", content=b" " * 400_000, headers=JSON)
        assert "more than 300000 bytes" in error_of(response, 413)

    def test_too_large_unannounced(self, server: Serving) -> None:
        chunks = (b" " * 50_000 for _ in range(20))
        response = server.client.post("/v1/search", content=chunks, headers=JSON)
        assert "more than 300000 bytes" in error_of(response, 413)

    def test_a_ten_megabyte_query(self, server: Serving) -> None:
        process = psutil.Process()
        body = json.dumps({"text": "a" * 10_000_000}).encode()
        server.client.post("/v1/search", content=body, headers=JSON)
        before = process.memory_info().rss
        response = server.client.post("/v1/search", content=body, headers=JSON)
        assert "more than 300000 bytes" in error_of(response, 413)
        assert process.memory_info().rss - before < 5 * 2**20

    def test_far_too_large_is_cut_off(self, server: Serving) -> None:
        received = exchange(server, POST + b"content-length: 100000000000\r\n\r\n{")
        assert received.startswith(b"HTTP/1.1 413") and b'"too_large"' in received

    def test_a_long_text_within_the_size(self, server: Serving) -> None:
        assert "at most 1000 characters" in error_of(server.post("/v1/search", {"text": "a" * 200_000}), 422)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b'"text"',
            b"\xff\xfe\x00",
            b'{"text": "\xff"}',
            b'{"text": NaN}',
            b'{"text": "a", "k": 1e400}',
            b'{"text": "a", "k": 99999999999999999999999999}',
            b'{"text": "a", "k": 1.5}',
            b'{"text": "a", "k": true}',
            b'{"text": ["a"]}',
            b'{"text": {"$ne": null}}',
            b"[" * 100_000,
            b'{"image":' * 20_000,
            b'{"text": "a"} trailing',
            b'{"text": "a", "__proto__": {}}',
        ],
    )
    def test_wrong_json(self, server: Serving, body: bytes) -> None:
        error_of(server.client.post("/v1/search", content=body, headers=JSON), 400, 422)

    @pytest.mark.parametrize("text", ["a\0b", "\0", "\ud800", "a\udfff"])
    def test_nulls_and_half_characters(self, server: Serving, text: str) -> None:
        body = json.dumps({"text": text}).encode()
        message = error_of(server.client.post("/v1/search", content=body, headers=JSON), 422)
        assert "null character" in message or "half a character" in message or "unicode" in message
        body = json.dumps({"text": "a", "where": f"caption = '{text}'"}).encode()
        error_of(server.client.post("/v1/search", content=body, headers=JSON), 422)

    @pytest.mark.parametrize(
        "text", ["\u202e", "a" * 1000, "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ﷺ" * 900, "[CLS][SEP][MASK]", "<script>", "'; --"]
    )
    def test_odd_texts(self, server: Serving, text: str) -> None:
        assert server.post("/v1/search", {"text": text}).status_code in (200, 422)

    @pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "", "application/jsonp"])
    def test_other_content_types(self, server: Serving, kind: str) -> None:
        response = server.client.post("/v1/search", content=b'{"text": "a"}', headers={"content-type": kind})
        error_of(response, 415)


class TestImages:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (SVG, "an SVG drawing"),
            (HTML, "a web page"),
            (b"GIF89a<script>", "not an image of a known format"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image of a known format"),
            (b"%PDF-1.7", "not an image of a known format"),
            (b"\x89PNG\r\n\x1a\n", ""),
            (b"\xff\xd8\xff\xe0", ""),
            (b"\0" * 100, "not an image of a known format"),
            (b"PK\x03\x04", "not an image of a known format"),
        ],
    )
    def test_not_an_image(self, server: Serving, data: bytes, message: str) -> None:
        for path, more in (("match", {"texts": ["a"]}), ("search", {}), ("explain", {"text": "a"})):
            response = server.post(f"/v1/{path}", {"image": {"base64": as_base64(data)}, **more})
            assert message in error_of(response, 422)

    @pytest.mark.parametrize(
        "text", ["not base64!", "é", "AAA", "====", "data:image/png;base64,", "http://localhost/a.png"]
    )
    def test_not_base64(self, server: Serving, text: str) -> None:
        error_of(server.post("/v1/search", {"image": {"base64": text}}), 422)

    def test_a_decompression_bomb(self, server: Serving) -> None:
        for width, height in ((20_000, 20_000), (4_000, 4_000)):
            data = bomb(width, min(height, 4_000)) if width == 4_000 else _claim(bomb(100, 100), width, height)
            process = psutil.Process()
            before = process.memory_info().rss
            message = error_of(server.post("/v1/search", {"image": {"base64": as_base64(data)}}), 422)
            assert "pixel" in message
            assert process.memory_info().rss - before < 30 * 2**20  # the larger one would take 1.2 GB, the other 48 MB

    def test_an_image_cut_short(self, server: Serving) -> None:
        stream = io.BytesIO()
        Image.effect_noise((200, 200), 50).save(stream, "PNG")
        data = stream.getvalue()
        assert "damaged or cut short" in error_of(
            server.post("/v1/search", {"image": {"base64": as_base64(data[: len(data) // 2])}}), 422
        )

    def test_paths_and_urls_are_not_images(self, server: Serving) -> None:
        for text in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "../../x"):
            error_of(server.post("/v1/search", {"image": text}), 422)
            error_of(server.post("/v1/search", {"image": {"id": text}}), 404)
            error_of(server.post("/v1/match", {"image": {"id": text}, "texts": ["a"]}), 404)
            error_of(server.post("/v1/search", {"image": {"path": text}}), 422)


class TestPaths:
    @pytest.mark.parametrize(
        "tail",
        [
            "../../etc/passwd",
            "..%2f..%2fetc%2fpasswd",
            "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
            "..%5c..%5cwindows",
            "%00",
            "0123456789abcdef%00",
            "%ff%fe",
            "....//....//etc/passwd",
            "0123456789abcde'",
            "x" * 600,
        ],
    )
    def test_nothing_outside_the_index_is_read(self, server: Serving, tail: str) -> None:
        for start in ("v1/images", "v1/thumbnails", "static"):
            # Sent raw: a client would tidy the path up.
            received = exchange(
                server, f"GET /{start}/{tail} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
            )
            head, _, body = received.partition(b"\r\n\r\n")
            assert head.split(b" ")[1] in (b"404", b"422"), received[:200]
            assert b"root:" not in body and set(json.loads(body)) == {"error"}

    def test_files_beside_the_page_are_not_served(self, server: Serving) -> None:
        for name in ("app.py", "../app.py", "__init__.py", "index.html/../../app.py", ""):
            error_of(server.client.get(f"/static/{name}"), 404)

    def test_an_indexed_file_that_became_something_else(self, server: Serving, first_id: str) -> None:
        path = Path(server.index.entry(first_id).uri)
        data = path.read_bytes()
        try:
            path.write_bytes(HTML)
            message = error_of(server.client.get(f"/v1/images/{first_id}"), 404)
            assert str(path) not in message and "run `tercet index` again" in message
            path.unlink()
            path.symlink_to("/etc/passwd")
            error_of(server.client.get(f"/v1/images/{first_id}"), 404)
        finally:
            path.unlink()
            path.write_bytes(data)
        assert server.client.get(f"/v1/images/{first_id}").content == data


class TestConnections:
    def test_a_body_that_trickles(self, server: Serving) -> None:
        started = time.monotonic()
        received = exchange(server, POST + b"content-length: 50\r\n\r\n{")
        assert received.startswith(b"HTTP/1.1 408") and b'"too_slow"' in received
        assert 1.5 < time.monotonic() - started < 8

    def test_an_endless_head(self, server: Serving) -> None:
        started = time.monotonic()
        assert exchange(server, b"GET / HTTP/1.1\r\nhost: local") == b""
        assert time.monotonic() - started < 8

    def test_a_silent_connection_is_closed(self, server: Serving) -> None:
        assert exchange(server, b"") == b""

    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET\r\n\r\n",
            b"GET / HTTP/1.1\r\nno header\r\n\r\n",
            b"G" * 70_000 + b"\r\n\r\n",
        ],
    )
    def test_what_is_not_http(self, server: Serving, data: bytes) -> None:
        received = exchange(server, data)
        assert received.startswith(b"HTTP/1.1 400") or received == b""
        if received:
            assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"

    def test_smuggled_lengths_are_refused(self, server: Serving) -> None:
        head = b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        for lengths in (
            b"content-length: 5\r\ncontent-length: 6\r\n",
            b"content-length: -1\r\n",
            b"content-length: x\r\n",
        ):
            assert exchange(server, head + lengths + b"\r\nabcdef").startswith(b"HTTP/1.1 400")

    def test_many_large_bodies_at_once_stay_within_memory(self, server: Serving) -> None:
        body = json.dumps({"image": {"base64": "A" * 290_000}, "texts": ["a"]}).encode()
        process = psutil.Process()
        before = process.memory_info().rss
        with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=server.url, timeout=60) as client:
            responses = list(
                pool.map(lambda _: client.post("/v1/match", content=body, headers=JSON).status_code, range(100))
            )
        assert set(responses) <= {408, 422, 429}  # 408 where the machine is so busy that a body takes 2 seconds
        # Bodies that are held at once, the parts that they are read into, and those of the client beside them.
        assert process.memory_info().rss - before < 200 * 2**20


def _claim(png: bytes, width: int, height: int) -> bytes:
    """The same PNG with another size in its head."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]
