"""What is in a source of pairs: counts, broken images, sizes, caption lengths, duplicates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from tercet.data.augment import Pixels
from tercet.data.images import EncodedImage, reduction_for
from tercet.data.loader import describe, encoded_picture
from tercet.data.rows import digest
from tercet.data.table import SampleTable
from tercet.data.tokenizer import clean_caption
from tercet.data.workers import WorkerPool
from tercet.errors import TercetError

CHUNK = 256
MESSAGES_KEPT = 1000
PIECE = 9  # pixels of the side of a fingerprint's thumbnail
NEAR_BITS = 3  # of the 64 across: so many may differ in any picture that is found
NEAR_BITS_TOGETHER = 10  # of the 128 across and down, in a picture that is called alike
FLAT_BITS = 12  # a picture with fewer edges than this says too little of itself to be called like another
LARGEST_GROUP = 200  # of images that share a part of their fingerprint; more is a background, not a picture
ENOUGH = 4 * PIECE  # pixels of the shorter side that a picture is decoded to


@dataclass
class Measured:
    """What was found of some images, in the order of the source; broken ones have a width of 0.

    Attributes:
        sizes: int32 [images, 2]; height and width.
        digests: uint64 [images]; of the image's bytes.
        fingerprints: uint64 [images, 2]; bits that tell where the picture gets brighter across and down.
        words: int32 [captions]; words of each caption before it is cut.
        texts: uint64 [captions]; digest of each cleaned caption.
        problems: why images are broken.
    """

    sizes: np.ndarray
    digests: np.ndarray
    fingerprints: np.ndarray
    words: np.ndarray
    texts: np.ndarray
    problems: list[str] = field(default_factory=list)


class Measurer:
    """Measures images number * CHUNK and following; copied to every worker process."""

    def __init__(self, source: SampleTable, pixel_limit: int, max_words: int) -> None:
        self.source = source
        self.pixel_limit = pixel_limit
        self.max_words = max_words

    def __call__(self, number: int) -> Measured:
        """Read, decode and measure."""
        indices = range(number * CHUNK, min((number + 1) * CHUNK, self.source.image_count))
        found = Measured(
            np.zeros((len(indices), 2), np.int32),
            np.zeros(len(indices), np.uint64),
            np.zeros((len(indices), 2), np.uint64),
            np.zeros(0, np.int32),
            np.zeros(0, np.uint64),
        )
        words: list[int] = []
        texts: list[int] = []
        for place, index in enumerate(indices):
            for caption in self.source.captions(index):
                words.append(len(caption.split()))
                texts.append(digest(clean_caption(caption, self.max_words).encode("utf-8", "replace")))
            try:
                encoded = encoded_picture(self.source, index, self.pixel_limit)
                if isinstance(encoded, EncodedImage):
                    reduction = reduction_for(min(encoded.height, encoded.width), ENOUGH)
                    pixels, data = encoded.pixels(reduction), encoded.data
                    found.sizes[place] = encoded.height, encoded.width
                else:
                    pixels, data = encoded, encoded.tobytes()
                    found.sizes[place] = encoded.shape[:2]
            except (OSError, TercetError) as error:
                found.problems.append(describe(self.source, index, error))
                continue
            found.digests[place] = digest(data)
            found.fingerprints[place] = fingerprint(pixels)
        found.words, found.texts = np.array(words, np.int32), np.array(texts, np.uint64)
        return found


@dataclass
class Inspection:
    """All of a source.

    Attributes:
        measured: of all images.
        owners: int64 [captions]; the image of each.
        refused: why rows were refused when the source was opened, the first of them.
        refused_count: of all of them.
        max_words: words of a caption that are kept.
    """

    measured: Measured
    owners: np.ndarray
    refused: list[str]
    refused_count: int
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
            "refused_rows": self.refused_count,
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
        """Groups of images that look the same but are not: resized, encoded anew, a little cropped or brighter."""
        readable = self.measured.sizes[:, 1] > 0
        _, first = np.unique(self.measured.digests, return_index=True)
        single = np.zeros(len(readable), bool)
        single[first] = True
        edges = np.bitwise_count(self.measured.fingerprints).sum(axis=1)
        candidates = np.flatnonzero(readable & single & (edges >= FLAT_BITS))
        return alike(self.measured.fingerprints[candidates], candidates)


def inspect_source(
    source: SampleTable, pixel_limit: int, max_words: int, workers: int
) -> Iterator[tuple[int, Inspection]]:
    """Measure a source; yields how many images are done, and what was found when all of them are.

    Raises:
        TercetError: a worker process died.
    """
    tasks = list(range(-(-source.image_count // CHUNK)))
    counts = np.asarray(source.caption_counts, np.int64)
    refused = list(source.rejected)[:MESSAGES_KEPT]
    parts: list[Measured] = []
    problems: list[str] = []
    pool: WorkerPool[Measured] = WorkerPool(Measurer(source, pixel_limit, max_words), workers)
    with contextlib.closing(pool):
        for part in pool.run(tasks):
            problems += part.problems[: MESSAGES_KEPT - len(problems)]
            parts.append(part)
            done = min(len(parts) * CHUNK, source.image_count)
            if len(parts) < len(tasks):
                yield done, Inspection(part, np.zeros(0, np.int64), refused, len(source.rejected), max_words)
    whole = Measured(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS),
        problems=problems,
    )
    owners = np.repeat(np.arange(len(counts)), counts)
    yield source.image_count, Inspection(whole, owners, refused, len(source.rejected), max_words)


COLUMNS = ("sizes", "digests", "fingerprints", "words", "texts")


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

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = int(parents[place])
        return place

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
    roots = np.array([root(place) for place in range(len(names))], np.int64)
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
