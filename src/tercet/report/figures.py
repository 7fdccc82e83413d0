"""Pictures of a run: curves as SVG that takes its colours from the page, and a gallery of searches as PNG."""

from __future__ import annotations

import base64
import binascii
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tercet.errors import TercetError
from tercet.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THUMBNAIL = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+={0,2}")
RAW_POINTS = 400  # points of a raw curve that are kept; more than a panel has pixels
INK, GRID, ACCENT = "#010101", "#020202", "#030303"  # stand-ins, exchanged for the page's colours in the SVG
PAGE_COLOURS = {INK: "var(--soft)", GRID: "var(--line)", ACCENT: "var(--accent)"}
RUN_COLOURS = [f"#0{number}0{number}0{number}" for number in range(4, 10)]  # of runs beside one another
PAGE_COLOURS |= {stand_in: f"var(--run-{number})" for number, stand_in in enumerate(RUN_COLOURS, 1)}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))  # beyond the colours, and for eyes that do not tell them apart


def smooth(values: np.ndarray, share: float = 0.025) -> np.ndarray:
    """Exponential average over `share` of the points to either side, so that it does not lag: float64 [points]."""
    decay = 1 - 1 / max(1.0, share * len(values))
    return (_average(values, decay) + _average(values[::-1], decay)[::-1]) / 2


def _average(values: np.ndarray, decay: float) -> np.ndarray:
    averages = np.empty(len(values))
    total = weight = 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        averages[i] = total / weight
    return averages


def curve_svg(steps: np.ndarray, values: np.ndarray, name: str, *, smoothed: bool = True, markers: bool = False) -> str:
    """A small panel of one curve as an inline SVG element without outside references.

    Args:
        steps: float64 [points], growing.
        values: float64 [points], finite.
        name: what is drawn; read aloud by screen readers, and the seed of the ids within the SVG.
        smoothed: draw the raw curve thin and its moving average over it.
        markers: mark every point.
    """
    with _panel(name) as (axes, svg):
        coarse_steps, coarse = _thin(steps, values)
        if smoothed and len(values) > 3:
            axes.plot(coarse_steps, coarse, color=ACCENT, linewidth=0.8, alpha=0.35)
            axes.plot(*_thin(steps, smooth(values)), color=ACCENT, linewidth=1.7)
            _fit_height(axes, values)
        else:
            dot = "o" if markers or len(values) < 4 else None
            axes.plot(coarse_steps, coarse, color=ACCENT, linewidth=1.7, marker=dot, markersize=3.5)
    return svg()


def curves_svg(curves: Sequence[tuple[int, np.ndarray, np.ndarray]], name: str, *, smoothed: bool = True) -> str:
    """A panel of the same curve of several runs, as `curve_svg`.

    Args:
        curves: for each run that has it its number, steps and values; the number gives colour and dashes.
        name: what is drawn.
        smoothed: draw moving averages alone.
    """
    with _panel(name) as (axes, svg):
        for number, steps, values in curves:
            shown = smooth(values) if smoothed and len(values) > 3 else values
            axes.plot(
                *_thin(steps, shown),
                color=RUN_COLOURS[number % len(RUN_COLOURS)],
                linestyle=DASHES[number % len(DASHES)],
                linewidth=1.5,
                marker="o" if len(values) < 4 else None,
                markersize=3.5,
            )
    return svg()


@contextmanager
def _panel(name: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on, and what gives the SVG after the block."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5, "path.simplify": True}):
        figure = Figure(figsize=(3.5, 1.75))
        axes = figure.add_axes((0.13, 0.15, 0.82, 0.79))
        yield axes, lambda: _inline(stream.getvalue(), name)
        _style(axes)
        figure.savefig(stream, format="svg", transparent=True)


def gallery_figure(entries: Sequence[Mapping[str, Any]], path: str | Path, *, rows: int = 8, columns: int = 6) -> Path:
    """Write a PNG of searches: a row a query with its best images, the right one framed and ticked.

    Args:
        entries: as in gallery.json; drawn in the order given.
        path: the PNG file to write.
        rows: queries drawn at most.
        columns: images drawn a query at most.

    Raises:
        TercetError: there is no query to draw, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = list(entries[:rows])
    if not shown:
        raise TercetError("no queries to draw; evaluate first, so that the run folder holds gallery.json")
    columns = max(1, min(columns, max(len(entry["results"]) for entry in shown)))
    width, height = 2.7 + 1.25 * columns, 1.5 * len(shown)
    figure = Figure(figsize=(width, height), facecolor="white")
    for row, entry in enumerate(shown):
        bottom = 1 - (row + 1) / len(shown)
        words = textwrap.fill(str(entry["query"]).replace("$", r"\$"), 32, max_lines=5, placeholder=" …")
        middle = bottom + 0.5 / len(shown)
        figure.text(0.12 / width, middle, words, va="center", fontsize=9, color="#1d2329", linespacing=1.3)
        figure.text(
            0.12 / width, bottom + 0.07 / len(shown), rank_words(entry.get("rank")), fontsize=7.5, color="#5c6670"
        )
        for column, result in enumerate(entry["results"][:columns]):
            left = (2.6 + 1.25 * column) / width
            axes = figure.add_axes((left, bottom + 0.14 / height, 1.15 / width, 1.15 / height))
            _draw_result(axes, result)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return write_atomic(path, stream.getvalue())


def rank_words(rank: object) -> str:
    """'found first', 'at rank 7', or that the rank is unknown."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return "rank unknown"
    return "found first" if rank == 1 else f"at rank {rank:,}"


def _draw_result(axes: Axes, result: Mapping[str, Any]) -> None:
    image = _decode_thumbnail(result.get("thumbnail"))
    right = bool(result.get("right"))
    axes.set_xticks([])
    axes.set_yticks([])
    if image is None:
        axes.text(
            0.5, 0.5, "no picture", ha="center", va="center", fontsize=7, color="#5c6670", transform=axes.transAxes
        )
    else:
        axes.imshow(image)
    for spine in axes.spines.values():
        spine.set_color("#12805c" if right else "#c9ced3")
        spine.set_linewidth(3.2 if right else 0.7)
    if right:
        badge = {"boxstyle": "round,pad=0.25", "facecolor": "#12805c", "edgecolor": "white"}
        axes.text(0.06, 0.94, "✓", transform=axes.transAxes, ha="left", va="top", color="white", fontsize=9, bbox=badge)
    score = result.get("score")
    if isinstance(score, int | float):
        axes.text(
            0.5, -0.05, f"{score:.3f}", transform=axes.transAxes, ha="center", va="top", fontsize=7, color="#5c6670"
        )


def _decode_thumbnail(thumbnail: object) -> np.ndarray | None:
    """Pixels of a data URL: uint8 [height, width, 3]; None when it holds no picture."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(thumbnail, str) or not THUMBNAIL.fullmatch(thumbnail):
        return None
    try:
        data = base64.b64decode(thumbnail.partition(",")[2], validate=True)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (binascii.Error, UnidentifiedImageError, OSError):
        return None


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of neighbouring points, so that at most `RAW_POINTS` remain."""
    if len(values) <= RAW_POINTS:
        return steps, values
    edges = np.linspace(0, len(values), RAW_POINTS + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(steps, edges[:-1]) / counts, np.add.reduceat(values, edges[:-1]) / counts


def _fit_height(axes: Axes, values: np.ndarray) -> None:
    """Keep a few spikes from flattening the curve."""
    low, high = np.quantile(values, (0.0, 0.995))
    if len(values) >= 50 and high > low:
        margin = 0.08 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _style(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, pad=4)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _short(value: float) -> str:
    """An axis label of few characters: 0.25, 12k, 1e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-3:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _inline(svg: str, name: str) -> str:
    """Matplotlib's SVG file as an element of a page: no prologue, metadata, fonts, or ids that nothing refers to."""
    opening = re.search(r"<svg[^>]*>", svg)
    view = re.search(r'viewBox="[\d. ]+"', svg)
    if opening is None or view is None:
        raise ValueError("no SVG element in the drawing")
    body = svg[opening.end() :]
    for noise in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r" font-family: [^;]*;"):
        body = re.sub(noise, "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for stand_in, colour in PAGE_COLOURS.items():
        body = body.replace(stand_in, colour)
    label = re.sub(r"[^\w .,()-]", "", name)
    return f'<svg role="img" aria-label="{label}" {view[0]}>{body}'
