"""The embedded data set: drawn scenes with captions, deterministic, unlimited, and held in no file.

A scene follows from one number.  `SceneSource` numbers the scenes of a split and draws each when it is asked for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from tercet.data.scene_captions import write_captions
from tercet.data.scene_drawing import bounding_box, draw
from tercet.data.scene_layout import BACKGROUNDS, Kind, SceneObject, pick, place, random_kinds
from tercet.errors import TercetError

SCENE_SIZE = 64
SPLITS = {"train": 0, "validation": 1, "test": 2}
FIGURES = "figures"  # scenes of one figure each, to learn shapes and colours from before they come in company
_MARKS = {**SPLITS, FIGURES: 3}  # the lowest two bits of a scene's seed
MAX_ATTEMPTS = 2000  # layouts tried for one place in a split of distinct scenes

_LAYOUT, _PIXELS, _WORDS = 0, 1, 2  # separate random streams, so that a new caption form changes no picture


@dataclass(frozen=True)
class Scene:
    """A drawn scene: its objects, its picture and its captions.  Picture and captions are made when first read."""

    seed: int
    size: int
    objects: tuple[SceneObject, ...]
    background: str

    @functools.cached_property
    def image(self) -> np.ndarray:
        """uint8 [size, size, 3], RGB."""
        return draw(self.objects, self.background, self.size, scene_generator(self.seed, _PIXELS))

    @functools.cached_property
    def captions(self) -> list[str]:
        """Three different true captions; the first two name all objects with colour, shape, size and number."""
        return write_captions(self.objects, self.background, scene_generator(self.seed, _WORDS))

    @property
    def caption(self) -> str:
        """The caption that names everything needed to find this scene among others."""
        return self.captions[0]

    @functools.cached_property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Each object's box (left, top, right, bottom) in pixels."""
        return [bounding_box(item, self.size) for item in self.objects]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The sorted (colour, shape, size) of all objects, repeated ones as often as they occur."""
        return tuple(sorted(item.kind for item in self.objects))


def draw_scene(seed: int, size: int = SCENE_SIZE, alone: bool = False) -> Scene:
    """The scene that follows from `seed` (any non-negative integer), `size` pixels a side; `alone`: with one figure."""
    rng = scene_generator(seed, _LAYOUT)
    kinds = random_kinds(rng)
    objects = place(rng, kinds[:1] if alone else kinds)
    return Scene(seed, size, objects, pick(rng, BACKGROUNDS))


def scene_generator(seed: int, stream: int) -> np.random.Generator:
    """The random stream numbered `stream` of the scene `seed`."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream))))


class SceneSource:
    """Scenes as a source of image-caption pairs.

    A function of (split, seed, index); the splits draw from disjoint seeds.  With `distinct`, no scene's objects are
    all found in another scene of the split, counted and with their sizes: a caption that names all objects is then
    true of its own scene alone.  Such a source gives that one caption a scene; others give three.

    Args:
        count: number of scenes.
        split: 'train', 'validation', 'test', or 'figures': for training, of one figure each.
        seed: any non-negative integer; another seed gives other scenes.
        distinct: see above; meant for evaluation.
        size: side of the pictures in pixels.

    Raises:
        TercetError: an unknown split, a count below 1, or more distinct scenes than there are.
    """

    def __init__(
        self, count: int, split: str = "train", seed: int = 0, *, distinct: bool = False, size: int = SCENE_SIZE
    ) -> None:
        if split not in _MARKS:
            raise TercetError(f"no split named {split!r} of 'scenes'; choose one of {', '.join(_MARKS)}")
        if count < 1:
            raise TercetError(f"{count} scenes asked for; ask for at least 1")
        self.image_count = count
        self.split = split
        self.seed = seed
        self.distinct = distinct
        self.size = size
        self.caption_counts = np.full(count, 1 if distinct else 3, np.int64)
        self.rejected: list[str] = []
        self.image_ids = np.arange(count)
        self.block_size = 1
        self.has_samples = False
        self._seeds = _distinct_seeds(count, split, seed) if distinct else None

    def __len__(self) -> int:
        return self.image_count

    def scene(self, index: int) -> Scene:
        """The scene at `index`.

        Raises:
            IndexError: `index` is outside 0 … count - 1.
        """
        if not 0 <= index < self.image_count:
            raise IndexError(f"scene {index} of a source of {self.image_count}")
        seed = next(_seeds_of(self.split, self.seed, index)) if self._seeds is None else int(self._seeds[index])
        return draw_scene(seed, self.size, alone=self.split == FIGURES)

    def pixels(self, index: int, pixel_limit: int) -> np.ndarray:
        """As `array`."""
        return self.array(index)

    def array(self, index: int) -> np.ndarray:
        """The picture without the detour over PNG: uint8 [size, size, 3], RGB."""
        return self.scene(index).image

    def image(self, index: int) -> bytes:
        """The picture as PNG."""
        return encode_png(self.array(index))

    def captions(self, index: int) -> list[str]:
        """The captions of the scene at `index`; the first names all objects."""
        captions = self.scene(index).captions
        return captions[:1] if self.distinct else captions

    def key(self, index: int) -> str:
        """A name for messages: 'scenes:test#12'."""
        return f"scenes:{self.split}#{index}"


def encode_png(image: np.ndarray) -> bytes:
    """PNG of an RGB picture, uint8 [height, width, 3], lightly compressed."""
    done, data = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]), (cv2.IMWRITE_PNG_COMPRESSION, 1))
    if not done:
        raise TercetError(f"cannot encode a picture of shape {image.shape} as PNG")
    return data.tobytes()


def _seeds_of(split: str, seed: int, index: int) -> Iterator[int]:
    """Candidate scene seeds for one place of a split.  The lowest two bits carry the split, so that none is shared."""
    for attempt in itertools.count():
        state = np.random.SeedSequence((_MARKS[split], seed, index, attempt)).generate_state(1, np.uint64)
        yield int(state[0]) >> 2 << 2 | _MARKS[split]


def _distinct_seeds(count: int, split: str, seed: int) -> np.ndarray:
    """Seeds of scenes none of which has all its objects in another: uint64 [count]."""
    seeds = np.empty(count, np.uint64)
    taken: set[tuple[Kind, ...]] = set()
    contained: set[tuple[Kind, ...]] = set()
    for index in range(count):
        for candidate in itertools.islice(_seeds_of(split, seed, index), MAX_ATTEMPTS):
            kinds = tuple(sorted(random_kinds(scene_generator(candidate, _LAYOUT))))
            parts = {part for length in range(1, len(kinds) + 1) for part in itertools.combinations(kinds, length)}
            if kinds not in contained and taken.isdisjoint(parts):
                break
        else:
            raise TercetError(f"only {index} distinct scenes found for {split!r}; ask for fewer than {count}")
        seeds[index] = candidate
        taken.add(kinds)
        contained |= parts
    return seeds
