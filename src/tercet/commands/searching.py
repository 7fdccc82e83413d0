"""Commands on an index of one's own images: `index` and `search`."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tercet.arguments import ModelFlag, Switch, parse
from tercet.commands.models import DEMO_MODEL, lasting_name, load_chosen, warn_untrained_matching
from tercet.commands.printing import print_table, shows_pictures
from tercet.commands.progress import progress_bar
from tercet.errors import TercetError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tercet.search.build import IndexReport
    from tercet.search.index import Hit, Index

SHOWN_PROBLEMS = 20
PICTURE_COLUMNS = 20  # of the terminal, twice as high as they are wide


@dataclass(frozen=True)
class IndexArguments:
    """Embed images into an index that can be searched, or bring one up to date: only what is new or changed is read."""

    images: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """folders, images, tar shards, Parquet files, annotation files, globs or URLs of these"""
    to: Annotated[str, tyro.conf.arg(metavar="INDEX")]
    """folder of the index, or a URI such as s3://bucket/index"""
    model: ModelFlag = None
    """model folder, run folder, or hub id; default: the model that made the index, or else runs/demo/model"""
    engine: Literal["local", "ray"] = "local"
    """ray: embed on the cluster that RAY_ADDRESS names, or else on one of this machine's cores"""
    json: Switch = False
    """print what was done as one JSON object"""


@dataclass(frozen=True)
class SearchArguments:
    """Find images of an index by words, by an image, or both."""

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """folder or URI of an index"""
    text: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="WORDS")] = field(default_factory=list)
    """what the image shows"""
    image: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """an image that it looks like"""
    like: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """id of an image of the index that it looks like"""
    without: Annotated[str | None, tyro.conf.arg(metavar="WORDS")] = None
    """what the image does not show"""
    where: Annotated[str | None, tyro.conf.arg(metavar="FILTER")] = None
    """only images whose columns are so: "width >= 800 and caption like '%dog%'" """
    k: Annotated[int, tyro.conf.arg(aliases=["-k"], metavar="N")] = 10
    """how many images"""
    rerank: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """candidates that the fusion encoder ranks anew; 0: none, the dual encoder alone; default 64"""
    model: ModelFlag = None
    """default: the model that made the index"""
    no_thumbnails: Switch = False
    """print the table alone, where the terminal could draw the images too"""
    json: Switch = False
    """print the images as one JSON list"""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the images as a page to this file"""


def index(arguments: list[str]) -> None:
    """Embed images into an index that can be searched, or bring one up to date."""
    options = parse(IndexArguments, "index", arguments)
    if not options.images:
        raise TercetError("name what to index: tercet index FOLDER --model MODEL --to INDEX")
    from tercet.search.build import build_index
    from tercet.search.index import Index

    name = options.model
    if name is None:
        name = Index.open(options.to).model if Index.exists(options.to) else DEMO_MODEL
    model = load_chosen(name)
    with progress_bar("embedding", "images") as progress:
        embed = None
        if options.engine == "ray":
            from tercet.search.cluster import embed_on_cluster

            embed = functools.partial(embed_on_cluster, model)
        made, report = build_index(options.images, model, lasting_name(name), options.to, progress, embed)
    if options.json:
        counts = dataclasses.asdict(report) | {"skipped": list(report.skipped), "images": made.count}
        print(json.dumps(counts))
    else:
        _print_report(report, made.count, options.to)


def search(arguments: list[str]) -> None:
    """Find images of an index by words, by an image, or both."""
    options = parse(SearchArguments, "search", arguments)
    from tercet.search.index import Index
    from tercet.search.search import Query, Searcher

    text = " ".join(options.text) or None
    query = Query(text, options.image, options.like, options.without, options.where, options.k, options.rerank)
    opened = Index.open(options.index)
    model = load_chosen(options.model or opened.model)
    if text and options.rerank != 0:
        warn_untrained_matching(model, "the order is the dual encoder's")
    hits = Searcher(opened, model).search(query)
    if options.html is not None:
        print(_write_page(options, opened, hits))
    elif options.json:
        print(json.dumps([dataclasses.asdict(hit) for hit in hits], ensure_ascii=False))
    elif not hits:
        print("no image found")
    else:
        drawn = not options.no_thumbnails and shows_pictures()
        _print_hits(hits, _pictures(opened, hits) if drawn else [])


def _pictures(index: Index, hits: list[Hit]) -> list[RenderableType]:
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


def _write_page(options: SearchArguments, index: Index, hits: list[Hit]) -> Path:
    from tercet.data.inputs import to_pixels
    from tercet.report.search_page import FoundImage, write_search_page
    from tercet.search.build import make_thumbnail

    thumbnails = index.thumbnails([hit.id for hit in hits] + ([options.like] if options.like else []))
    asked = {
        "words": " ".join(options.text),
        "image": options.image,
        "like": options.like,
        "without": options.without,
        "filter": options.where,
        "index": options.index,
    }
    image = make_thumbnail(to_pixels(options.image)) if options.image else thumbnails.get(options.like or "")
    found = [
        FoundImage(hit.id, hit.uri, hit.caption, hit.cosine, hit.match, hit.dual_rank, thumbnails.get(hit.id, b""))
        for hit in hits
    ]
    assert options.html is not None
    return write_search_page(found, {name: value for name, value in asked.items() if value}, options.html, image)


def _print_report(report: IndexReport, count: int, path: str) -> None:
    for line in report.skipped.lines(SHOWN_PROBLEMS):
        print(f"skipped: {line}", file=sys.stderr)
    words = [
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
    print(f"{path}: {count:,} images ({', '.join(words)}) in {report.seconds:.1f} s")
