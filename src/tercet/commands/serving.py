"""The command that serves an index: `serve`."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from tercet.arguments import ModelFlag, parse
from tercet.errors import TercetError

if TYPE_CHECKING:
    from tercet.serve.settings import ServeSettings


@dataclass(frozen=True)
class ServeArguments:
    """Serve an index: a page to search and ask in a browser, and the same as JSON over HTTP.

    A key that clients must send comes from the environment variable TERCET_KEY or from a file.
    """

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """folder or URI that `tercet index` wrote"""
    model: ModelFlag = None
    """model folder, run folder, or hub id; default: the one that made the index"""
    ask_model: ModelFlag = None
    """model that answers questions, fine-tuned by `tercet train vqa`; default: the one that searches"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 lets other machines connect"""
    port: int = 8000
    """port to listen at; 0 takes a free one"""
    key_file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """file that holds the key which clients must send as Authorization: Bearer KEY; default: TERCET_KEY, or no key"""
    hosts: Annotated[list[str], tyro.conf.arg(metavar="NAME")] = field(default_factory=list)
    """names that the server answers to; default: this machine's own on loopback, any name elsewhere"""
    origins: Annotated[list[str], tyro.conf.arg(metavar="ORIGIN")] = field(default_factory=list)
    """web origins whose pages may call the interface, such as https://example.org; default: none"""
    show_uris: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """tell clients where images lie, not only their names"""
    queue: int = 64
    """requests that wait or are worked at; one more is refused with 429"""
    batch: int = 64
    """texts and images that go through the model together; 1 answers one request after another"""
    window_ms: float = 3.0
    """milliseconds that the first request of a batch waits for others"""
    body_mb: float = 12.0
    """largest request, in megabytes"""
    megapixels: float = 50.0
    """largest image of a request"""
    seconds: float = 30.0
    """longest time for an answer"""


def serve(arguments: list[str]) -> None:
    """Serve an index over HTTP, with a page to search it."""
    options = parse(ServeArguments, "serve", arguments)
    try:
        import fastapi  # noqa: F401 - whether the extra is there
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise TercetError(f"serving needs {error.name}; pip install 'tercet[serve]'") from error
    from tercet.serve.settings import ServeSettings, read_key

    settings = ServeSettings(
        host=options.host,
        port=options.port,
        key=read_key(options.key_file),
        origins=tuple(options.origins),
        hosts=tuple(options.hosts),
        show_uris=options.show_uris,
        queue=options.queue,
        batch=options.batch,
        window=options.window_ms / 1000,
        body_bytes=int(options.body_mb * 2**20),
        pixel_limit=int(options.megapixels * 1e6),
        request_seconds=options.seconds,
    )
    _serve(options, settings)


def _serve(options: ServeArguments, settings: ServeSettings) -> None:
    """Open, load, listen, and serve until a signal asks to stop."""
    from tercet.commands.models import load_chosen
    from tercet.search.index import Index
    from tercet.serve.api import create_app
    from tercet.serve.server import address, listen, run_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    opened = Index.open(options.index)
    # Before the model is read, so that a port that is taken is told at once.
    with listen(settings) as sock:
        model = load_chosen(options.model or opened.model, local_only=True)
        answering = load_chosen(options.ask_model, local_only=True) if options.ask_model else None
        app = create_app(model, opened, settings, answering)
        if not settings.local and settings.key is None:
            print(
                f"anyone who can reach {settings.host} port {settings.port} can search and see these images; set "
                "TERCET_KEY or --key_file to ask for a key",
                file=sys.stderr,
            )
        print(f"{opened.count:,} images at {address(sock)} (Ctrl-C stops)", flush=True)
        run_server(app, settings, sock)
