"""The report of a run: one HTML file that opens offline, in light and dark, on a telephone and on a desk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from tercet.files import write_atomic
from tercet.report.figures import curve_svg
from tercet.report.pictures import gallery, heatmaps, similarity
from tercet.report.record import Line, RunRecord, finite, read_run
from tercet.report.style import STYLE
from tercet.report.words import clock, count, minutes, number, percent, plural, text
from tercet.version import __version__

LOSSES = {
    "loss": "Total loss",
    "cma": "Cross-modal alignment",
    "imc": "Intra-modal contrast",
    "lmi": "Local-global information",
    "itm": "Image-text matching",
    "mlm": "Masked language modelling",
}
MEASURES = {
    "lr": "Learning rate",
    "temperature": "Temperature",
    "alpha": "Weight of soft targets",
    "grad_norm": "Gradient norm",
    "pairs_per_second": "Pairs per second",
}
OVER_TIME = {
    ("dual", "r_mean"): "Mean recall, dual encoder",
    ("reranked", "r_mean"): "Mean recall, re-ranked",
    ("space", "alignment"): "Alignment (0 is best, 2 chance)",
    ("space", "image_uniformity"): "Uniformity of images (lower is more spread)",
    ("space", "text_uniformity"): "Uniformity of texts (lower is more spread)",
}
UNSMOOTHED = ("lr", "temperature", "alpha")
KNOWN_KEYS = {*LOSSES, *MEASURES, "kind", "step", "epoch", "time", "skipped"}
CUTOFFS = (1, 5, 10)
RECALL_GROUPS = {"dual", "reranked"}
MAX_EVENTS = 200
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the page can ask nothing of any network


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Whatever part is absent (no evaluation yet, a killed run, half a last line of metrics) is named on the page.

    Raises:
        TercetError: there is no such run folder, or it cannot be written.
    """
    record = read_run(run_folder)
    title = record.title
    sections = (
        _header(record, title),
        _missing(record),
        _recall(record),
        _measures(record),
        gallery(record),
        similarity(record),
        heatmaps(record),
        _panels(record, "Losses", {**LOSSES, **_further_losses(record)}),
        _panels(record, "Training", MEASURES),
        _events(record),
        _config(record),
    )
    return write_atomic(record.folder / "report.html", html_page(title, sections))


def html_page(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} – Tercet report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Tercet {escape(__version__)} · written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _header(record: RunRecord, title: str) -> str:
    facts = record.facts
    rows = [
        ("Recipe", text(facts.get("recipe"))),
        ("Task", text(record.config.get("task"))),
        ("Data", _data(record)),
        ("Pairs", count(facts.get("pairs"))),
        ("Steps", count(record.train[-1]["step"]) if record.train else None),
        ("Epochs", number(record.train[-1].get("epoch")) if record.train else None),
        ("Minutes", minutes(record.seconds)),
        ("Parameters", count(facts.get("parameters"))),
        ("Machine", text(facts.get("machine"))),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows if value is not None)
    return f"<header><p class=kicker>Tercet run</p><h1>{escape(title)}</h1><dl class=facts>{cells}</dl></header>"


def _missing(record: RunRecord) -> str:
    if not record.missing:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in record.missing)
    return f"<aside><h2>What this report lacks</h2><ul>{items}</ul></aside>"


def _latest(record: RunRecord) -> dict[str, Line]:
    """The last evaluation of each data."""
    return {str(line.get("data", "evaluation")): line for line in record.evaluations}


def _measures(record: RunRecord) -> str:
    """Tables of the evaluations of downstream tasks."""
    tables = "".join(
        _measure_table(name, line, group, numbers)
        for name, line in _latest(record).items()
        for group, numbers in line.items()
        if isinstance(numbers, dict) and group not in RECALL_GROUPS and group != "size"
    )
    return f"<section><h2>Measures</h2><div class=tables>{tables}</div></section>" if tables else ""


def _measure_table(name: str, line: Line, group: str, numbers: Line) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(key.replace('_', ' '))}</th><td>{number(value)}</td></tr>"
        for key, value in numbers.items()
        if finite(value)
    )
    sizes = line.get("size")
    counted = sizes.items() if isinstance(sizes, dict) else ()
    size = ", ".join(f"{count(number_of)} {escape(str(what))}" for what, number_of in counted if finite(number_of))
    step = f" after step {count(line['step'])}" if finite(line.get("step")) else ""
    return (
        f"<div><h3>{escape(name).capitalize()} data{step}: {escape(group)} <small>{size}</small></h3>"
        f"<table class=recall><tbody>{rows}</tbody></table></div>"
    )


def _recall(record: RunRecord) -> str:
    latest = {name: line for name, line in _latest(record).items() if line.keys() & RECALL_GROUPS}
    if not latest:
        return ""
    tables = "".join(_recall_table(name, line) for name, line in latest.items())
    return f"<section><h2>Retrieval</h2><div class=tables>{tables}</div>{_recall_curves(record)}</section>"


def _recall_table(name: str, line: Line) -> str:
    counted = line.get("size")
    images, texts = (counted.get("images"), counted.get("texts")) if isinstance(counted, dict) else (None, None)
    columns = [
        (label, line[key])
        for key, label in (("dual", "Dual encoder"), ("reranked", "Re-ranked"))
        if isinstance(line.get(key), dict)
    ]
    if isinstance(images, int) and isinstance(texts, int) and images > 0 and texts > 0:
        columns.append(("Chance", chance_recall(images, texts)))
        size = f"{plural(images, 'image')}, {plural(texts, 'caption')}; percent"
    else:
        size = "percent; chance unknown, as the evaluation does not tell its number of images"
    rows = ""
    for side, direction in (("text", "Image → text"), ("image", "Text → image")):
        rows += f"<tr class=group><th colspan={len(columns) + 1} scope=rowgroup>{direction}</th></tr>"
        for k in CUTOFFS:
            rows += f"<tr><th scope=row>R@{k}</th>{_recall_cells(columns, f'{side}_r{k}')}</tr>"
    rows += f"<tr class=mean><th scope=row>Mean</th>{_recall_cells(columns, 'r_mean')}</tr>"
    head = "".join(f"<th scope=col>{label}</th>" for label, _ in columns)
    step = f" after step {count(line['step'])}" if finite(line.get("step")) else ""
    return (
        f"<div><h3>{escape(name).capitalize()} data{step} <small>{size}</small></h3>"
        f"<table class=recall><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _recall_cells(columns: list[tuple[str, Line]], key: str) -> str:
    return "".join(f"<td>{percent(values.get(key))}</td>" for _, values in columns)


def chance_recall(images: int, texts: int) -> dict[str, float]:
    """Recall in percent of a random ranking, when every image has the same number of captions."""
    own = max(1, round(texts / images))
    recall: dict[str, float] = {}
    for k in CUTOFFS:
        recall[f"image_r{k}"] = 100 * min(1.0, k / images)
        others = texts - own
        missed = math.comb(others, k) / math.comb(texts, k) if k <= others else 0.0
        recall[f"text_r{k}"] = 100 * (1 - missed)
    recall["r_mean"] = sum(recall.values()) / len(recall)
    return recall


def _recall_curves(record: RunRecord) -> str:
    """Recall and the shape of the shared space over the steps, for data that was evaluated more than once."""
    panels = []
    for data in dict.fromkeys(str(line.get("data", "evaluation")) for line in record.evaluations):
        for (group, key), label in OVER_TIME.items():
            steps, values = record.evaluation_series(data, group, key)
            if len(values) > 1:
                name = f"{label}, {data}"
                panels.append(_panel(name, "", curve_svg(steps, values, name, smoothed=False, markers=True), values))
    return f"<div class=panels>{''.join(panels)}</div>" if panels else ""


def _further_losses(record: RunRecord) -> dict[str, str]:
    """Numbers in the training lines that this page has no name for, such as the losses of other tasks."""
    keys = dict.fromkeys(key for line in record.train for key in line if finite(line[key]) and key not in KNOWN_KEYS)
    return {key: key.replace("_", " ").capitalize() for key in keys}


def _panels(record: RunRecord, title: str, names: dict[str, str]) -> str:
    panels = []
    for key, name in names.items():
        steps, values = record.series(key)
        if len(values):
            svg = curve_svg(steps, values, f"{name} by step", smoothed=key not in UNSMOOTHED)
            panels.append(_panel(name, key, svg, values))
    if not panels:
        return ""
    note = "thin: as logged; bold: moving average" if title == "Losses" else "by step"
    return f"<section><h2>{title} <small>{note}</small></h2><div class=panels>{''.join(panels)}</div></section>"


def _panel(name: str, key: str, svg: str, values: np.ndarray) -> str:
    code = f" <code>{escape(key)}</code>" if key else ""
    change = f"{number(values[0])} → <b>{number(values[-1])}</b>" if len(values) > 1 else f"<b>{number(values[0])}</b>"
    caption = f"<span>{escape(name)}{code}</span><span class=last>{change}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _events(record: RunRecord) -> str:
    if not record.events and not record.skipped:
        return ""
    rows = "".join(
        f"<tr><td>{count(line.get('step')) or '–'}</td><td>{clock(line.get('time'))}</td>"
        f"<td class=message>{text(line.get('message')) or ''}</td></tr>"
        for line in record.events[-MAX_EVENTS:]
    )
    table = (
        "<div class=scroll><table><thead><tr><th>Step</th><th>Time (UTC)</th><th>What happened</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        if rows
        else ""
    )
    skipped = f"<p>{plural(record.skipped, 'broken sample')} skipped while training.</p>" if record.skipped else ""
    earlier = len(record.events) - MAX_EVENTS
    note = (
        f" <small>the last {MAX_EVENTS}; {earlier:,} earlier ones are in metrics.jsonl</small>" if earlier > 0 else ""
    )
    return f"<section><h2>Events{note}</h2>{skipped}{table}</section>"


def _config(record: RunRecord) -> str:
    if not record.config_text:
        return ""
    return (
        "<section><h2>Settings</h2><details><summary>config.yaml in full</summary>"
        f"<pre>{escape(record.config_text)}</pre></details></section>"
    )


def _data(record: RunRecord) -> str | None:
    data = record.config.get("data")
    sources = data.get("train") if isinstance(data, dict) else None
    return escape(", ".join(map(str, sources))) if isinstance(sources, list) and sources else None
