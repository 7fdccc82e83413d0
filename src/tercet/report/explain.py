"""A picture of an explanation: a panel a word, the heat where it is seen laid over the image."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.data.augment import Pixels
from tercet.errors import TercetError
from tercet.files import write_atomic
from tercet.tasks.explaining import Explanation, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, BAR = "#1d2329", "#5c6670", "#d7dade", "#c4452f"
PANEL_AREA = 3.6  # square inches, whatever the image's shape
DOTS = 130
WIDTH = 11.0  # inches that a row of panels may take
GAP, HEAD = 0.16, 0.44  # between panels, and above each for its word and bar


def draw_explanation(explanation: Explanation, path: str | Path) -> Path:
    """Write a PNG: the image, the heat of the whole text, then a panel for each word.

    Each panel's colours end at its own maximum; those of weak words are thin.  The bar under a word is that maximum as
    a share of the greatest of all.

    Raises:
        TercetError: `path` is no name of a PNG file, or the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise TercetError(f"{path}: the picture is a PNG; give it a name that ends in .png")
    from matplotlib.figure import Figure

    height, width = explanation.pixels.shape[:2]
    panel_width, panel_height = panel_size(height / width)
    count = 2 + len(explanation.words)
    columns = max(1, min(count, int((WIDTH + GAP) // (panel_width + GAP))))
    rows = math.ceil(count / columns)
    title = textwrap.wrap(_plain(explanation.text), max(24, int(12 * columns * panel_width)))
    top = 0.28 * len(title) + 0.24
    size = (
        max(3.2, columns * (panel_width + GAP) + GAP),
        top + rows * (panel_height + HEAD + GAP) + GAP,
    )
    figure = Figure(figsize=size, facecolor="white")
    figure.text(GAP / size[0], 1 - 0.14 / size[1], "\n".join(title), va="top", fontsize=13, color=INK, weight="bold")
    side = round(DOTS * max(panel_width, panel_height))
    for number, (name, strength, pixels) in enumerate(_panels(explanation, side)):
        row, column = divmod(number, columns)
        left = GAP + column * (panel_width + GAP)
        bottom = size[1] - top - (row + 1) * (panel_height + HEAD + GAP) + GAP
        _draw_panel(figure, (left, bottom, panel_width, panel_height), name, strength, pixels)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DOTS)
    return write_atomic(path, stream.getvalue())


def panel_size(aspect: float) -> tuple[float, float]:
    """Width and height in inches of a panel for images of `aspect` = height / width, within what a page holds."""
    width = min(WIDTH, max(1.15, math.sqrt(PANEL_AREA / aspect)))
    return width, min(WIDTH, max(0.3, width * aspect))


def _panels(explanation: Explanation, side: int) -> list[tuple[str, float | None, Pixels]]:
    """Title, strength and picture of each panel."""
    title = f"match {100 * (explanation.match or 0):.1f} %"
    if explanation.answer is not None:
        title = f"answer: {explanation.answer}"
    panels: list[tuple[str, float | None, Pixels]] = [
        (title, None, fit(explanation.pixels, side)),
        ("all words", None, explanation.overlay(None, side)),
    ]
    for index, heat in enumerate(explanation.words):
        panels.append((heat.word, heat.strength, explanation.overlay(index, side)))
    return panels


def _draw_panel(
    figure: Figure, place: tuple[float, float, float, float], name: str, strength: float | None, pixels: Pixels
) -> None:
    """One panel at `place` (left, bottom, width, height in inches)."""
    left, bottom, width, height = place
    page_width, page_height = figure.get_size_inches()
    axes = figure.add_axes((left / page_width, bottom / page_height, width / page_width, height / page_height))
    axes.imshow(pixels, aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LINE)
    letters = max(4, int(width * 10.5))
    shown = name if len(name) <= letters else name[: letters - 1] + "…"
    over = (bottom + height + 0.13) / page_height
    figure.text(
        left / page_width, over, _plain(shown), va="bottom", fontsize=11, color=SOFT if strength is None else INK
    )
    if strength is not None:
        bar = figure.add_axes(
            (left / page_width, (bottom + height + 0.05) / page_height, width / page_width, 0.05 / page_height)
        )
        bar.barh([0], [1], color=LINE, height=1)
        bar.barh([0], [strength], color=BAR, height=1)
        bar.set_xlim(0, 1)
        bar.set_ylim(-0.5, 0.5)
        bar.axis("off")


def _plain(text: str) -> str:
    """Text that Matplotlib draws as it is; a dollar would begin a formula."""
    return text.replace("$", r"\$")
