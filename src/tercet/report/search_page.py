"""The images that a search found, as one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tercet.files import write_atomic
from tercet.report.style import STYLE

CARDS = """
.found { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 165px), 1fr)); }
.found figure { padding: 0; overflow: hidden; display: flex; flex-direction: column; }
.found img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line); }
.found figcaption { display: block; padding: .6rem .75rem .7rem; font-weight: 400; font-size: .85rem; }
.found .numbers { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 .6rem;
  font-variant-numeric: tabular-nums; }
.found .numbers b { font-size: .95rem; white-space: nowrap; }
.found .numbers span { color: var(--soft); font-size: .78rem; white-space: nowrap; }
.found .caption { margin: .3rem 0 0; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
  overflow: hidden; overflow-wrap: anywhere; }
.found .place { margin: .3rem 0 0; color: var(--soft); font-size: .75rem; overflow-wrap: anywhere; }
.query img { height: 110px; border-radius: 6px; outline: 1px solid var(--line); }
"""


@dataclass(frozen=True)
class FoundImage:
    """An image to show.

    Attributes:
        id: in the index.
        uri: where it lies.
        caption: what came with it.
        cosine: by the dual encoder.
        match: the probability of a match, None where the fusion encoder did not look.
        dual_rank: place by the dual encoder alone.
        thumbnail: JPEG.
    """

    id: str
    uri: str
    caption: str | None
    cosine: float
    match: float | None
    dual_rank: int
    thumbnail: bytes


def write_search_page(
    found: Sequence[FoundImage], asked: Mapping[str, str], path: str | Path, image: bytes | None = None
) -> Path:
    """Write the gallery of a search.

    Args:
        found: the best first.
        asked: what was looked for: words by their meaning, such as {"words": "a dog"}.
        path: the HTML file.
        image: JPEG of the image that was looked for.

    Raises:
        TercetError: the file cannot be written.
    """
    title = escape(asked.get("words") or "Images like one")
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in asked.items()
        if name != "words"
    )
    picture = (
        f'<p class="query"><img src="{_data_url(image)}" alt="the image that was looked for"></p>' if image else ""
    )
    cards = "".join(_card(rank, one) for rank, one in enumerate(found, 1))
    body = f'<div class="found">{cards}</div>' if found else "<p>No image was found.</p>"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{CARDS}</style></head><body><main>"
        f'<p class="kicker">Tercet search</p><h1>{title}</h1><dl class="facts">{facts}</dl>{picture}'
        f"<h2>{len(found):,} {'image' if len(found) == 1 else 'images'}</h2>{body}"
        "<footer>match: probability by the fusion encoder · cosine: by the dual encoder, "
        "with its place by that alone</footer></main></body></html>\n"
    )
    return write_atomic(path, page)


def _card(rank: int, one: FoundImage) -> str:
    first = f"<b>{100 * one.match:.1f} %</b>" if one.match is not None else f"<b>{one.cosine:.3f}</b>"
    second = f"cosine {one.cosine:.3f}, place {one.dual_rank}" if one.match is not None else f"place {one.dual_rank}"
    caption = f'<p class="caption">{escape(one.caption)}</p>' if one.caption else ""
    alt = escape(one.caption or one.uri, quote=True)
    return (
        f'<figure id="rank-{rank}"><img loading="lazy" src="{_data_url(one.thumbnail)}" alt="{alt}">'
        f'<figcaption><div class="numbers">{first}<span>{second}</span></div>{caption}'
        f'<p class="place">{escape(one.uri)}<br>{escape(one.id)}</p></figcaption></figure>'
    )


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
