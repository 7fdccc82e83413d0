"""The pages of a run and of a search: one HTML file each, which opens offline, in light and dark, on any screen."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tercet.files import write_atomic
from tercet.report.figures import run_chart
from tercet.report.html import count, figure, header, html_page, image, missing_section, number, plural, section, text
from tercet.report.run import Line, Run, is_finite, read_run

LOSSES = {
    "loss": "Total loss",
    "cma": "Cross-modal alignment",
    "imc": "Intra-modal contrast",
    "lmi": "Local-global information",
    "itm": "Image-text matching",
    "mlm": "Masked language modelling",
}
TRAINING = {
    "lr": "Learning rate",
    "temperature": "Temperature",
    "alpha": "Weight of soft targets",
    "grad_norm": "Gradient norm",
    "pairs_per_second": "Pairs per second",
}
UNSMOOTHED = ("lr", "temperature", "alpha")
OVER_TIME = {
    ("dual", "r_mean"): "Mean recall, dual encoder",
    ("reranked", "r_mean"): "Mean recall, re-ranked",
    ("embeddings", "alignment"): "Alignment (0 is best, 2 chance)",
    ("embeddings", "image_uniformity"): "Uniformity of images (lower is more spread)",
    ("embeddings", "text_uniformity"): "Uniformity of texts (lower is more spread)",
}
RECALLS = {"dual": "Dual encoder", "reranked": "Re-ranked"}
GROUPS = {**RECALLS, "embeddings": "Embedding metrics"}
CUTOFFS = (1, 5, 10)
MAX_QUERIES = 30
MAX_EVENTS = 200


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Whatever is absent (no evaluation yet, a killed run, half a last line of metrics) is named on the page.

    Raises:
        TercetError: there is no such run folder, or it cannot be written.
    """
    run = read_run(run_folder)
    known = {*LOSSES, *TRAINING, "kind", "step", "epoch", "time", "skipped"}
    others = dict.fromkeys(key for line in run.train for key in line if is_finite(line[key]) and key not in known)
    sections = [
        header("Tercet run", run.title, run_facts(run)),
        missing_section([(None, sentence) for sentence in run.missing]),
        _retrieval(run),
        _metrics(run),
        _gallery(run),
        _similarities(run),
        _heatmaps(run),
        _charts(run, "Losses", {**LOSSES, **{key: key.replace("_", " ").capitalize() for key in others}}),
        _charts(run, "Training", TRAINING),
        _events(run),
        _settings(run),
    ]
    return write_atomic(run.folder / "report.html", html_page(f"{run.title} – Tercet report", sections))


def run_facts(run: Run) -> dict[str, str | None]:
    """What the top of a report says of a run, as HTML."""
    data = run.config.get("data")
    sources = data.get("train") if isinstance(data, dict) else None
    last = run.train[-1] if run.train else {}
    seconds = run.seconds
    return {
        "Recipe": text(run.facts.get("recipe")),
        "Task": text(run.config.get("task")),
        "Data": escape(", ".join(map(str, sources))) if isinstance(sources, list) else None,
        "Pairs": count(run.facts.get("pairs")),
        "Steps": count(last.get("step")),
        "Epochs": number(last.get("epoch")),
        "Minutes": None if seconds is None else f"{seconds / 60:,.{1 if seconds < 6000 else 0}f}",
        "Parameters": count(run.facts.get("parameters")),
        "Machine": text(run.facts.get("machine")),
    }


def _retrieval(run: Run) -> str:
    tables = "".join(_recall_table(data, line) for data, line in run.last_evaluations.items() if line.keys() & RECALLS)
    panels = []
    for data in run.last_evaluations if tables else ():
        for (group, key), label in OVER_TIME.items():
            steps, values = run.evaluation_curve(data, group, key)
            if len(values) > 1:
                name = f"{label}, {data}"
                panels.append(_chart(name, "", run_chart(steps, values, name, smoothed=False, markers=True), values))
    charts = f"<div class=panels>{''.join(panels)}</div>" if panels else ""
    return section("Retrieval", f"<div class=tables>{tables}</div>{charts}" if tables else "")


def _recall_table(data: str, line: Line) -> str:
    size = line.get("size")
    images, texts = (size.get("images"), size.get("texts")) if isinstance(size, dict) else (None, None)
    columns = [(label, line[group]) for group, label in RECALLS.items() if isinstance(line.get(group), dict)]
    if isinstance(images, int) and isinstance(texts, int) and images > 0 and texts > 0:
        columns.append(("Chance", chance_recall(images, texts)))
        note = f"{plural(images, 'image')}, {plural(texts, 'caption')}; percent"
    else:
        note = "percent; chance unknown, since the evaluation does not state its number of images"
    rows = ""
    for side, direction in (("text", "Image → text"), ("image", "Text → image")):
        rows += f"<tr class=group><th colspan={len(columns) + 1} scope=rowgroup>{direction}</th></tr>"
        for k in CUTOFFS:
            rows += f"<tr><th scope=row>R@{k}</th>{_percents(columns, f'{side}_r{k}')}</tr>"
    rows += f"<tr class=mean><th scope=row>Mean</th>{_percents(columns, 'r_mean')}</tr>"
    head = "".join(f"<th scope=col>{label}</th>" for label, _ in columns)
    return (
        f"<div><h3>{_evaluated(data, line)} <small>{note}</small></h3>"
        f"<table class=recall><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def chance_recall(images: int, texts: int) -> dict[str, float]:
    """Recall in percent of a random ranking, when every image has the same number of captions."""
    own = max(1, round(texts / images))
    others = texts - own
    recall: dict[str, float] = {}
    for k in CUTOFFS:
        recall[f"image_r{k}"] = 100 * min(1.0, k / images)
        missed = math.comb(others, k) / math.comb(texts, k) if k <= others else 0.0
        recall[f"text_r{k}"] = 100 * (1 - missed)
    recall["r_mean"] = sum(recall.values()) / len(recall)
    return recall


def _percents(columns: Sequence[tuple[str, Line]], key: str) -> str:
    cells = ""
    for _, values in columns:
        value = values.get(key)
        if is_finite(value):
            shown = f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2f}"
            cells += f'<td>{shown}<i style="width:{min(max(float(value), 0), 100):.1f}%"></i></td>'
        else:
            cells += "<td>–</td>"
    return cells


def _evaluated(data: str, line: Line) -> str:
    step = f" after step {count(line['step'])}" if is_finite(line.get("step")) else ""
    return f"{escape(data).capitalize()} data{step}"


def _metrics(run: Run) -> str:
    """Tables of everything that evaluations measured beside recall."""
    tables = ""
    for data, line in run.last_evaluations.items():
        size = line.get("size")
        counts = [(key, value) for key, value in size.items() if is_finite(value)] if isinstance(size, dict) else []
        note = ", ".join(f"{count(value)} {escape(str(key))}" for key, value in counts)
        for group, numbers in line.items():
            if not isinstance(numbers, dict) or group in RECALLS or group == "size":
                continue
            rows = "".join(
                f"<tr><th scope=row>{escape(key.replace('_', ' '))}</th><td>{number(value)}</td></tr>"
                for key, value in numbers.items()
                if is_finite(value)
            )
            name = escape(GROUPS.get(group, group)).lower()
            tables += (
                f"<div><h3>{_evaluated(data, line)}: {name} <small>{note}</small></h3>"
                f"<table class=recall><tbody>{rows}</tbody></table></div>"
            )
    return section("Metrics", f"<div class=tables>{tables}</div>" if tables else "")


def _gallery(run: Run) -> str:
    """Queries with the images that were retrieved, failures first."""
    ranks = [entry["rank"] if _is_rank(entry.get("rank")) else math.inf for entry in run.gallery]
    order = sorted(range(len(ranks)), key=lambda i: -ranks[i])
    cards = "".join(_gallery_card(run.gallery[i]) for i in order[:MAX_QUERIES])
    more = f"; the {MAX_QUERIES} worst are shown" if len(order) > MAX_QUERIES else ""
    first = sum(rank == 1 for rank in ranks)
    return section(
        "Retrieval examples",
        f"<div class=gallery>{cards}</div>" if cards else "",
        f"failures first; {first:,} of {plural(len(ranks), 'query', 'queries')} with the right image first{more}",
        "A query and the images retrieved for it, best first, with their scores. "
        "The right image has a thick frame and a tick.",
    )


def _gallery_card(entry: Line) -> str:
    rank = entry.get("rank")
    found = (
        "rank unknown" if not _is_rank(rank) else "right image first" if rank == 1 else f"right image at rank {rank:,}"
    )
    results = ""
    for result in entry["results"]:
        if not isinstance(result, dict):
            continue
        key, right = text(result.get("key")) or "", bool(result.get("right"))
        score = f"{result['score']:.3f}" if is_finite(result.get("score")) else "–"
        tick = '<span class=tick title="the right image">✓</span>' if right else ""
        results += (
            f'<li{" class=right" if right else ""} title="{key}">{image(result.get("thumbnail"), key)}{tick}'
            f"<span class=score>{score}</span></li>"
        )
    return (
        f"<article class={'hit' if rank == 1 else 'miss'}><h3>{text(entry.get('query')) or 'no query'}</h3>"
        f"<p class=rank>{found}</p><ol>{results}</ol></article>"
    )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _similarities(run: Run) -> str:
    """Every caption of some pairs with every image of theirs, as a table of coloured cells."""
    captions, images, cosines = (run.similarity.get(key) for key in ("captions", "thumbnails", "cosines"))
    if not (isinstance(captions, list) and isinstance(images, list) and isinstance(cosines, list)):
        return ""
    values = [value for row in cosines if isinstance(row, list) for value in row if is_finite(value)]
    if len(values) != len(captions) * len(images) or not values:
        return ""
    low, span = min(values), (max(values) - min(values)) or 1.0
    head = "".join(f"<th scope=col>{image(url, f'image {number}')}</th>" for number, url in enumerate(images, 1))
    rows, found = "", 0
    for pair, (caption, row) in enumerate(zip(captions, cosines, strict=True)):
        best = max(range(len(row)), key=row.__getitem__)
        found += best == pair
        rows += f"<tr><th scope=row>{text(caption)}</th>"
        for column, value in enumerate(row):
            fraction = (value - low) / span
            marks = {"own": column == pair, "best": column == best, "strong": fraction > 0.7}
            classes = " ".join(name for name, on in marks.items() if on)
            shown = f"{value:.2f}".replace("0.", ".", 1).replace("-.00", ".00")
            rows += f'<td class="{classes}" style="--strength:{100 * fraction:.0f}%">{shown}</td>'
        rows += "</tr>"
    table = f"<table class=matrix><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return section(
        "Similarities",
        f"<div class=scroll>{table}</div>",
        f"cosines by the dual encoder; {found} of {plural(len(captions), 'caption')} are nearest to their own image",
        "One row per caption, one column per image; pairs are on the diagonal (framed). The highest of a row is "
        "underlined.",
    )


def _heatmaps(run: Run) -> str:
    """Where the model sees the words of a caption."""
    cards = ""
    for entry in run.heatmaps:
        words = entry.get("words")
        parts = [("image", entry.get("thumbnail")), ("whole caption", entry.get("overlay"))]
        if isinstance(words, list):
            parts += [(word.get("word"), word.get("overlay")) for word in words if isinstance(word, dict)]
        figures = "".join(
            f"<li>{image(url, str(name))}<span class=score>{text(name) or ''}</span></li>" for name, url in parts
        )
        cards += f"<article><h3>{text(entry.get('query')) or 'no caption'}</h3><ol>{figures}</ol></article>"
    return section(
        "Attention heatmaps",
        f"<div class=maps>{cards}</div>" if cards else "",
        "attention times its positive gradient, for a match",
        "The image, the whole caption, and its words one by one; the model attends to what is bright. Each map is "
        "scaled by its own range, so brightness does not compare between maps.",
    )


def _charts(run: Run, title: str, names: Mapping[str, str]) -> str:
    panels = []
    for key, name in names.items():
        steps, values = run.curve(key)
        if len(values):
            svg = run_chart(steps, values, f"{name} by step", smoothed=key not in UNSMOOTHED)
            panels.append(_chart(name, key, svg, values))
    note = "thin: as logged; thick: moving average" if title == "Losses" else "by step"
    return section(title, f"<div class=panels>{''.join(panels)}</div>" if panels else "", note)


def _chart(name: str, key: str, svg: str, values: np.ndarray) -> str:
    change = f"{number(values[0])} → <b>{number(values[-1])}</b>" if len(values) > 1 else f"<b>{number(values[0])}</b>"
    return figure(name, key, svg, f"<span class=last>{change}</span>")


def _events(run: Run) -> str:
    rows = "".join(
        f"<tr><td>{count(line.get('step')) or '–'}</td><td>{_clock(line.get('time'))}</td>"
        f"<td class=message>{text(line.get('message')) or ''}</td></tr>"
        for line in run.events[-MAX_EVENTS:]
    )
    head = "<tr><th>Step</th><th>Time (UTC)</th><th>Event</th></tr>"
    table = f"<div class=scroll><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>" if rows else ""
    skipped = f"<p>{plural(run.skipped, 'broken sample')} skipped while training.</p>" if run.skipped else ""
    earlier = len(run.events) - MAX_EVENTS
    note = f"the last {MAX_EVENTS}; {earlier:,} earlier ones are in metrics.jsonl" if earlier > 0 else ""
    return section("Events", skipped + table, note)


def _settings(run: Run) -> str:
    shown = f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"
    return section("Settings", shown if run.config_text else "")


def _clock(time: object) -> str:
    if isinstance(time, int | float) and is_finite(time) and 0 <= time < 2**35:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"
    return "–"


class SearchResult(NamedTuple):
    """An image that a search found; `match` is None where it was not re-ranked, `thumbnail` is JPEG."""

    id: str
    uri: str
    caption: str | None
    cosine: float
    match: float | None
    dual_rank: int
    thumbnail: bytes


def write_search_page(
    results: Sequence[SearchResult], query: Mapping[str, str], path: str | Path, picture: bytes | None = None
) -> Path:
    """Write the images that a search found as one page.

    Args:
        results: the best first.
        query: the parts of the query by name, such as {"words": "a dog"}.
        path: the HTML file.
        picture: JPEG of the image in the query.

    Raises:
        TercetError: the file cannot be written.
    """
    title = query.get("words") or "Similar images"
    facts = {escape(name): escape(value) for name, value in query.items() if name != "words"}
    asked = f'<p class=query><img src="{_data_url(picture)}" alt="the image in the query"></p>' if picture else ""
    cards = "".join(_search_card(rank, result) for rank, result in enumerate(results, 1))
    sections = [
        header("Tercet search", title, facts) + asked,
        section(
            plural(len(results), "image"), f"<div class=found>{cards}</div>" if cards else "<p>No image found.</p>"
        ),
        "<p class=legend>match: probability by the fusion encoder · cosine: by the dual encoder, with its rank by that "
        "alone</p>",
    ]
    return write_atomic(path, html_page(f"{title} – Tercet search", sections))


def _search_card(rank: int, result: SearchResult) -> str:
    numbers = f"<b>{result.cosine:.3f}</b><span>rank {result.dual_rank}</span>"
    if result.match is not None:
        numbers = f"<b>{100 * result.match:.1f} %</b><span>cosine {result.cosine:.3f}, rank {result.dual_rank}</span>"
    caption = f"<p class=caption>{escape(result.caption)}</p>" if result.caption else ""
    return (
        f'<figure id="rank-{rank}">{image(_data_url(result.thumbnail), result.caption or result.uri)}'
        f"<figcaption><div class=numbers>{numbers}</div>{caption}"
        f"<p class=uri>{escape(result.uri)}<br>{escape(result.id)}</p></figcaption></figure>"
    )


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
