"""Draw searches of a run: each query with its best images, the right one framed and ticked.

docs/images/demo-gallery.png, which README.md shows, is made by

    tercet demo
    python docs/figures/gallery.py runs/demo/gallery.json
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "images" / "demo-gallery.png"
INK, SOFT, LINE, RIGHT = "#1d2329", "#5c6670", "#c9ced3", "#12805c"
ROWS, COLUMNS = 7, 5
TEXT, STEP, SIDE, HEIGHT = 2.6, 1.25, 1.15, 1.5  # inches: width of a query, between images, of an image, of a row


def draw(entries: list[dict[str, Any]]) -> Figure:
    """A row per query of gallery.json: its words, the rank of the right image, and the images that were found."""
    entries = entries[:ROWS]
    page_width, page_height = TEXT + STEP * COLUMNS + 0.1, HEIGHT * len(entries)
    figure = Figure(figsize=(page_width, page_height), facecolor="white")
    for row, entry in enumerate(entries):
        bottom = page_height - HEIGHT * (row + 1)
        words = textwrap.fill(entry["query"].replace("$", r"\$"), 32, max_lines=5, placeholder=" …")
        rank = "found first" if entry["rank"] == 1 else f"at rank {entry['rank']:,}"
        left = 0.12 / page_width
        figure.text(left, (bottom + HEIGHT / 2) / page_height, words, va="center", fontsize=9, color=INK)
        figure.text(left, (bottom + 0.1) / page_height, rank, fontsize=7.5, color=SOFT)
        for column, result in enumerate(entry["results"][:COLUMNS]):
            corner = (TEXT + STEP * column) / page_width, (bottom + 0.2) / page_height
            draw_result(figure.add_axes((*corner, SIDE / page_width, SIDE / page_height)), result)
    return figure


def draw_result(axes: Axes, result: dict[str, Any]) -> None:
    """One image with its score."""
    data = base64.b64decode(result["thumbnail"].partition(",")[2])
    axes.imshow(Image.open(io.BytesIO(data)))
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"{result['score']:.3f}", fontsize=7, color=SOFT, labelpad=2)
    right = bool(result.get("right"))
    axes.spines[:].set(color=RIGHT if right else LINE, linewidth=3.2 if right else 0.7)
    if right:
        badge = {"boxstyle": "round,pad=0.25", "facecolor": RIGHT, "edgecolor": "white"}
        axes.text(0.06, 0.94, "✓", va="top", fontsize=8, color="white", bbox=badge, transform=axes.transAxes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("gallery", type=Path, help="gallery.json of a run")
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    draw(json.loads(arguments.gallery.read_text("utf-8"))).savefig(arguments.output, dpi=130)
    print(f"The figure is {arguments.output}.")
