"""What is in a table of pairs: counts, broken images, sizes, caption lengths, duplicates; and a contact sheet."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tercet.data.augment import Pixels
from tercet.data.images import reduction_for
from tercet.data.loader import describe
from tercet.data.rows import digest
from tercet.data.table import SampleTable
from tercet.data.tokenizer import clean_caption
from tercet.data.workers import WorkerPool
from tercet.errors import TercetError
from tercet.files import write_atomic

CHUNK = 256
MESSAGES_KEPT = 1000
PIECE = 9  # pixels of the side of a fingerprint's thumbnail
NEAR_BITS = 3  # of the 64 across: so many may differ in any picture that is found
NEAR_BITS_TOGETHER = 10  # of the 128 across and down, in a picture that is called alike
FLAT_BITS = 12  # a picture with fewer edges than this says too little of itself to be called like another
LARGEST_GROUP = 200  # of images that share a part of their fingerprint; more is a background, not a picture
DECODED_SIDE = 4 * PIECE  # pixels of the shorter side that a picture is decoded to at least
SHEET_COLUMNS, TILE, MARGIN = 8, 160, 12
LINES, LINE_HEIGHT, FONT_SIZE = 3, 14, 11
PAPER, INK, FAINT, BROKEN = (255, 255, 255), (32, 32, 32), (240, 240, 240), (176, 32, 32)


@dataclass
class Measured:
    """What was found of some images, in the order of the table; broken ones have a width of 0.

    Attributes:
        sizes: int32 [images, 2]; height and width.
        digests: uint64 [images]; of the image's bytes.
        fingerprints: uint64 [images, 2]; bits that say where the picture gets brighter across and down.
        words: int32 [captions]; words of each caption before it is cut.
        texts: uint64 [captions]; digest of each cleaned caption.
        broken: why images are broken.
    """

    sizes: np.ndarray
    digests: np.ndarray
    fingerprints: np.ndarray
    words: np.ndarray
    texts: np.ndarray
    broken: list[str] = field(default_factory=list)


@dataclass
class Measurer:
    """Measures images number * CHUNK and following; copied to every worker process."""

    table: SampleTable
    pixel_limit: int
    max_words: int

    def __call__(self, number: int) -> Measured:
        """Read, decode and measure."""
        indices = range(number * CHUNK, min((number + 1) * CHUNK, self.table.image_count))
        captions = [caption for index in indices for caption in self.table.captions(index)]
        cleaned = [clean_caption(caption, self.max_words).encode("utf-8", "replace") for caption in captions]
        found = Measured(
            np.zeros((len(indices), 2), np.int32),
            np.zeros(len(indices), np.uint64),
            np.zeros((len(indices), 2), np.uint64),
            np.array([len(caption.split()) for caption in captions], np.int32),
            np.array([digest(caption) for caption in cleaned], np.uint64),
        )
        for row, index in enumerate(indices):
            try:
                encoded = self.table.encoded(index, self.pixel_limit)
                pixels = encoded.pixels(reduction_for(min(encoded.height, encoded.width), DECODED_SIDE))
            except (OSError, TercetError) as error:
                found.broken.append(describe(self.table.key(index), error))
                continue
            found.sizes[row] = encoded.height, encoded.width
            found.digests[row] = digest(encoded.data)
            found.fingerprints[row] = fingerprint(pixels)
        return found


@dataclass
class Inspection:
    """All of a table of pairs.

    Attributes:
        measured: all images.
        rejected: why rows were rejected when the table was opened.
        max_words: words of a caption that are kept.
    """

    measured: Measured
    rejected: Sequence[str]
    max_words: int

    def summary(self) -> dict[str, Any]:
        """Everything in numbers, and the first few names."""
        sizes = self.measured.sizes[self.measured.sizes[:, 1] > 0]
        exact, near = self.exact_duplicates(), self.near_duplicates()
        _, repeats = np.unique(self.measured.texts, return_counts=True)
        words = self.measured.words
        return {
            "images": len(self.measured.sizes),
            "pairs": len(words),
            "rejected_rows": len(self.rejected),
            "broken_images": int((self.measured.sizes[:, 1] == 0).sum()),
            "captions_per_image": round(len(words) / max(1, len(self.measured.sizes)), 2),
            "caption_words": spread(words),
            "captions_cut": int((words > self.max_words).sum()),
            "repeated_captions": int(repeats.sum() - len(repeats)),
            "height": spread(sizes[:, 0]),
            "width": spread(sizes[:, 1]),
            "shorter_side": spread(sizes.min(axis=1)) if len(sizes) else {},
            "duplicate_images": int(sum(len(group) - 1 for group in exact)),
            "near_duplicate_images": int(sum(len(group) - 1 for group in near)),
        }

    def exact_duplicates(self) -> list[list[int]]:
        """Groups of images whose bytes are the same."""
        readable = np.flatnonzero(self.measured.sizes[:, 1] > 0)
        return groups_of_equal(self.measured.digests[readable], readable)

    def near_duplicates(self) -> list[list[int]]:
        """Groups of images that look the same but are not: resized, encoded again, a little cropped or brighter."""
        readable = self.measured.sizes[:, 1] > 0
        _, first = np.unique(self.measured.digests, return_index=True)
        single = np.zeros(len(readable), bool)
        single[first] = True
        edges = np.bitwise_count(self.measured.fingerprints).sum(axis=1)
        candidates = np.flatnonzero(readable & single & (edges >= FLAT_BITS))
        return alike(self.measured.fingerprints[candidates], candidates)


def inspect_table(
    table: SampleTable, pixel_limit: int, max_words: int, workers: int
) -> Iterator[tuple[int, Inspection | None]]:
    """Measure a table; yields how many images are done, and what was found when all of them are.

    Raises:
        TercetError: a worker process died.
    """
    parts: list[Measured] = []
    pool: WorkerPool[Measured] = WorkerPool(Measurer(table, pixel_limit, max_words), workers)
    with contextlib.closing(pool):
        for part in pool.run(range(-(-table.image_count // CHUNK))):
            parts.append(part)
            yield min(len(parts) * CHUNK, table.image_count), None
    columns = ("sizes", "digests", "fingerprints", "words", "texts")
    broken = [message for part in parts for message in part.broken][:MESSAGES_KEPT]
    whole = Measured(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns), broken=broken)
    yield table.image_count, Inspection(whole, table.rejected, max_words)


def fingerprint(pixels: Pixels) -> tuple[int, int]:
    """64 bits that say where a picture gets brighter from left to right, and 64 from top to bottom."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (PIECE, PIECE), interpolation=cv2.INTER_AREA).astype(np.int16)
    across = np.packbits(small[:-1, 1:] > small[:-1, :-1] + 2).tobytes()
    down = np.packbits(small[1:, :-1] > small[:-1, :-1] + 2).tobytes()
    return int.from_bytes(across, "big"), int.from_bytes(down, "big")


def groups_of_equal(values: np.ndarray, names: np.ndarray) -> list[list[int]]:
    """Names of equal values, those that more than one has; the largest groups first."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0])) if len(values) else np.zeros(0, int)
    groups = [names[part].tolist() for part in np.split(order, starts[1:]) if len(part) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))


def alike(fingerprints: np.ndarray, names: np.ndarray) -> list[list[int]]:
    """Groups of names whose fingerprints differ in no more than `NEAR_BITS_TOGETHER` bits.

    Two numbers of 64 bits that differ in three of them are equal in one of four quarters at least, so only those that
    share a quarter of the bits across are compared: whatever differs in `NEAR_BITS` of these is found, most with more.
    """
    parents = np.arange(len(names))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = int(parents[row])
        return row

    for quarter in range(NEAR_BITS + 1):
        part = (fingerprints[:, 0] >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)
        for group in groups_of_equal(part, np.arange(len(names))):
            if len(group) > LARGEST_GROUP:
                continue
            own = fingerprints[group]
            distance = np.bitwise_count(own[:, None] ^ own[None]).sum(axis=2)
            for one, other in np.argwhere(distance <= NEAR_BITS_TOGETHER).tolist():
                if one < other:
                    parents[root(group[other])] = root(group[one])
    roots = np.array([root(row) for row in range(len(names))], np.int64)
    return groups_of_equal(roots, names)


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, median, 95th percentile, greatest and mean."""
    if not len(values):
        return {}
    return {
        "least": int(values.min()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "greatest": int(values.max()),
        "mean": round(float(values.mean()), 1),
    }


def write_sheet(table: SampleTable, path: Path, count: int, pixel_limit: int) -> Path:
    """Draw `count` images spread evenly over a table, and write them as a PNG.

    Raises:
        TercetError: it cannot be written.
    """
    indices = np.unique(np.linspace(0, table.image_count - 1, min(count, table.image_count)).astype(int)).tolist()
    columns = min(SHEET_COLUMNS, len(indices))
    rows = -(-len(indices) // columns)
    step_x, step_y = TILE + MARGIN, TILE + LINES * LINE_HEIGHT + MARGIN + 6
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(sheet), _font()
    for tile_number, index in enumerate(indices):
        row, column = divmod(tile_number, columns)
        left, top = MARGIN + column * step_x, MARGIN + row * step_y
        pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=FAINT)
        caption, ink = table.captions(index)[0], INK
        try:
            tile = Image.fromarray(table.pixels(index, pixel_limit))
            tile = _fit(tile)
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        except (OSError, TercetError) as error:
            caption, ink = describe(table.key(index), error), BROKEN
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
