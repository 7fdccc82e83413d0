"""What a server allows: its settings, the guard that every request must pass, error responses and metrics."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tercet.errors import TercetError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("tercet.serve")

KEY_VARIABLE = "TERCET_KEY"
KEY_LENGTH = 16
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# Everything on the page comes from its own files; images that were fetched with a key, or dropped, are blobs.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
# Endpoints that take a body and a slot in the queue.
MODEL_PATHS = frozenset(f"/v1/{name}" for name in ("search", "match", "ask", "classify", "explain", "embed"))
DISCARD_BYTES = 64 * 2**20  # of a body that is too large, before the connection is cut
# By status: a code for programs, and what it means.
ERRORS = {
    400: ("bad_request", "not HTTP or not JSON"),
    401: ("unauthorized", "no key, or a wrong one"),
    404: ("not_found", "no image of that id"),
    405: ("method_not_allowed", "another method"),
    408: ("too_slow", "the body arrived too slowly"),
    413: ("too_large", "the body is too large"),
    415: ("not_json", "the body is not JSON"),
    421: ("unknown_host", "addressed to another host name"),
    422: ("invalid", "a value is not valid"),
    429: ("queue_full", "too many requests are waiting"),
    500: ("failed", "an error of the server"),
    503: ("unavailable", "not ready, stopping, or no answer in time"),
}


@dataclass(frozen=True)
class ServeSettings:
    """The limits of a server.

    Attributes:
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        key: what a client sends as `Authorization: Bearer KEY`; None: no key is needed.
        origins: web origins whose pages may call the API; none by default.
        hosts: host names that the server answers to; default: loopback names while it listens to loopback alone, and
            any name otherwise.
        show_uris: show clients where images are; only their names otherwise.
        queue: requests that wait or run; one more is refused with 429.
        batch: images and texts that go through the model together.
        window: seconds that the first request of a batch waits for others.
        body_bytes: of one request.
        pixel_limit: of one image.
        body_seconds: until a request has arrived.
        request_seconds: until it is answered.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    show_uris: bool = False
    queue: int = 64
    batch: int = 64
    window: float = 0.003
    body_bytes: int = 12 * 2**20
    pixel_limit: int = 50_000_000
    body_seconds: float = 10.0
    request_seconds: float = 30.0

    def __post_init__(self) -> None:
        least = {"queue": 1, "batch": 1, "window": 0, "body_bytes": 1024, "pixel_limit": 1, "port": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise TercetError(f"{name} is {getattr(self, name)}; it must be {bound} or more")
        for name in ("body_seconds", "request_seconds"):
            if getattr(self, name) <= 0:
                raise TercetError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.port > 65535:
            raise TercetError(f"port is {self.port}; ports end at 65535")
        if "*" in self.origins and self.key is None:
            raise TercetError("origins * lets every web page read the index; name the origins, or set a key")

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def names(self) -> frozenset[str] | None:
        """Host names that a request may be addressed to; None: any."""
        if not self.local:
            return frozenset(self.hosts) or None
        # A web page can point a name of its own at this machine, and would then count as the same origin.
        return frozenset({*LOOPBACK_NAMES, *self.hosts})


def read_key(file: str | None) -> str | None:
    """The key in a file, or else in the environment variable `TERCET_KEY`; None where there is neither.

    Raises:
        TercetError: the file cannot be read, or the key is too short or not fit for a header.
    """
    if file is None:
        origin, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
    else:
        origin = file
        try:
            key = Path(file).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TercetError(f"{file}: cannot read the key ({error}); write it there as one line") from error
    key = key.strip()
    if len(key) < KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise TercetError(
            f"{origin}: a key has {KEY_LENGTH} or more ASCII characters and no spaces; `openssl rand -hex 32` makes one"
        )
    return key


def error_response(error: HTTPException) -> JSONResponse:
    """An error in the shape that all have: `{"error": {"code": ..., "message": ...}}`."""
    return JSONResponse(error_content(error.status_code, error.detail), error.status_code, error.headers)


def error_content(status: int, message: str) -> dict[str, dict[str, str]]:
    """The JSON of an error."""
    code = ERRORS[status][0] if status in ERRORS else "failed" if status >= 500 else "bad_request"
    return {"error": {"code": code, "message": message}}


class Metrics:
    """What Prometheus reads, for one server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        ProcessCollector(registry=registry)
        self.requests = Counter("tercet_requests", "Requests", ["method", "path", "status"], registry=registry)
        self.seconds = Histogram(
            "tercet_request_seconds", "From arrival to answer", ["path"], buckets=seconds, registry=registry
        )
        self.queue = Gauge("tercet_queue", "Requests that wait or run", registry=registry)
        self.images = Gauge("tercet_index_images", "Images in the index", registry=registry)
        self.batch_jobs = Histogram(
            "tercet_batch_jobs", "Requests in a batch", ["call"], buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.batch_seconds = Histogram(
            "tercet_batch_seconds", "The model's time for a batch", ["call"], buckets=seconds, registry=registry
        )

    def observe_batch(self, call: str, jobs: int, seconds: float) -> None:
        """Count a batch."""
        self.batch_jobs.labels(call).observe(jobs)
        self.batch_seconds.labels(call).observe(seconds)

    def observe_request(self, scope: Scope, status: int | None, seconds: float) -> None:
        """Count a request, by its route: paths that do not exist are one."""
        path = getattr(scope.get("route"), "path", "other")
        self.requests.labels(scope["method"] if path != "other" else "other", path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)


class Guard:
    """ASGI middleware around the application: host name, key, queue, size and pace of the body, time to answer."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._names = settings.names
        self._headers = dict(SECURITY_HEADERS)
        if not settings.origins:
            self._headers["cross-origin-resource-policy"] = "same-origin"
        self._queued = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def send_secured(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                page = scope["path"] == "/" or scope["path"].startswith("/static/")
                headers.setdefault("cache-control", "no-cache" if page else "no-store")
            await send(message)

        started = time.perf_counter()
        try:
            await self._admit(scope, receive, send_secured)
        except Exception as error:
            if not isinstance(error, HTTPException):
                log.exception("%s %s failed", scope["method"], scope["path"])
                error = HTTPException(500, "the server failed at this request; its log says why")
            if status is not None:
                raise
            await error_response(error)(scope, receive, send_secured)
        finally:
            self._metrics.observe_request(scope, status, time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_host(headers)
        if path.startswith(("/v1/", "/metrics")) and scope["method"] != "OPTIONS":
            self._check_key(headers)
        if scope["method"] != "POST" or path not in MODEL_PATHS:
            await self._app(scope, receive, send)
            return
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the body must be JSON; send Content-Type: application/json")
        if self._queued >= self._settings.queue:
            message = f"{self._queued} requests are waiting; ask again in a second, or start with more --queue"
            raise HTTPException(429, message, {"retry-after": "1"})
        self._queued += 1
        self._metrics.queue.set(self._queued)
        try:
            body = await self._read(headers, receive)
            await self._answer(scope, _replay(body, receive), send)
        finally:
            self._queued -= 1
            self._metrics.queue.set(self._queued)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self._settings.request_seconds
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not limit.expired():
                raise
            message = f"no answer within {seconds:g} seconds; ask for less, or later"
            raise HTTPException(503, message, {"retry-after": "5"}) from None

    def _check_host(self, headers: Headers) -> None:
        if self._names is None:
            return
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        if name not in self._names:
            raise HTTPException(421, "this server does not answer to that name; start it with --hosts NAME to allow it")

    def _check_key(self, headers: Headers) -> None:
        if self._settings.key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._settings.key.encode())
        if scheme.lower() != "bearer" or not right:
            message = "this server needs a key; send Authorization: Bearer KEY"
            raise HTTPException(401, message, {"www-authenticate": "Bearer"})

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, within its limits.

        A client reads no answer while it is sending, so what is beyond the limits is received and dropped for a while.
        """
        limit, seconds, close = self._settings.body_bytes, self._settings.body_seconds, {"connection": "close"}
        length = headers.get("content-length", "0")
        announced = int(length) if length.isdigit() else 0
        body, received = bytearray(), 0
        try:
            async with asyncio.timeout(seconds):
                while max(announced, received) <= DISCARD_BYTES:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise HTTPException(400, "the connection ended before the body did", close)
                    part = event.get("body", b"")
                    received += len(part)
                    if max(received, announced) <= limit:
                        body += part
                    else:
                        body.clear()
                    if not event.get("more_body", False):
                        break
        except TimeoutError:
            message = f"the body took more than {seconds:g} seconds; send it faster, or less of it"
            raise HTTPException(408, message, close) from None
        if max(received, announced) > limit:
            message = f"the body has more than {limit} bytes; send a smaller image, or start with more --body-mb"
            raise HTTPException(413, message, close)
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what the connection says."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
