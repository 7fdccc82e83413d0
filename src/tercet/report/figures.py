"""Figures: line charts as SVG that takes its colours from the page, and an explanation's heatmaps as a PNG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tercet.errors import TercetError
from tercet.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tercet.data.augment import Pixels
    from tercet.tasks.explaining import Explanation

WIDTH, HEIGHT = 252, 126
LEFT, RIGHT, TOP, BOTTOM = 36, 6, 8, 18  # margins
MAX_POINTS = 400  # of a curve; more than a chart has pixels
RUN_COLOURS = 6  # --run-1 to --run-6 in style.css
DASHES = ("", "5 2", "2 2")  # beside the colours, for eyes that do not tell them apart


class Curve(NamedTuple):
    """A line of a chart: float64 `[points]` of steps and of values, and how it is drawn."""

    steps: np.ndarray
    values: np.ndarray
    colour: str = "--accent"
    dash: str = ""
    thin: bool = False
    markers: bool = False


def run_chart(steps: np.ndarray, values: np.ndarray, name: str, *, smoothed: bool = True, markers: bool = False) -> str:
    """A chart of one number of one run; `smoothed`: thin as logged, with a thick moving average over it."""
    if not smoothed or len(values) <= 3:
        return line_chart([Curve(steps, values, markers=markers or len(values) <= 3)], name)
    limits = (float(values.min()), float(np.quantile(values, 0.995)) if len(values) >= 50 else float(values.max()))
    return line_chart([Curve(steps, values, thin=True), Curve(steps, smooth(values))], name, limits)


def comparison_chart(curves: Sequence[tuple[int, np.ndarray, np.ndarray]], name: str, *, smoothed: bool = True) -> str:
    """A chart of the same number of several runs: number of the run, steps and values of each."""
    return line_chart(
        [
            Curve(
                steps,
                smooth(values) if smoothed and len(values) > 3 else values,
                f"--run-{number % RUN_COLOURS + 1}",
                DASHES[number % len(DASHES)],
                markers=len(values) <= 3,
            )
            for number, steps, values in curves
        ],
        name,
    )


def line_chart(curves: Sequence[Curve], name: str, limits: tuple[float, float] | None = None) -> str:
    """Curves as an inline SVG element.

    Args:
        curves: with one point or more, each.
        name: what is drawn, for screen readers.
        limits: of the values, so that a few spikes do not flatten the curve; default: those of the curves.
    """
    curves = [curve._replace(steps=_thin(curve.steps), values=_thin(curve.values)) for curve in curves]
    left, right = min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves)
    low, high = limits or (min(curve.values.min() for curve in curves), max(curve.values.max() for curve in curves))
    flat = high - low <= 1e-6 * max(abs(high), abs(low))  # nothing but rounding
    margin = 0.06 * (abs(high) or 1.0 if flat else high - low)
    low, high = low - margin, high + margin

    def x(step: np.ndarray) -> np.ndarray:
        return LEFT + 4 + (WIDTH - LEFT - RIGHT - 8) * (step - left + 1e-9) / (right - left + 2e-9)

    def y(value: np.ndarray) -> np.ndarray:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - np.clip(value, low, high)) / (high - low)

    parts = []
    ticks = _ticks(low, high, 4)
    for label, down in zip(_labels(ticks), y(ticks), strict=True):
        parts.append(f'<path d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{down + 3:.1f}" text-anchor="end">{label}</text>')
    ticks = _ticks(left, right, 5, whole=True)
    for label, across in zip(_labels(ticks), x(ticks), strict=True):
        parts.append(f'<path d="M{across:.1f} {TOP}V{HEIGHT - BOTTOM}" class="grid"/>')
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text>')
    for curve in curves:
        points = list(zip(x(curve.steps), y(curve.values), strict=True))
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        look = f'class="{"thin" if curve.thin else "curve"}" stroke-dasharray="{curve.dash or "none"}"'
        parts.append(f'<polyline points="{line}" style="stroke:var({curve.colour})" {look}/>')
        if curve.markers:
            dot = f'r="2.2" style="fill:var({curve.colour})"'
            parts += [f'<circle cx="{across:.1f}" cy="{down:.1f}" {dot}/>' for across, down in points]
    title = escape(name, quote=True)
    return f'<svg role="img" aria-label="{title}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def smooth(values: np.ndarray, fraction: float = 0.025) -> np.ndarray:
    """Exponential average over `fraction` of the points to either side, so that it does not lag: float64 `[points]`."""
    decay = 1 - 1 / max(1.0, fraction * len(values))

    def average(sequence: np.ndarray) -> np.ndarray:
        averages = np.empty(len(sequence))
        total = weight = 0.0
        for index, value in enumerate(sequence):
            total, weight = decay * total + value, decay * weight + 1
            averages[index] = total / weight
        return averages

    return (average(values) + average(values[::-1])[::-1]) / 2


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of neighbouring points, so that at most `MAX_POINTS` remain."""
    if len(values) <= MAX_POINTS:
        return values
    edges = np.linspace(0, len(values), MAX_POINTS + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> np.ndarray:
    """At most `count` round numbers between `low` and `high`."""
    rough = max((high - low) / count, 1e-300)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    return step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)


def _labels(ticks: np.ndarray) -> list[str]:
    """Ticks in few characters, such as 0.25, 12k and 1e-4, with as many digits as tell them apart."""
    labels = []
    for digits in range(3, 8):
        labels = [_short(float(tick), digits) for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels


def _short(value: float, digits: int) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.{digits}g}M"
    if size >= 1e4:
        return f"{value / 1e3:.{digits}g}k"
    if 0 < size < 1e-3:
        number, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.{max(digits, 4)}g}"


INK, SOFT, LINE, BAR = "#1d2329", "#5c6670", "#d7dade", "#c4452f"
PANEL_AREA = 3.6  # square inches, whatever the image's shape
DPI = 130
PAGE_WIDTH = 11.0  # inches that a row of panels may take
GAP, HEAD = 0.16, 0.44  # inches between panels, and above each for its word and bar


def draw_explanation(explanation: Explanation, path: str | Path) -> Path:
    """Write a PNG: the image, the heatmap of the whole text, then a panel for each word.

    Each panel's colours end at its own maximum; those of weak words are faint.  The bar above a panel is that maximum
    as a fraction of the greatest of all.

    Raises:
        TercetError: `path` does not end in .png, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    from tercet.tasks.explaining import fit

    if Path(path).suffix.lower() != ".png":
        raise TercetError(f"{path}: the picture is a PNG; give it a name that ends in .png")
    width, height = _panel_size(explanation.pixels.shape[0] / explanation.pixels.shape[1])
    side = round(DPI * max(width, height))
    result = f"answer: {explanation.answer}" if explanation.match is None else f"match {100 * explanation.match:.1f} %"
    panels: list[tuple[str, float | None, Pixels]] = [
        (result, None, fit(explanation.pixels, side)),
        ("all words", None, explanation.overlay(None, side)),
        *((heat.word, heat.strength, explanation.overlay(i, side)) for i, heat in enumerate(explanation.words)),
    ]
    columns = max(1, min(len(panels), int((PAGE_WIDTH + GAP) // (width + GAP))))
    rows = math.ceil(len(panels) / columns)
    title = textwrap.wrap(_without_math(explanation.text), max(24, int(12 * columns * width)))
    top = 0.28 * len(title) + 0.24
    page = np.array([max(3.2, columns * (width + GAP) + GAP), top + rows * (height + HEAD + GAP) + GAP])
    figure = Figure(figsize=tuple(page), facecolor="white")
    figure.text(GAP / page[0], 1 - 0.14 / page[1], "\n".join(title), va="top", fontsize=13, color=INK, weight="bold")
    for number, (name, strength, pixels) in enumerate(panels):
        row, column = divmod(number, columns)
        corner = np.array([GAP + column * (width + GAP), page[1] - top - (row + 1) * (height + HEAD + GAP) + GAP])
        axes = figure.add_axes((*(corner / page), *(np.array([width, height]) / page)))
        letters = max(4, int(width * 10.5))
        _draw_panel(axes, name if len(name) <= letters else name[: letters - 1] + "…", strength, pixels, height)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return write_atomic(path, stream.getvalue())


def _panel_size(aspect: float) -> tuple[float, float]:
    """Width and height in inches of a panel for images of `aspect` = height / width, within what a page holds."""
    width = min(PAGE_WIDTH, max(1.15, math.sqrt(PANEL_AREA / aspect)))
    return width, min(PAGE_WIDTH, max(0.3, width * aspect))


def _draw_panel(axes: Axes, name: str, strength: float | None, pixels: Pixels, height: float) -> None:
    axes.imshow(pixels, aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(LINE)
    colour = SOFT if strength is None else INK
    axes.text(0, 1 + 0.13 / height, _without_math(name), transform=axes.transAxes, fontsize=11, color=colour)
    for end, colour in () if strength is None else ((1.0, LINE), (strength, BAR)):
        bar = {"color": colour, "linewidth": 3.6, "solid_capstyle": "butt", "clip_on": False}
        axes.plot([0, end], [1 + 0.075 / height] * 2, transform=axes.transAxes, **bar)


def _without_math(text: str) -> str:
    """Text that Matplotlib draws as it is; a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
