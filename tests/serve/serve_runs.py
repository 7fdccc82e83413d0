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
from tercet.serve.api import create_app
from tercet.serve.server import address, listen, make_server
from tercet.serve.settings import ServeSettings

PICTURES = 24


@dataclass(frozen=True)
class Serving:
    """A server that runs.

    Attributes:
        url: where, with a slash at the end.
        client: speaks to it.
        index: what it serves.
        predictor: what it runs.
    """

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
            url = address(sock)
            with httpx.Client(base_url=url, timeout=30) as client:
                yield Serving(url, client, index, predictor)
        finally:
            server.should_exit = True
            thread.join(60)
