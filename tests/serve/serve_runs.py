"""A server in a thread of the test's own process, and what speaks to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from tercet.predictor import Predictor
from tercet.search.index import Index
from tercet.serve.app import create_app
from tercet.serve.limits import ServeSettings
from tercet.serve.server import address, listen, make_server

PICTURES = 24


@dataclass(frozen=True)
class Serving:
    """A server that runs: where (with a slash at the end), a client of it, and what it serves."""

    url: str
    client: httpx.Client
    index: Index
    predictor: Predictor

    def post(self, path: str, body: object) -> httpx.Response:
        """Send JSON."""
        return self.client.post(path, json=body)


@contextmanager
def serving(index: Index, predictor: Predictor, settings: ServeSettings) -> Iterator[Serving]:
    """Serve in a thread until the block ends."""
    with listen(settings) as sock:
        server = make_server(create_app(predictor, index, settings), settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            with httpx.Client(base_url=address(sock), timeout=30) as client:
                yield Serving(address(sock), client, index, predictor)
        finally:
            server.should_exit = True
            thread.join(60)


def error_of(response: httpx.Response, *statuses: int) -> str:
    """The message of an error, which has the one shape that all have and does not repeat what was sent."""
    assert response.status_code in statuses, f"{response.status_code}: {response.text[:300]}"
    assert response.headers["content-type"].startswith("application/json")
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"code", "message"}
    message = response.json()["error"]["message"]
    assert 0 < len(message) < 1000
    return message
