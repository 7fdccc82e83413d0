"""What a request must pass before anything reads it: name, key, place in the queue, size and pace of its body."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import TYPE_CHECKING, Any

from tercet.serve.refusals import Refusal, error_body
from tercet.serve.settings import ServeSettings

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tercet.serve.metrics import Metrics

log = logging.getLogger("tercet.serve")

# Everything of the page is its own files; pictures that were fetched with a key or dropped in are blobs.
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
# The addresses that take a body and a place in the queue.
QUESTIONS = frozenset(f"/v1/{name}" for name in ("search", "match", "ask", "classify", "explain", "embed"))
DROPPED_BYTES = 64 * 2**20  # of a body that is too large, before the connection is cut


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._names = settings.names
        self._key = None if settings.key is None else settings.key.encode()
        self._headers = dict(SECURITY_HEADERS)
        if not settings.origins:
            self._headers["cross-origin-resource-policy"] = "same-origin"
        self._admitted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send, self._headers)
        started = time.perf_counter()
        try:
            await self._admit(scope, receive, reply)
        except Refusal as refusal:
            await reply.refuse(refusal)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if reply.status is not None:
                raise
            await reply.refuse(Refusal(500, "the server failed at this request; its log says why"))
        finally:
            self._count(scope, reply.status, time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        headers = dict(scope["headers"])
        path: str = scope["path"]
        self._check_name(headers)
        if path.startswith(("/v1/", "/metrics")) and scope["method"] != "OPTIONS":
            self._check_key(headers)
        if scope["method"] != "POST" or path not in QUESTIONS:
            await self._app(scope, receive, reply.send)
            return
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise Refusal(415, "the body must be JSON; send Content-Type: application/json")
        if self._admitted >= self._settings.queue:
            raise Refusal(
                429,
                f"{self._admitted} requests wait already; ask again in a second, or start the server with more --queue",
                {"retry-after": "1"},
            )
        self._admitted += 1
        self._metrics.waiting.set(self._admitted)
        try:
            body = await self._read(headers, receive)
            await self._answer(scope, _replay(body, receive), reply)
        finally:
            self._admitted -= 1
            self._metrics.waiting.set(self._admitted)

    async def _answer(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        """Let the application answer, in time."""
        limit = asyncio.timeout(self._settings.request_seconds)
        try:
            async with limit:
                await self._app(scope, receive, reply.send)
        except TimeoutError:
            if not limit.expired() or reply.status is not None:
                raise
            raise Refusal(
                503,
                f"no answer within {self._settings.request_seconds:g} seconds; ask for less, or when the server has "
                "less to do",
                {"retry-after": "5"},
            ) from None

    def _check_name(self, headers: dict[bytes, bytes]) -> None:
        if self._names is None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        if name not in self._names:
            raise Refusal(421, "this server does not answer to that name; start it with --hosts NAME to allow it")

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(given.strip(), self._key)
        if scheme.lower() != b"bearer" or not right:
            raise Refusal(
                401, "this server asks for a key; send Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
            )

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, within its bounds.

        A client reads no answer while it is sending, so what is beyond the bounds is taken and dropped for a while.
        """
        limit = self._settings.body_bytes
        length = headers.get(b"content-length", b"0")
        announced = int(length) if length.isdigit() else 0
        body, taken = bytearray(), 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while announced <= DROPPED_BYTES and taken <= DROPPED_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the connection ended before the body did", {"connection": "close"})
                    part = message.get("body", b"")
                    taken += len(part)
                    if max(taken, announced) <= limit:
                        body += part
                    else:
                        body.clear()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refusal(
                408,
                f"the body took more than {self._settings.body_seconds:g} seconds; send it faster, or less of it",
                {"connection": "close"},
            ) from None
        if max(taken, announced) > limit:
            raise Refusal(
                413,
                f"the body has more than {limit} bytes; send a smaller picture, or start the server with more "
                "--body_mb",
                {"connection": "close"},
            )
        return bytes(body)

    def _count(self, scope: Scope, status: int | None, seconds: float) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.requests.labels(scope["method"] if path != "other" else "other", path, str(status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)


class _Reply:
    """Sends an answer with the security headers, and remembers how it began."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.status: int | None = None

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message of the application on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {name for name, _ in message["headers"]}
            cache = [] if b"cache-control" in own else [(b"cache-control", b"no-store")]
            message = {**message, "headers": [*message["headers"], *self._headers, *cache]}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error."""
        body = error_body(refusal.status, refusal.message)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what the connection itself says."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
