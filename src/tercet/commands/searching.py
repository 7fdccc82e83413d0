"""Commands on an index of one's own images: `index`, `search` and `serve`."""

from __future__ import annotations

import dataclasses
import functools
import json as json_format
import logging
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tercet.commands.models import DEMO_MODEL, load_predictor, warn_untrained_matching
from tercet.commands.terminal import can_draw_pictures, print_problems, print_table, progress_bar
from tercet.errors import TercetError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tercet.search.build import IndexReport
    from tercet.search.index import Hit, Index
    from tercet.search.search import Query

PICTURE_COLUMNS = 20  # of the terminal, twice as high as they are wide


def index(
    images: list[str],
    *,
    output: str,
    model: str | None = None,
    engine: Literal["local", "ray"] = "local",
    json: bool = False,
) -> None:
    """Embed images into an index that can be searched, or update one: only what is new or changed is read.

    Args:
        images: folders, images, tar shards, Parquet files, annotation files, globs or URLs of these.
        output: folder of the index, or a URI such as s3://bucket/index.
        model: model folder, run folder, or hub id; default: the model that made the index, or else runs/demo/model.
        engine: ray: embed on the cluster that RAY_ADDRESS names, or else on one of this machine's cores.
        json: print what was done as one JSON object.
    """
    from tercet.search.build import build_index
    from tercet.search.index import Index

    name = model or (Index.open(output).model if Index.exists(output) else DEMO_MODEL)
    predictor = load_predictor(name)
    path = Path(name).expanduser()
    lasting = str(path.absolute()) if path.exists() else name  # valid in any working folder
    with progress_bar("embedding", "images") as progress:
        embed = None
        if engine == "ray":
            from tercet.search.cluster import embed_on_cluster

            embed = functools.partial(embed_on_cluster, predictor)
        made, report = build_index(images, predictor, lasting, output, progress, embed)
    if json:
        counts = dataclasses.asdict(report) | {"skipped": list(report.skipped), "images": made.count}
        print(json_format.dumps(counts))
    else:
        _print_report(report, made.count, output)


def search(
    index: str,
    text: list[str] | None = None,
    *,
    image: str | None = None,
    like: str | None = None,
    without: str | None = None,
    where: str | None = None,
    k: int = 10,
    rerank: int | None = None,
    model: str | None = None,
    no_thumbnails: bool = False,
    json: bool = False,
    html: Path | None = None,
) -> None:
    """Find images of an index by words, by an image, or both.

    Args:
        index: folder or URI of an index.
        text: what the image shows.
        image: an image that it looks like: path or URL.
        like: id of an image of the index that it looks like.
        without: what the image does not show.
        where: only images whose columns match: "width >= 800 and caption like '%dog%'".
        k: how many images.
        rerank: candidates that the fusion encoder re-ranks; 0: none, the dual encoder alone; default 64.
        model: default: the model that made the index.
        no_thumbnails: print the table alone, where the terminal could draw the images too.
        json: print the images as one JSON list.
        html: write the images as a page to this file.
    """
    from tercet.search.index import Index
    from tercet.search.search import Query, Searcher

    query = Query(" ".join(text or []) or None, image, like, without, where, k, rerank)
    opened = Index.open(index)
    predictor = load_predictor(model or opened.model)
    if query.text and rerank != 0:
        warn_untrained_matching(predictor, "the order is the dual encoder's")
    hits = Searcher(opened, predictor).search(query)
    if html is not None:
        print(_write_page(query, opened, index, hits, html))
    elif json:
        print(json_format.dumps([dataclasses.asdict(hit) for hit in hits], ensure_ascii=False))
    elif not hits:
        print("no image found")
    else:
        _print_hits(hits, _thumbnails(opened, hits) if not no_thumbnails and can_draw_pictures() else [])


def serve(
    index: str,
    *,
    model: str | None = None,
    ask_model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    key_file: str | None = None,
    hosts: list[str] | None = None,
    origins: list[str] | None = None,
    show_uris: bool = False,
    queue: int = 64,
    batch: int = 64,
    window_ms: float = 3.0,
    body_mb: float = 12.0,
    megapixels: float = 50.0,
    timeout: float = 30.0,
) -> None:
    """Serve an index: a page to search and ask in a browser, and the same as JSON over HTTP.

    A key that clients must send comes from the environment variable TERCET_KEY or from a file.

    Args:
        index: folder or URI that `tercet index` wrote.
        model: model folder, run folder, or hub id; default: the one that made the index.
        ask_model: model that answers questions, fine-tuned by `tercet train vqa`; default: the one that searches.
        host: address to listen on; 0.0.0.0 lets other machines connect.
        port: port to listen on; 0 takes a free one.
        key_file: file that holds the key which clients must send as Authorization: Bearer KEY; default: TERCET_KEY, or
            no key.
        hosts: names that the server answers to; default: this machine's own on loopback, any name elsewhere.
        origins: web origins whose pages may call the API, such as https://example.org; default: none.
        show_uris: show clients where images are stored, not only their names.
        queue: requests that wait or are in work; one more is refused with 429.
        batch: texts and images that go through the model together; 1 answers one request after another.
        window_ms: milliseconds that the first request of a batch waits for others.
        body_mb: largest request, in megabytes.
        megapixels: largest image of a request.
        timeout: seconds after which a request fails.
    """
    try:
        import fastapi  # noqa: F401 - whether the extra is there
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise TercetError(f"serving needs {error.name}; pip install 'tercet[serve]'") from error
    from tercet.search.index import Index
    from tercet.serve.app import create_app
    from tercet.serve.limits import ServeSettings, read_key
    from tercet.serve.server import address, listen, run_server

    settings = ServeSettings(
        host=host,
        port=port,
        key=read_key(key_file),
        origins=tuple(origins or ()),
        hosts=tuple(hosts or ()),
        show_uris=show_uris,
        queue=queue,
        batch=batch,
        window=window_ms / 1000,
        body_bytes=int(body_mb * 2**20),
        pixel_limit=int(megapixels * 1e6),
        request_seconds=timeout,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    opened = Index.open(index)
    # Before the model is read, so that a port in use is reported at once.
    with listen(settings) as sock:
        predictor = load_predictor(model or opened.model, local_only=True)
        answering = load_predictor(ask_model, local_only=True) if ask_model else None
        app = create_app(predictor, opened, settings, answering)
        if not settings.local and settings.key is None:
            print(
                f"anyone who can reach {host} port {port} can search and see these images; set "
                "TERCET_KEY or --key-file to ask for a key",
                file=sys.stderr,
            )
        print(f"{opened.count:,} images at {address(sock)} (Ctrl-C stops)", flush=True)
        run_server(app, settings, sock)


def _thumbnails(index: Index, hits: list[Hit]) -> list[RenderableType]:
    """Thumbnails to draw on the terminal: in pixels where it says that it can, else in half characters."""
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it warns of terminals that do not answer, at length
    try:
        from textual_image.renderable import Image  # as it is imported, it asks the terminal
    except ImportError as error:
        raise TercetError("drawing images needs textual-image; pip install 'tercet[search]'") from error
    thumbnails = index.thumbnails([hit.id for hit in hits])
    pictures: list[RenderableType] = []
    for hit in hits:
        if hit.id not in thumbnails:  # an image can leave the index while its row is written
            pictures.append("")
        elif hit.width >= hit.height:
            pictures.append(Image(BytesIO(thumbnails[hit.id]), width=PICTURE_COLUMNS, height="auto"))
        else:
            pictures.append(Image(BytesIO(thumbnails[hit.id]), width="auto", height=PICTURE_COLUMNS // 2))
    return pictures


def _print_hits(hits: list[Hit], pictures: Sequence[RenderableType]) -> None:
    header = ["", "match", "cosine", "dual", "id", "image", "caption"]
    rows = []
    for rank, hit in enumerate(hits, 1):
        match = "" if hit.match is None else f"{100 * hit.match:.1f} %"
        rows.append([str(rank), match, f"{hit.cosine:.3f}", str(hit.dual_rank), hit.id, hit.uri, hit.caption or ""])
    if all(hit.match is None for hit in hits):
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    print_table(header, rows, pictures)


def _write_page(query: Query, index: Index, name: str, hits: list[Hit], path: Path) -> Path:
    from tercet.data.inputs import to_pixels
    from tercet.report.page import SearchResult, write_search_page
    from tercet.search.build import make_thumbnail

    thumbnails = index.thumbnails([hit.id for hit in hits] + ([query.like] if query.like else []))
    parts = {
        "words": query.text,
        "image": query.image,
        "like": query.like,
        "without": query.without,
        "filter": query.where,
        "index": name,
    }
    image = make_thumbnail(to_pixels(query.image)) if query.image else thumbnails.get(query.like or "")
    found = [
        SearchResult(hit.id, hit.uri, hit.caption, hit.cosine, hit.match, hit.dual_rank, thumbnails.get(hit.id, b""))
        for hit in hits
    ]
    return write_search_page(found, {key: str(value) for key, value in parts.items() if value}, path, image)


def _print_report(report: IndexReport, count: int, path: str) -> None:
    print_problems("skipped", report.skipped, 20)
    changes = [
        f"{report.added:,} new",
        f"{report.changed:,} changed",
        f"{report.unchanged:,} unchanged",
        f"{report.removed:,} removed",
        f"{len(report.skipped):,} skipped",
    ]
    if report.approximate is not None:
        build = report.approximate
        captions = "" if build.caption_recall is None else f", {build.caption_recall:.3f} by captions"
        print(
            f"approximate index: {build.probes} of {build.cells} cells a search, "
            f"recall@10 {build.recall:.3f} by images{captions}, built in {build.seconds:.0f} s"
        )
    print(f"{path}: {count:,} images ({', '.join(changes)}) in {report.seconds:.1f} s")
