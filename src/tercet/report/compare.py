"""Several runs on one page: their results, their curves, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tercet.errors import TercetError
from tercet.files import write_atomic
from tercet.report.figures import RUN_COLOURS, comparison_chart
from tercet.report.html import figure, header, html_page, missing_section, number, plural, section
from tercet.report.page import CUTOFFS, GROUPS, LOSSES, OVER_TIME, TRAINING, UNSMOOTHED, run_facts
from tercet.report.run import Run, is_finite, read_run

NAMES = ("name", "output")  # settings that name a run instead of shaping it
RECALLS = {
    "r_mean": "mean",
    **{f"text_r{k}": f"image → text R@{k}" for k in CUTOFFS},
    **{f"image_r{k}": f"text → image R@{k}" for k in CUTOFFS},
    "text_r_mean": "image → text, mean",
    "image_r_mean": "text → image, mean",
}
LOWER_IS_BETTER = ("alignment", "image_uniformity", "text_uniformity", "modality_gap")

Runs = Mapping[str, Run]  # by the names that the page gives them


def write_comparison(run_folders: Sequence[str | Path], file: str | Path) -> Path:
    """Write one page that compares runs.

    Args:
        run_folders: two or more.
        file: the HTML file to write.

    Raises:
        TercetError: fewer than two, no such run folder, or the file cannot be written.
    """
    paths = [Path(folder).resolve() for folder in run_folders]
    if len(paths) < 2:
        raise TercetError("a comparison needs at least two runs")
    if len(set(paths)) < len(paths):
        raise TercetError("a run is named twice; name each once")
    depth = 1  # of the path, as much as tells the runs apart
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    runs = {str(Path(*path.parts[-depth:])): read_run(folder) for path, folder in zip(paths, run_folders, strict=True)}
    title = " and ".join(runs) if len(runs) == 2 else f"{len(runs)} runs"
    sections = [
        header("Tercet runs", title, {}),
        missing_section((name, sentence) for name, run in runs.items() for sentence in run.missing),
        _facts(runs),
        _results(runs),
        _differences(runs),
        _charts(runs, "Losses", LOSSES, "moving averages"),
        _over_time(runs),
        _charts(runs, "Training", TRAINING, "by step"),
    ]
    return write_atomic(file, html_page(f"{title} – Tercet report", sections))


def _table(runs: Runs, rows: str) -> str:
    head = "".join(f"<th scope=col>{_key(index)}{escape(name)}</th>" for index, name in enumerate(runs))
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return f"<div class=scroll><table class=runs>{head}<tbody>{rows}</tbody></table></div>" if rows else ""


def _key(index: int) -> str:
    return f'<i class=key style="background:var(--run-{index % RUN_COLOURS + 1})"></i>'


def _row(name: str, values: Sequence[str | None], best: Sequence[bool] = ()) -> str:
    marks = [" class=top" if index < len(best) and best[index] else "" for index in range(len(values))]
    cells = "".join(f"<td{mark}>{value or '–'}</td>" for value, mark in zip(values, marks, strict=True))
    return f"<tr><th scope=row>{name}</th>{cells}</tr>"


def _facts(runs: Runs) -> str:
    facts = [run_facts(run) for run in runs.values()]
    rows = "".join(_row(name, [own[name] for own in facts]) for name in facts[0] if any(own[name] for own in facts))
    return section("Runs", _table(runs, rows))


def _results(runs: Runs) -> str:
    """The last evaluation of every run on each data, number by number."""
    measured: list[dict[tuple[str, str, str], float]] = [
        {
            (data, group, metric): float(value)
            for data, line in run.last_evaluations.items()
            for group, numbers in line.items()
            if isinstance(numbers, dict) and group != "size"
            for metric, value in numbers.items()
            if is_finite(value)
        }
        for run in runs.values()
    ]
    rows, heading = "", None
    for key in dict.fromkeys(key for own in measured for key in own):
        data, group, metric = key
        if (data, group) != heading:
            heading = (data, group)
            title = f"{data} data: {GROUPS.get(group, group).lower()}"
            rows += f"<tr class=group><th colspan={len(runs) + 1}>{escape(title)}</th></tr>"
        values = [own.get(key) for own in measured]
        present = [value for value in values if value is not None]
        best = min(present) if metric in LOWER_IS_BETTER else max(present)
        tops = [value == best and len(set(present)) > 1 for value in values]
        rows += _row(escape(RECALLS.get(metric, metric.replace("_", " "))), [number(value) for value in values], tops)
    return section("Results", _table(runs, rows), "the last evaluation of each; the best of a row is bold")


def _differences(runs: Runs) -> str:
    settings = [dict(_leaves(run.config)) for run in runs.values()]
    keys = dict.fromkeys(key for own in settings for key in own)
    differing = [key for key in keys if len({repr(own.get(key)) for own in settings}) > 1]
    rows = "".join(
        _row(f"<code>{escape(key)}</code>", [_setting(own, key) for own in settings])
        for key in differing
        if key not in NAMES
    )
    same = len(keys) - len(differing)
    note = f"{plural(same, 'setting')} of the config {'is' if same == 1 else 'are'} the same"
    return section("Settings that differ", _table(runs, rows) or "<p>None.</p>", note)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(own: Mapping[str, Any], key: str) -> str | None:
    if key not in own:
        return None
    value = own[key]
    shown = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return f"<code>{escape(shown)}</code>"


def _charts(runs: Runs, title: str, names: Mapping[str, str], note: str) -> str:
    panels = []
    for key, name in names.items():
        curves = _curves(run.curve(key) for run in runs.values())
        if curves:
            svg = comparison_chart(curves, f"{name} by step", smoothed=key not in UNSMOOTHED)
            panels.append(figure(name, key, svg))
    return _panels(runs, title, note, panels)


def _over_time(runs: Runs) -> str:
    panels = []
    for data in dict.fromkeys(data for run in runs.values() for data in run.last_evaluations):
        for (group, key), label in OVER_TIME.items():
            curves = _curves(run.evaluation_curve(data, group, key) for run in runs.values())
            if any(len(steps) > 1 for _, steps, _ in curves):
                name = f"{label}, {data}"
                panels.append(figure(name, "", comparison_chart(curves, name, smoothed=False)))
    return _panels(runs, "Evaluations over time", "by step", panels)


def _curves(curves: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    return [(index, steps, values) for index, (steps, values) in enumerate(curves) if len(steps)]


def _panels(runs: Runs, title: str, note: str, panels: Sequence[str]) -> str:
    keys = " &nbsp; ".join(f"{_key(index)}{escape(name)}" for index, name in enumerate(runs))
    return section(title, f"<div class=panels>{''.join(panels)}</div>" if panels else "", note, keys)
