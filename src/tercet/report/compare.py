"""Several runs on one page: what they reached, how they went, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tercet.errors import TercetError
from tercet.files import write_atomic
from tercet.report.figures import RUN_COLOURS, curves_svg
from tercet.report.page import CUTOFFS, LOSSES, MEASURES, OVER_TIME, UNSMOOTHED, html_page
from tercet.report.record import RunRecord, finite, read_run
from tercet.report.words import count, minutes, number, plural, text

# Settings that name a run instead of shaping it.
NAMES = ("name", "output")
GROUPS = {"dual": "dual encoder", "reranked": "re-ranked"}
METRICS = {
    "r_mean": "mean",
    **{f"text_r{k}": f"image → text R@{k}" for k in CUTOFFS},
    **{f"image_r{k}": f"text → image R@{k}" for k in CUTOFFS},
    "text_r_mean": "image → text, mean",
    "image_r_mean": "text → image, mean",
}
LOWER_IS_BETTER = ("alignment", "image_uniformity", "text_uniformity", "modality_gap")

Reached = dict[tuple[str, str, str], float]


def write_comparison(run_folders: Sequence[str | Path], file: str | Path) -> Path:
    """Write one page that lays runs beside one another.

    Args:
        run_folders: two or more.
        file: the HTML file to write.

    Raises:
        TercetError: fewer than two, no such run folder, or the file cannot be written.
    """
    if len(run_folders) < 2:
        raise TercetError("a comparison needs two runs at least")
    if len({Path(folder).resolve() for folder in run_folders}) < len(run_folders):
        raise TercetError("a run stands twice; name each once")
    records = [read_run(folder) for folder in run_folders]
    names = _names(records)
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs"
    sections = (
        f"<header><p class=kicker>Tercet runs</p><h1>{escape(title)}</h1></header>",
        _missing(records, names),
        _facts(records, names),
        _reached(records, names),
        _differences(records, names),
        _curves(records, names, "Losses", LOSSES, "moving averages"),
        _over_time(records, names),
        _curves(records, names, "Training", MEASURES, "by step"),
    )
    return write_atomic(file, html_page(title, sections))


def _names(records: Sequence[RunRecord]) -> list[str]:
    """What each run is called here: its folder's name, with more of the path where that does not tell them apart."""
    paths = [record.folder.resolve() for record in records]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [str(Path(*path.parts[-depth:])) for path in paths]


def _missing(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    sentences = [
        f"<li>{escape(name)}: {escape(sentence)}</li>"
        for record, name in zip(records, names, strict=True)
        for sentence in record.missing
    ]
    return f"<aside><h2>What is missing</h2><ul>{''.join(sentences)}</ul></aside>" if sentences else ""


def _table(names: Sequence[str], rows: str) -> str:
    head = "".join(f"<th scope=col>{_key(place)}{escape(name)}</th>" for place, name in enumerate(names))
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return f"<div class=scroll><table class=runs>{head}<tbody>{rows}</tbody></table></div>"


def _key(place: int) -> str:
    return f'<i class=key style="background:var(--run-{place % len(RUN_COLOURS) + 1})"></i>'


def _facts(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    facts = {
        "Recipe": [text(record.facts.get("recipe")) for record in records],
        "Pairs": [count(record.facts.get("pairs")) for record in records],
        "Steps": [count(record.train[-1]["step"]) if record.train else None for record in records],
        "Epochs": [number(record.train[-1].get("epoch")) if record.train else None for record in records],
        "Minutes": [minutes(record.seconds) for record in records],
        "Parameters": [count(record.facts.get("parameters")) for record in records],
        "Machine": [text(record.facts.get("machine")) for record in records],
    }
    rows = "".join(_row(name, values) for name, values in facts.items() if any(values))
    return f"<section><h2>Runs</h2>{_table(names, rows)}</section>"


def _row(name: str, values: Sequence[str | None], best: Sequence[bool] = ()) -> str:
    marks = [" class=top" if place < len(best) and best[place] else "" for place in range(len(values))]
    cells = "".join(f"<td{mark}>{value or '–'}</td>" for value, mark in zip(values, marks, strict=True))
    return f"<tr><th scope=row>{name}</th>{cells}</tr>"


def _measured(record: RunRecord) -> Reached:
    """The last evaluation of each data: `(data, group, metric)` to its value."""
    latest = {str(line.get("data", "evaluation")): line for line in record.evaluations}
    return {
        (data, group, metric): float(value)
        for data, line in latest.items()
        for group, numbers in line.items()
        if isinstance(numbers, dict) and group != "size"
        for metric, value in numbers.items()
        if finite(value)
    }


def _reached(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    reached = [_measured(record) for record in records]
    rows, heading = "", None
    for key in dict.fromkeys(key for own in reached for key in own):
        data, group, metric = key
        if (data, group) != heading:
            heading = (data, group)
            title = f"{data} data: {GROUPS.get(group, group)}"
            rows += f"<tr class=group><th colspan={len(names) + 1}>{escape(title)}</th></tr>"
        values = [own.get(key) for own in reached]
        there = [value for value in values if value is not None]
        best = min(there) if metric in LOWER_IS_BETTER else max(there)
        tops = [value == best and len(set(there)) > 1 for value in values]
        rows += _row(
            escape(METRICS.get(metric, metric.replace("_", " "))),
            [None if v is None else number(v) for v in values],
            tops,
        )
    if not rows:
        return ""
    note = "the last evaluation of each; the best of a row is bold"
    return f"<section><h2>Reached <small>{note}</small></h2>{_table(names, rows)}</section>"


def _differences(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    settings = [dict(_leaves(record.config)) for record in records]
    keys = dict.fromkeys(key for own in settings for key in own)
    rows = "".join(
        _row(f"<code>{escape(key)}</code>", [_setting(own, key) for own in settings])
        for key in keys
        if key not in NAMES and len({repr(own.get(key)) for own in settings}) > 1
    )
    same = sum(len({repr(own.get(key)) for own in settings}) == 1 for key in keys)
    note = f"{plural(same, 'setting')} of the config {'is' if same == 1 else 'are'} the same"
    body = _table(names, rows) if rows else "<p>None.</p>"
    return f"<section><h2>Settings that differ <small>{note}</small></h2>{body}</section>"


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(own: Mapping[str, Any], key: str) -> str:
    if key not in own:
        return "–"
    value = own[key]
    shown = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return f"<code>{escape(shown)}</code>"


def _curves(
    records: Sequence[RunRecord], names: Sequence[str], title: str, wanted: Mapping[str, str], note: str
) -> str:
    panels = []
    for key, name in wanted.items():
        curves = [(place, *record.series(key)) for place, record in enumerate(records)]
        shown = [curve for curve in curves if len(curve[1])]
        if shown:
            svg = curves_svg(shown, f"{name} by step", smoothed=key not in UNSMOOTHED)
            panels.append(f"<figure><figcaption><span>{name} <code>{key}</code></span></figcaption>{svg}</figure>")
    return _section(names, title, note, panels)


def _over_time(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    panels = []
    for data in dict.fromkeys(str(line.get("data")) for record in records for line in record.evaluations):
        for (group, key), label in OVER_TIME.items():
            curves = [(place, *record.evaluation_series(data, group, key)) for place, record in enumerate(records)]
            shown = [curve for curve in curves if len(curve[1])]
            if any(len(curve[1]) > 1 for curve in shown):
                svg = curves_svg(shown, f"{label}, {data}", smoothed=False)
                caption = f"<span>{escape(label)}, {escape(data)}</span>"
                panels.append(f"<figure><figcaption>{caption}</figcaption>{svg}</figure>")
    return _section(names, "Evaluations over time", "by step", panels)


def _section(names: Sequence[str], title: str, note: str, panels: Sequence[str]) -> str:
    if not panels:
        return ""
    keys = " &nbsp; ".join(f"{_key(place)}{escape(name)}" for place, name in enumerate(names))
    return (
        f"<section><h2>{title} <small>{note}</small></h2><p class=legend>{keys}</p>"
        f"<div class=panels>{''.join(panels)}</div></section>"
    )
