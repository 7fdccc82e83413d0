"""Listening, and stopping so that no request is lost."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from typing import TYPE_CHECKING

from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from tercet.errors import TercetError
from tercet.serve.refusals import error_body
from tercet.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

HEADER_BYTES = 32 * 1024
CONNECTIONS = 1000
KEEP_ALIVE = 15  # seconds that a connection may be silent between requests

log = logging.getLogger("tercet.serve")


class PatientProtocol(H11Protocol):
    """Uvicorn's protocol, with an end to its patience: whoever connects must send the head of a request in time."""

    head_seconds = 10.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; a request that begins after another is waited for anew."""
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()
        super().data_received(data)

    def handle_events(self) -> None:
        """Read what has come; a whole head ends the wait."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the wait."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the shape of every error."""
        body = error_body(400, f"{msg.rstrip('.')}; this is an HTTP/1.1 server")
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.close()


def listen(settings: ServeSettings) -> socket.socket:
    """A socket at the host and port of `settings`.

    Raises:
        TercetError: the port is taken or not allowed, or the host is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TercetError(
            f"cannot listen at {settings.host} port {settings.port}: {reason}; choose others with --host and --port"
        ) from error


def address(sock: socket.socket) -> str:
    """Where a browser finds the page."""
    name: tuple[str, int] = sock.getsockname()[:2]
    host, port = name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(app: FastAPI, settings: ServeSettings) -> Server:
    """A server that is not yet started; it stops at SIGTERM or Ctrl-C when what was asked is answered."""
    protocol = type("Protocol", (PatientProtocol,), {"head_seconds": settings.body_seconds})
    config = Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(settings.body_seconds + settings.request_seconds) + 1,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return Server(config)


def run_server(app: FastAPI, settings: ServeSettings, sock: socket.socket) -> None:
    """Serve until a signal asks to stop, then finish what was begun."""
    server = make_server(app, settings)
    if threading.current_thread() is threading.main_thread():
        # Uvicorn raises the signal once more when all is done; that second one must not kill the process.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    server.run(sockets=[sock])
    log.info("stopped; every request that was begun is answered")
