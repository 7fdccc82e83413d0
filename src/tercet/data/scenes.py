"""Synthetic scenes: a few shapes on a background, with true captions, written as the files that users have.

A scene follows from one number.  Lengths are shares of the picture's side, so that a scene does not depend on the size
it is drawn at.  `scene_files` writes scenes as tar shards of pairs and as annotation files of the tasks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from tercet.errors import TercetError

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("plain", "gradient", "striped", "speckled", "noise")
SCENE_SIZE = 64
RADII = {"small": (0.100, 0.120), "large": (0.172, 0.205)}
OBJECT_COUNT_SHARES = (0.20, 0.27, 0.27, 0.26)  # of scenes with 1, 2, 3 and 4 objects
MAX_LARGE = 3  # a fourth large object would hardly ever fit

# The lowest two bits of a scene's seed say its split.  `shapes`: one object each, to learn colours and shapes from.
SPLITS = {"train": 0, "validation": 1, "test": 2, "shapes": 3}
HELD_OUT = ("validation", "test")
MAX_ATTEMPTS = 2000  # layouts tried for one scene of a held-out split
_LAYOUT, _PIXELS, _WORDS = 0, 1, 2  # separate random streams, so that a new caption form changes no picture

MAX_WORDS = 23  # a word more and the tokens, [CLS] included, would pass the default limit of 25
NOUNS = {shape: (shape,) for shape in SHAPES} | {
    "circle": ("circle", "circle", "disc"),
    "ring": ("ring", "ring", "hoop"),
    "diamond": ("diamond", "diamond", "rhombus"),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "beside", "next to"),
    "right": ("right of", "to the right of", "beside", "next to"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}
OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image with ", "here we see ", "this shows ")

T = TypeVar("T")


class Kind(NamedTuple):
    """What words can say of one object by itself."""

    colour: str
    shape: str
    size: str


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: its kind, centre and radius (shares of the side; y grows downward) and its turn in radians."""

    kind: Kind
    x: float
    y: float
    radius: float
    angle: float

    @property
    def colour(self) -> str:
        return self.kind.colour

    @property
    def shape(self) -> str:
        return self.kind.shape

    @property
    def size(self) -> str:
        return self.kind.size


@dataclass(frozen=True)
class Scene:
    """A scene: its objects, its picture and its captions.  Picture and captions are made when first read."""

    seed: int
    size: int
    objects: tuple[SceneObject, ...]
    background: str

    @functools.cached_property
    def image(self) -> np.ndarray:
        """uint8 `[size, size, 3]`, RGB."""
        from tercet.data.scene_drawing import draw

        return draw(self.objects, self.background, self.size, scene_generator(self.seed, _PIXELS))

    @functools.cached_property
    def captions(self) -> list[str]:
        """Three different true captions; the first two name all objects with colour, shape, size and number.

        The third is casual: it may omit sizes, name a corner, or name the background.
        """
        rng = scene_generator(self.seed, _WORDS)
        captions: list[str] = []
        writers = (_complete_caption, _complete_caption, _casual_caption)
        while len(captions) < len(writers):
            caption = writers[len(captions)](self, rng)
            if caption not in captions and len(caption.split()) <= MAX_WORDS:
                captions.append(caption)
        return captions

    @functools.cached_property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Each object's box (left, top, right, bottom) in pixels."""
        from tercet.data.scene_drawing import bounding_box

        return [bounding_box(item, self.size) for item in self.objects]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The sorted (colour, shape, size) of all objects, repeated ones as often as they occur."""
        return tuple(sorted(item.kind for item in self.objects))


def draw_scene(seed: int, size: int = SCENE_SIZE) -> Scene:
    """The scene of `seed` (any non-negative integer), `size` pixels a side."""
    rng = scene_generator(seed, _LAYOUT)
    kinds = random_kinds(rng)
    objects = arrange(rng, kinds[:1] if seed % 4 == SPLITS["shapes"] else kinds)
    return Scene(seed, size, objects, pick(rng, BACKGROUNDS))


def split_scenes(split: str, count: int, start: int = 0) -> Iterator[Scene]:
    """Scenes `start` to `start + count` of a split; no two splits share a seed.

    In the held-out splits no scene's objects are all found in another scene, counted and with their sizes: a caption
    that names all objects is then true of its own scene alone.

    Raises:
        TercetError: a held-out split has fewer scenes.
    """
    if split in HELD_OUT:
        seeds = itertools.islice(_distinct_seeds(split), start, start + count)
    else:
        seeds = (next(_candidate_seeds(split, index)) for index in range(start, start + count))
    yield from map(draw_scene, seeds)


def scene_generator(seed: int, stream: int) -> np.random.Generator:
    """The random stream numbered `stream` of the scene `seed`."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream))))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely as the others."""
    return options[int(rng.integers(len(options)))]


def relation(first: SceneObject, second: SceneObject) -> str | None:
    """How `first` lies to `second`: left, right, above or below; None when no direction clearly prevails."""
    across, down = first.x - second.x, first.y - second.y
    if abs(across) >= 0.14 and abs(across) >= 1.6 * abs(down):
        return "left" if across < 0 else "right"
    if abs(down) >= 0.14 and abs(down) >= 1.6 * abs(across):
        return "above" if down < 0 else "below"
    return None


def random_kind(rng: np.random.Generator) -> Kind:
    """Any colour, shape and size, all equally likely."""
    return Kind(pick(rng, COLOURS), pick(rng, SHAPES), pick(rng, SIZES))


def random_kinds(rng: np.random.Generator) -> list[Kind]:
    """The kinds of one scene's objects.

    Some scenes hold several of one kind, so that captions count; some objects share the colour or the shape of another,
    so that a caption is more than the set of its words.
    """
    count = 1 + int(np.searchsorted(np.cumsum(OBJECT_COUNT_SHARES)[:-1], rng.random(), side="right"))
    while True:
        first = random_kind(rng)
        copies = int(rng.integers(2, count + 1)) if count > 1 and rng.random() < 0.3 else 1
        kinds = [first] * copies
        while len(kinds) < count:
            kind, share = random_kind(rng), rng.random()
            if share < 0.25:
                kind = kind._replace(colour=pick(rng, kinds).colour)
            elif share < 0.5:
                kind = kind._replace(shape=pick(rng, kinds).shape)
            kinds.append(kind)
        if sum(kind.size == "large" for kind in kinds) <= MAX_LARGE:
            return kinds


def arrange(
    rng: np.random.Generator, kinds: Sequence[Kind], accept: Callable[[tuple[SceneObject, ...]], bool] | None = None
) -> tuple[SceneObject, ...]:
    """Objects of these kinds (at most four, `MAX_LARGE` of them large) apart from one another and inside the picture.

    Layouts are drawn until `accept` holds.
    """
    while True:
        objects = _try_to_arrange(rng, kinds)
        if objects is not None and (accept is None or accept(objects)):
            return objects


def _try_to_arrange(rng: np.random.Generator, kinds: Sequence[Kind]) -> tuple[SceneObject, ...] | None:
    placed: list[SceneObject] = []
    for kind in kinds:
        low, high = RADII[kind.size]
        radius = low + (high - low) * rng.random()
        margin = 1.1 * radius
        for _ in range(20):
            x, y = (margin + (1 - 2 * margin) * rng.random(2)).tolist()
            if all(math.hypot(x - other.x, y - other.y) > radius + other.radius + 0.02 for other in placed):
                placed.append(SceneObject(kind, x, y, radius, (rng.random() - 0.5) * 0.5))
                break
        else:
            return None
    return tuple(placed)


def _candidate_seeds(split: str, index: int) -> Iterator[int]:
    """Scene seeds to try for scene `index` of a split."""
    for attempt in itertools.count():
        state = np.random.SeedSequence((SPLITS[split], 0, index, attempt)).generate_state(1, np.uint64)
        yield int(state[0]) >> 2 << 2 | SPLITS[split]


def _distinct_seeds(split: str) -> Iterator[int]:
    """Seeds of scenes none of which has all its objects in another."""
    taken: set[tuple[Kind, ...]] = set()
    contained: set[tuple[Kind, ...]] = set()
    for index in itertools.count():
        for seed in itertools.islice(_candidate_seeds(split, index), MAX_ATTEMPTS):
            kinds = tuple(sorted(random_kinds(scene_generator(seed, _LAYOUT))))
            parts = {part for length in range(1, len(kinds) + 1) for part in itertools.combinations(kinds, length)}
            if kinds not in contained and taken.isdisjoint(parts):
                break
        else:
            raise TercetError(f"only {index} distinct scenes found for {split!r}; ask for fewer")
        yield seed
        taken.add(kinds)
        contained |= parts


def plural(noun: str) -> str:
    """The plural of a shape's noun."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(phrase: str) -> str:
    """The phrase with 'a' or 'an' before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _complete_caption(scene: Scene, rng: np.random.Generator) -> str:
    """All objects with colour, shape, size and number; a relation of two of them where there is a clear one."""
    groups = Counter(item.kind for item in scene.objects)
    if rng.random() < 0.5:
        single = [item for item in scene.objects if groups[item.kind] == 1]
        pairs = [(first, second) for first in single for second in single if relation(first, second) is not None]
        if pairs:
            first, second = pick(rng, pairs)
            rest = [kind for kind in groups if kind not in (first.kind, second.kind)]
            caption = _related(first, second, rng)
            return caption + (
                pick(rng, (" and also ", " along with ", " with ")) + _list(rest, groups, rng) if rest else ""
            )
    named = _list(list(groups), groups, rng)
    if len(scene.objects) == 1 and rng.random() < 0.4:
        return named + pick(rng, (" alone", " and nothing else", " by itself"))
    if rng.random() < 0.2:
        verb = "is" if named.startswith(("a ", "an ")) else "are"
        return f"there {verb} {named}"
    return pick(rng, OPENINGS) + named


def _related(first: SceneObject, second: SceneObject, rng: np.random.Generator) -> str:
    direction = relation(first, second)
    assert direction is not None
    words = pick(rng, RELATION_WORDS[direction])
    verb = pick(rng, ("", "", "is ", "lies "))
    return f"{_name(first.kind, 1, rng)} {verb}{words} {_name(second.kind, 1, rng)}"


def _casual_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A looser caption: no sizes, or one object in its corner, or the number of all shapes."""
    groups = Counter((item.colour, item.shape) for item in scene.objects)
    loose = {Kind(colour, shape, ""): count for (colour, shape), count in groups.items()}
    form = int(rng.integers(4))
    if form == 0:
        # Clearly in a corner of the picture.
        cornered = [item for item in scene.objects if min(abs(item.x - 0.5), abs(item.y - 0.5)) >= 0.16]
        if cornered:
            item = pick(rng, cornered)
            name, side = _name(item.kind, 1, rng), "left" if item.x < 0.5 else "right"
            high, upper = ("top", "upper") if item.y < 0.5 else ("bottom", "lower")
            return f"{name} {pick(rng, (f'in the {high} {side} corner', f'at the {upper} {side}'))}"
    if form == 1 and len(scene.objects) > 1:
        item = pick(rng, scene.objects)
        things = pick(rng, ("shapes", "figures", "objects"))
        return f"{NUMBERS[len(scene.objects)]} {things} with {_name(item.kind, 1, rng)} among them"
    named = pick(rng, OPENINGS) + _list(list(loose), loose, rng)
    if form == 2 and scene.background in ("striped", "speckled"):
        return f"{named} on a {scene.background} {pick(rng, ('background', 'ground'))}"
    return named


def _list(kinds: list[Kind], counts: dict[Kind, int], rng: np.random.Generator) -> str:
    """'a small red circle, two big blue stars and a tiny green heart', in any order."""
    names = [_name(kinds[i], counts[kinds[i]], rng) for i in rng.permutation(len(kinds))]
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:-1]) + " and " + names[-1]


def _name(kind: Kind, count: int, rng: np.random.Generator) -> str:
    noun = pick(rng, NOUNS[kind.shape])
    size = pick(rng, SIZE_WORDS[kind.size]) + " " if kind.size else ""
    if count == 1:
        return with_article(f"{size}{kind.colour} {noun}")
    return f"{NUMBERS[count]} {size}{kind.colour} {plural(noun)}"
