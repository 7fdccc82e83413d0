"""Hostile requests: every response is a clear 4xx in the one shape, and the server stays up within its memory."""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image
from serve_runs import Serving, error_of

POST = b"POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HTML = b"<!doctype html><html><script>alert(1)</script></html>"
MIB = 2**20


@pytest.fixture(autouse=True)
def stays_up(server: Serving) -> Iterator[None]:
    """After every test the server answers as before."""
    yield
    assert server.client.get("/readyz").status_code == 200


@contextmanager
def memory_grows_below(limit: int) -> Iterator[None]:
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    assert process.memory_info().rss - before < limit


def send(server: Serving, body: bytes | Iterable[bytes], kind: str = "application/json") -> httpx.Response:
    return server.client.post("/v1/search", content=body, headers={"content-type": kind})


def search_by(server: Serving, data: bytes) -> httpx.Response:
    return server.post("/v1/search", {"image": {"base64": base64.b64encode(data).decode()}})


def exchange(server: Serving, data: bytes) -> bytes:
    """Send raw bytes, and read until the server closes the connection."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=10.0) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def png(width: int, height: int, claimed: tuple[int, int] | None = None) -> bytes:
    """A black PNG whose pixels take a thousand times its bytes; its head may claim another size."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", *(claimed or (width, height)), 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_bodies_that_are_too_large(server: Serving) -> None:
    query = json.dumps({"text": "a" * 10_000_000}).encode()
    for body in (b" " * 400_000, (b" " * 50_000 for _ in range(20)), query):  # the second announces no length
        assert "more than 300000 bytes" in error_of(send(server, body), 413)
    with memory_grows_below(5 * MIB):
        assert "more than 300000 bytes" in error_of(send(server, query), 413)
    received = exchange(server, POST + b"content-length: 100000000000\r\n\r\n{")
    assert received.startswith(b"HTTP/1.1 413") and b'"too_large"' in received
    assert "at most 1000 characters" in error_of(server.post("/v1/search", {"text": "a" * 200_000}), 422)


NOT_A_QUERY = (b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe\x00", b'{"text": "\xff"}', b'{"text": "a"} trailing')
WRONG_TEXTS, WRONG_NUMBERS = (b"NaN", b'["a"]', b'{"$ne": null}'), (b"1e400", b"9" * 26, b"1.5", b"true")


def test_wrong_json(server: Serving) -> None:
    bodies = [*NOT_A_QUERY, b"[" * 100_000, b'{"image":' * 20_000, b'{"text": "a", "__proto__": {}}']
    bodies += [b'{"text": %b}' % text for text in WRONG_TEXTS]
    bodies += [b'{"text": "a", "k": %b}' % number for number in WRONG_NUMBERS]
    for body in bodies:
        error_of(send(server, body), 400, 422)
    forms = ("multipart/form-data; boundary=x", "application/x-www-form-urlencoded")
    for kind in (*forms, "text/plain", "application/jsonp", ""):
        assert "application/json" in error_of(send(server, b'{"text": "a"}', kind), 415)


def test_odd_texts(server: Serving) -> None:
    for text in ("a\0b", "\0", "\ud800", "a\udfff"):
        message = error_of(send(server, json.dumps({"text": text}).encode()), 422)
        assert "null character" in message or "half a character" in message or "unicode" in message
        where = {"text": "a", "where": f"caption = '{text}'"}
        error_of(send(server, json.dumps(where).encode()), 422)
    for text in ("\u202e", "a" * 1000, "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ﷺ" * 900, "[CLS][SEP][MASK]", "<script>", "'; --"):
        assert server.post("/v1/search", {"text": text}).status_code in (200, 422)


UNKNOWN = (b"GIF89a<script>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7", b"\0" * 100, b"PK\x03\x04")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "an SVG drawing"),
        (HTML, "a web page"),
        *((data, "not an image of a known format") for data in UNKNOWN),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\xff\xd8\xff\xe0", ""),
    ],
)
def test_not_an_image(server: Serving, data: bytes, message: str) -> None:
    image = {"image": {"base64": base64.b64encode(data).decode()}}
    for path, more in (("match", {"texts": ["a"]}), ("search", {}), ("explain", {"text": "a"})):
        assert message in error_of(server.post(f"/v1/{path}", {**image, **more}), 422)


def test_neither_base64_nor_an_id(server: Serving) -> None:
    for text in ("not base64!", "é", "AAA", "====", "data:image/png;base64,", "http://localhost/a.png"):
        error_of(server.post("/v1/search", {"image": {"base64": text}}), 422)
    for text in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "../../x"):
        error_of(server.post("/v1/search", {"image": text}), 422)
        error_of(server.post("/v1/search", {"image": {"path": text}}), 422)
        error_of(server.post("/v1/search", {"image": {"id": text}}), 404)
        error_of(server.post("/v1/match", {"image": {"id": text}, "texts": ["a"]}), 404)


def test_decompression_bombs_and_images_cut_short(server: Serving) -> None:
    for data in (png(100, 100, claimed=(20_000, 20_000)), png(4_000, 4_000)):  # 1.2 GB and 48 MB of pixels
        with memory_grows_below(30 * MIB):
            assert "pixel" in error_of(search_by(server, data), 422)
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(stream, "PNG")
    data = stream.getvalue()
    assert "damaged or cut short" in error_of(search_by(server, data[: len(data) // 2]), 422)


PARENTS = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "....//....//etc/passwd")
ODD_PATHS = ("..%5c..%5cwindows", "%00", "0123456789abcdef%00", "%ff%fe", "0123456789abcde'", "x" * 600)


def test_nothing_outside_the_index_is_read(server: Serving) -> None:
    for start, tail in itertools.product(("v1/images", "v1/thumbnails", "static"), PARENTS + ODD_PATHS):
        request = f"GET /{start}/{tail} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        received = exchange(server, request.encode())  # sent raw: a client would tidy the path up
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] in (b"404", b"422"), (tail, received[:200])
        assert b"root:" not in body and set(json.loads(body)) == {"error"}
    for name in ("app.py", "../app.py", "__init__.py", "index.html/../../app.py", ""):
        error_of(server.client.get(f"/static/{name}"), 404)


def test_an_indexed_file_that_became_something_else(server: Serving, first_id: str) -> None:
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


def test_slow_and_silent_connections(server: Serving) -> None:
    started = time.monotonic()
    received = exchange(server, POST + b"content-length: 50\r\n\r\n{")
    assert received.startswith(b"HTTP/1.1 408") and b'"too_slow"' in received
    assert 1.5 < time.monotonic() - started < 8
    for head in (b"GET / HTTP/1.1\r\nhost: local", b""):
        started = time.monotonic()
        assert exchange(server, head) == b""
        assert time.monotonic() - started < 8


def test_what_is_not_http(server: Serving) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00"  # of TLS
    for data in (hello, b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"G" * 70_000 + b"\r\n\r\n"):
        received = exchange(server, data)
        assert received.startswith(b"HTTP/1.1 400") or received == b""
        assert not received or json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"
    for lengths in (b"5\r\ncontent-length: 6", b"-1", b"x"):
        sent = POST + b"content-length: " + lengths + b"\r\n\r\nabcdef"
        assert exchange(server, sent).startswith(b"HTTP/1.1 400")


def test_many_large_bodies_at_once_stay_within_memory(server: Serving) -> None:
    body = {"image": {"base64": "A" * 290_000}, "texts": ["a"]}
    # Bodies that are held at once, the parts that they are read into, and those of the client beside them.
    with memory_grows_below(200 * MIB), ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda _: server.post("/v1/match", body).status_code, range(100)))
    assert set(responses) <= {408, 422, 429}  # 408 where the machine is so busy that a body takes 2 seconds
