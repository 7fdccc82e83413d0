"""The parts of the report that show pictures: searches, the matrix of similarities, and heatmaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from tercet.report.figures import THUMBNAIL, rank_words
from tercet.report.record import Line, RunRecord, finite
from tercet.report.words import is_rank, plural, text

MAX_QUERIES = 30


def gallery(record: RunRecord) -> str:
    if not record.gallery:
        return ""
    ranks = [entry["rank"] if is_rank(entry.get("rank")) else math.inf for entry in record.gallery]
    order = sorted(range(len(ranks)), key=lambda i: -ranks[i])
    shown = order[:MAX_QUERIES]
    first = sum(rank == 1 for rank in ranks)
    left_out = f"; the {MAX_QUERIES} worst are shown" if len(order) > len(shown) else ""
    note = f"failures first; {first:,} of {plural(len(ranks), 'query', 'queries')} found first{left_out}"
    cards = "".join(_card(record.gallery[i]) for i in shown)
    return (
        f"<section><h2>Searches <small>{note}</small></h2>"
        "<p class=legend>A query, and the images found for it, best first, each with its score. "
        "The right image has a thick frame and a tick.</p>"
        f"<div class=gallery>{cards}</div></section>"
    )


def _card(entry: Line) -> str:
    rank = entry.get("rank")
    state = "hit" if rank == 1 else "miss"
    results = "".join(_result(result) for result in entry["results"] if isinstance(result, dict))
    return (
        f"<article class={state}><h3>{text(entry.get('query')) or 'no query'}</h3>"
        f"<p class=rank>{rank_words(rank)}</p><ol>{results}</ol></article>"
    )


def _result(result: Line) -> str:
    right = bool(result.get("right"))
    key = text(result.get("key")) or ""
    thumbnail = result.get("thumbnail")
    if isinstance(thumbnail, str) and THUMBNAIL.fullmatch(thumbnail):
        picture = f'<img src="{thumbnail}" alt="{key}" loading="lazy">'
    else:
        picture = "<span class=blank>no picture</span>"
    tick = '<span class=tick title="the right image">✓</span>' if right else ""
    score = f"{result['score']:.3f}" if finite(result.get("score")) else "–"
    return f'<li{" class=right" if right else ""} title="{key}">{picture}{tick}<span class=score>{score}</span></li>'


def similarity(record: RunRecord) -> str:
    """Every caption of some pairs with every image of theirs, as a table of coloured cells."""
    matrix = record.similarity
    captions, thumbnails, cosines = (matrix.get(key) for key in ("captions", "thumbnails", "cosines"))
    if not (isinstance(captions, list) and isinstance(thumbnails, list) and isinstance(cosines, list)):
        return ""
    values = [value for row in cosines if isinstance(row, list) for value in row if finite(value)]
    if len(values) != len(captions) * len(thumbnails) or not values:
        return ""
    low, high = min(values), max(values)
    head = "".join(f"<th scope=col>{_image(url, f'image {number}')}</th>" for number, url in enumerate(thumbnails, 1))
    rows = ""
    for place, (caption, row) in enumerate(zip(captions, cosines, strict=True)):
        best = max(range(len(row)), key=row.__getitem__)
        cells = "".join(_cell(value, low, high, column == place, column == best) for column, value in enumerate(row))
        rows += f"<tr><th scope=row>{text(caption)}</th>{cells}</tr>"
    found = sum(max(range(len(row)), key=row.__getitem__) == place for place, row in enumerate(cosines))
    return (
        f"<section><h2>Similarities <small>cosines by the dual encoder; {found} of {plural(len(captions), 'caption')} "
        "are nearest to their own image</small></h2><p class=legend>A row a caption, a column an image; a pair stands "
        "on the diagonal (framed). The highest of a row is underlined.</p>"
        f"<div class=scroll><table class=matrix><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
        "</div></section>"
    )


def _cell(value: float, low: float, high: float, own: bool, best: bool) -> str:
    share = (value - low) / (high - low) if high > low else 0.0
    words = f"{value:.2f}".replace("0.", ".", 1).replace("-.00", ".00")
    classes = " ".join(name for name, on in (("own", own), ("best", best), ("strong", share > 0.7)) if on)
    return f'<td class="{classes}" style="--share:{100 * share:.0f}%">{words}</td>'


def heatmaps(record: RunRecord) -> str:
    """Where the model sees the words of a caption."""
    cards = "".join(_heatmap(entry) for entry in record.heatmaps)
    if not cards:
        return ""
    return (
        "<section><h2>Where it looks <small>attention times its positive gradient, of a match</small></h2>"
        "<p class=legend>The image, the whole caption, and its words one by one; bright is where it looks. Each map "
        "runs from its own least to its own greatest value, so brightness does not compare between maps.</p>"
        f"<div class=maps>{cards}</div></section>"
    )


def _heatmap(entry: Mapping[str, Any]) -> str:
    words = entry.get("words")
    parts = [("image", entry.get("thumbnail")), ("whole caption", entry.get("overlay"))]
    if isinstance(words, list):
        parts += [(word.get("word"), word.get("overlay")) for word in words if isinstance(word, dict)]
    figures = "".join(
        f"<li>{_image(url, str(name))}<span class=score>{text(name) or ''}</span></li>" for name, url in parts
    )
    return f"<article><h3>{text(entry.get('query')) or 'no caption'}</h3><ol>{figures}</ol></article>"


def _image(url: object, name: str) -> str:
    if isinstance(url, str) and THUMBNAIL.fullmatch(url):
        return f'<img src="{url}" alt="{escape(name)}" loading="lazy">'
    return "<span class=blank>no picture</span>"
