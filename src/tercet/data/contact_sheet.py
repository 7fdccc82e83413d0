"""One picture of a source: small pictures in rows, each with its caption."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tercet.data.loader import describe
from tercet.data.table import SampleTable
from tercet.errors import TercetError
from tercet.files import write_atomic

COLUMNS, TILE, MARGIN = 8, 160, 12
LINES, LINE_HEIGHT, FONT_SIZE = 3, 14, 11
PAPER, INK, FAINT, BROKEN = (255, 255, 255), (32, 32, 32), (240, 240, 240), (176, 32, 32)


def write_sheet(source: SampleTable, path: Path, count: int, pixel_limit: int) -> Path:
    """Draw `count` images spread evenly over a source, and write them as a PNG.

    Raises:
        TercetError: it cannot be written.
    """
    indices = np.unique(np.linspace(0, source.image_count - 1, min(count, source.image_count)).astype(int)).tolist()
    columns = min(COLUMNS, len(indices))
    rows = -(-len(indices) // columns)
    step_x, step_y = TILE + MARGIN, TILE + LINES * LINE_HEIGHT + MARGIN + 6
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(sheet), _font()
    for place, index in enumerate(indices):
        left, top = MARGIN + place % columns * step_x, MARGIN + place // columns * step_y
        pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=FAINT)
        caption, ink = source.captions(index)[0], INK
        try:
            tile = Image.fromarray(source.pixels(index, pixel_limit))
            tile = _fit(tile)
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        except (OSError, TercetError) as error:
            caption, ink = describe(source, index, error), BROKEN
        for number, line in enumerate(_lines(caption, font)):
            pen.text((left, top + TILE + 4 + number * LINE_HEIGHT), line, fill=ink, font=font)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return write_atomic(path, stream.getvalue())


def _fit(image: Image.Image) -> Image.Image:
    """Shrunk, or a small drawing enlarged by whole pixels, to fill a tile."""
    share = TILE / max(image.size)
    if share >= 2:
        return image.resize((image.width * int(share), image.height * int(share)), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _lines(caption: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """A caption in as many lines as fit under a tile, none of them wider than it."""
    lines: list[str] = []
    for width in range(TILE // 4, 1, -1):
        lines = textwrap.wrap(caption, width, max_lines=LINES, placeholder=" …", break_on_hyphens=False)
        if all(font.getlength(line) <= TILE for line in lines):
            break
    return lines


def _font() -> ImageFont.FreeTypeFont:
    # Pillow's own font knows Latin letters alone; Matplotlib brings one that knows most alphabets.
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_SIZE)
