"""What stands where in a drawn scene: the objects, their geometry and the relations between them.

Lengths are shares of the picture's side, so that a layout does not depend on the size it is drawn at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("plain", "gradient", "striped", "speckled", "noise")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RADII = {"small": (0.100, 0.120), "large": (0.172, 0.205)}
OBJECT_COUNT_SHARES = (0.20, 0.27, 0.27, 0.26)  # of scenes with 1, 2, 3 and 4 objects
MAX_LARGE = 3  # a fourth large object would hardly ever find room

T = TypeVar("T")


class Kind(NamedTuple):
    """What words can say of one object by itself."""

    colour: str
    shape: str
    size: str


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One drawn object: its kind, centre, radius (shares of the side; y grows downward) and turn in radians."""

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

    Some scenes hold several of one kind, so that captions count; some objects share the colour or the shape of
    another, so that naming a picture takes more than the set of words in it.
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


def place(
    rng: np.random.Generator, kinds: Sequence[Kind], accept: Callable[[tuple[SceneObject, ...]], bool] | None = None
) -> tuple[SceneObject, ...]:
    """Give every kind a place of its own, apart from the others and inside the picture.

    Args:
        kinds: at most four, of which at most `MAX_LARGE` large.
        accept: a further condition on the whole layout; layouts are drawn until it holds.
    """
    while True:
        objects = _try_place(rng, kinds)
        if objects is not None and (accept is None or accept(objects)):
            return objects


def _try_place(rng: np.random.Generator, kinds: Sequence[Kind]) -> tuple[SceneObject, ...] | None:
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
