"""Listening, and stopping so that every request that was begun is answered."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading

from fastapi import FastAPI
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from tercet.errors import TercetError
from tercet.serve.limits import ServeSettings, error_content

HEADER_BYTES = 32 * 1024
CONNECTIONS = 1000
KEEP_ALIVE = 15  # seconds that a connection may be silent between requests

log = logging.getLogger("tercet.serve")


class TimedProtocol(H11Protocol):
    """Uvicorn's HTTP protocol, which closes connections that do not send the head of a request in time."""

    head_seconds = 10.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wait for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Take bytes; they may begin the next request."""
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_timer()
        super().data_received(data)

    def handle_events(self) -> None:
        """Parse what has arrived; a complete head stops the timer."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the shape of every error."""
        body = json.dumps(error_content(400, f"{msg.rstrip('.')}; this is an HTTP/1.1 server")).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


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
    """The URL of the page."""
    name: tuple[str, int] = sock.getsockname()[:2]
    host, port = name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(app: FastAPI, settings: ServeSettings) -> Server:
    """A server that is not yet started; on SIGTERM or Ctrl-C it answers what was asked and stops."""
    config = Config(
        app,
        http=type("Protocol", (TimedProtocol,), {"head_seconds": settings.body_seconds}),
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
