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

import cv2
import numpy as np

from tercet.errors import TercetError

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
COLOUR_VALUES = {
    "red": (212, 32, 38),
    "orange": (250, 134, 10),
    "yellow": (248, 222, 44),
    "green": (34, 150, 58),
    "blue": (36, 80, 214),
    "purple": (134, 40, 168),
    "black": (20, 20, 22),
    "white": (247, 247, 245),
}
COLOURS = tuple(COLOUR_VALUES)
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
SUPERSAMPLING = 4
FRACTION_BITS = 4  # of the fixed-point coordinates that cv2.fillPoly takes
COLOUR_JITTER = 14.0  # largest shift of a channel, out of 255
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
            words = pick(rng, RELATION_WORDS[relation(first, second) or ""])
            verb = pick(rng, ("", "", "is ", "lies "))
            caption = f"{_name(first.kind, 1, rng)} {verb}{words} {_name(second.kind, 1, rng)}"
            joined_by = pick(rng, (" and also ", " along with ", " with ")) if rest else ""
            return caption + (joined_by + _list(rest, groups, rng) if rest else "")
    named = _list(list(groups), groups, rng)
    if len(scene.objects) == 1 and rng.random() < 0.4:
        return named + pick(rng, (" alone", " and nothing else", " by itself"))
    if rng.random() < 0.2:
        verb = "is" if named.startswith(("a ", "an ")) else "are"
        return f"there {verb} {named}"
    return pick(rng, OPENINGS) + named


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


def draw(objects: Sequence[SceneObject], background: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the objects over a background of the named kind: uint8 [size, size, 3], RGB."""
    canvas = _background(background, size, rng)
    for item in objects:
        shift = (rng.random(3) - 0.5) * 2 * COLOUR_JITTER
        colour = np.clip(np.array(COLOUR_VALUES[item.colour]) + shift, 0, 255).astype(np.float32)
        left, top, cover = _cover(item, size)
        height, width = cover.shape
        shade = 1.0 - 0.12 * rng.random() * np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        patch = canvas[top : top + height, left : left + width]
        patch += cover[:, :, None] * (colour * shade - patch)
    canvas += (rng.random(canvas.shape, dtype=np.float32) - 0.5) * 5
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def bounding_box(item: SceneObject, size: int) -> tuple[float, float, float, float]:
    """The object's box (left, top, right, bottom) in pixels of a picture of side `size`."""
    points = np.concatenate(_outlines(item)) * size
    (left, top), (right, bottom) = points.min(0), points.max(0)
    return float(left), float(top), float(right), float(bottom)


def _cover(item: SceneObject, size: int) -> tuple[int, int, np.ndarray]:
    """Left and top of a patch of the picture, and the share of each of its pixels that the object covers: float32."""
    left, top, right, bottom = bounding_box(item, size)
    left, top = max(math.floor(left), 0), max(math.floor(top), 0)
    width, height = min(math.ceil(right), size) - left, min(math.ceil(bottom), size) - top
    mask = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    scale = SUPERSAMPLING << FRACTION_BITS
    contours = [np.round((points * size - (left, top)) * scale).astype(np.int32) for points in _outlines(item)]
    cv2.fillPoly(mask, contours, 1, shift=FRACTION_BITS)  # even-odd rule: the second outline of a ring is its hole
    cells = mask.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
    return left, top, cells.sum((1, 3), dtype=np.uint8).astype(np.float32) / SUPERSAMPLING**2


def _outlines(item: SceneObject) -> list[np.ndarray]:
    """The object's closed outlines in shares of the side, each [points, 2]."""
    cosine, sine = math.cos(item.angle), math.sin(item.angle)
    turn = np.array([[cosine, sine], [-sine, cosine]]) * item.radius
    return [points @ turn + (item.x, item.y) for points in _unit_outlines(item.shape)]


@functools.cache
def _unit_outlines(shape: str) -> list[np.ndarray]:
    """Outlines of radius about 1 around the origin, chosen so that all shapes look equally large."""
    if shape == "circle":
        return [_polygon(40, 0.92)]
    if shape == "ring":
        return [_polygon(40, 1.0), _polygon(40, 0.55)]
    if shape == "square":
        return [_polygon(4, 1.16, turn=math.pi / 4)]
    if shape == "diamond":
        return [_polygon(4, 1.1) * np.array((0.72, 1.0))]
    if shape == "triangle":
        return [_polygon(3, 1.16) + np.array((0.0, 0.16))]
    if shape == "star":
        points = np.empty((10, 2))
        points[0::2], points[1::2] = _polygon(5, 1.12), _polygon(5, 0.46, turn=math.pi / 5)
        return [points + np.array((0.0, 0.05))]
    if shape == "cross":
        arm, end = 0.32, 1.0
        corner = np.array([(arm, -end), (arm, -arm), (end, -arm)])
        quarter = np.array([(0.0, 1.0), (-1.0, 0.0)])
        return [np.concatenate([corner @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])]
    if shape == "heart":
        along = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        across = 16 * np.sin(along) ** 3
        down = -(13 * np.cos(along) - 5 * np.cos(2 * along) - 2 * np.cos(3 * along) - np.cos(4 * along))
        return [np.stack([across / 16.5, down / 16.5 - 0.08], 1)]
    raise ValueError(f"no shape named {shape!r}")


def _polygon(corners: int, radius: float, turn: float = 0.0) -> np.ndarray:
    """A regular polygon with its first corner on top, unless turned: [corners, 2]."""
    angles = np.arange(corners) * (2 * math.pi / corners) + turn
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * radius


def _background(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A muted surface of middle brightness, on which every object colour stands out: float32 [size, size, 3]."""
    base = _muted_colour(rng)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = base
    if kind == "plain":
        return canvas
    if kind == "noise":
        coarse = (rng.random((16, 16, 1), dtype=np.float32) - 0.5) * 36
        return canvas + cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)[:, :, None]
    angle = rng.random() * 2 * math.pi
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    along = math.cos(angle) * steps[None, :] + math.sin(angle) * steps[:, None]
    if kind == "gradient":
        share = np.clip(along / 1.2 + 0.5, 0, 1)[:, :, None]
        return canvas + share * (_muted_colour(rng) - base)
    contrast = 16 + 10 * rng.random()
    if kind == "striped":
        waves = np.sin(along * (2 * math.pi * (6 + 4 * rng.random())))
        return canvas + np.clip(waves * 3, -1, 1)[:, :, None] * contrast
    if kind == "speckled":
        dots = (rng.random((size // 2, size // 2), dtype=np.float32) < 0.08).astype(np.float32)
        return canvas - cv2.resize(dots, (size, size), interpolation=cv2.INTER_LINEAR)[:, :, None] * (2 * contrast)
    raise ValueError(f"no background named {kind!r}")


def _muted_colour(rng: np.random.Generator) -> np.ndarray:
    brightness = 122 + 62 * rng.random()
    tint = (rng.random(3) - 0.5) * 40
    return (brightness + tint - tint.mean()).astype(np.float32)
