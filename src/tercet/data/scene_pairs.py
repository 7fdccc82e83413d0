"""Statements about two drawn scenes, true or false, as in NLVR2."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tercet.data.scene_captions import NUMBERS, plural, with_article
from tercet.data.scene_layout import (
    BACKGROUNDS,
    COLOURS,
    MAX_LARGE,
    OPPOSITE,
    SHAPES,
    SIZES,
    Kind,
    SceneObject,
    pick,
    place,
    relation,
)
from tercet.data.scene_tasks import DIRECTION_WORDS
from tercet.data.scenes import SCENE_SIZE, Scene

Look = tuple[str, str]  # colour and shape
_STREAM = 6  # keeps these random streams apart from those of single scenes


class PairStatement(NamedTuple):
    """Two scenes, left and right, and a sentence that is true of them or not."""

    scene_a: Scene
    scene_b: Scene
    sentence: str
    truth: bool


class Wish(NamedTuple):
    """What one of the two scenes must hold: looks, the looks of further objects, the layout, the number of objects."""

    looks: tuple[Look, ...] = ()
    allowed: Callable[[Look], bool] = lambda look: True
    accept: Callable[[tuple[SceneObject, ...]], bool] | None = None
    total: int | None = None


Build = Callable[[np.random.Generator, bool], tuple[Wish, Wish]]


def pair_statement(seed: int, size: int = SCENE_SIZE) -> PairStatement:
    """The pair numbered `seed`.

    Seeds 2n and 2n + 1 share their sentence; one of the two is true, the other false.  So no sentence tells its
    truth, and consistency (all pairs of a sentence right) can be measured.
    """
    words = _generator(seed // 2, 0)
    sentence, build = pick(words, _FORMS)(words)
    truth = bool(words.integers(2)) ^ bool(seed % 2)
    rng = _generator(seed, 1)
    wishes = build(rng, truth)
    first, second = (_fulfil(wish, rng, size) for wish in wishes)
    return PairStatement(first, second, sentence, truth)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _STREAM, stream))))


def _fulfil(wish: Wish, rng: np.random.Generator, size: int) -> Scene:
    """A scene that holds what is wished for, and further objects that are allowed."""
    least = max(1, len(wish.looks))
    count = wish.total or int(rng.integers(least, max(least, 4) + 1))
    looks = list(wish.looks)
    while len(looks) < count:
        look = pick(rng, COLOURS), pick(rng, SHAPES)
        if wish.allowed(look):
            looks.append(look)
    while True:
        kinds = [Kind(colour, shape, pick(rng, SIZES)) for colour, shape in looks]
        if sum(kind.size == "large" for kind in kinds) <= MAX_LARGE:
            break
    objects = place(rng, kinds, wish.accept)
    return Scene(int(rng.integers(2**62)), size, objects, pick(rng, BACKGROUNDS))


def _a_look(rng: np.random.Generator) -> tuple[Look, str]:
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    return (colour, shape), with_article(f"{colour} {shape}")


def _holding(look: Look, holds: bool) -> Wish:
    """A scene with the look, or one that has its colour or its shape but not both in one object."""
    return Wish((look,)) if holds else Wish(allowed=lambda other: other != look)


def _presence(rng: np.random.Generator) -> tuple[str, Build]:
    """Both, exactly one, at least one or neither of the pictures has an object."""
    look, name = _a_look(rng)
    sentences, right = pick(
        rng,
        (
            (("both pictures show {}", "there is {} in each picture"), {(True, True)}),
            (("exactly one picture shows {}", "there is {} in only one picture"), {(True, False), (False, True)}),
            (("at least one picture shows {}",), {(True, True), (True, False), (False, True)}),
            (("neither picture shows {}", "neither of the pictures has {}"), {(False, False)}),
        ),
    )

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        cases = [(a, b) for a in (True, False) for b in (True, False) if ((a, b) in right) == truth]
        left, other = pick(rng, cases)
        return _holding(look, left), _holding(look, other)

    return pick(rng, sentences).format(name), build


def _more(rng: np.random.Generator) -> tuple[str, Build]:
    """One picture has more of a shape than the other."""
    shape, side = pick(rng, SHAPES), pick(rng, ("left", "right"))

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        many = int(rng.integers(1, 4))
        few = int(rng.integers(0, many))
        if not truth and rng.random() < 0.3:
            few = many
        more, less = _counted(rng, shape, many), _counted(rng, shape, few)
        return (more, less) if (side == "left") == truth else (less, more)

    return f"the {side} picture has more {plural(shape)} than the other one", build


def _together(rng: np.random.Generator) -> tuple[str, Build]:
    """The pictures have so many of a shape together."""
    shape, wanted = pick(rng, SHAPES), int(rng.integers(2, 5))

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        total = wanted if truth else wanted + pick(rng, (-1, 1))
        left = int(rng.integers(max(0, total - 3), min(3, total) + 1))
        return _counted(rng, shape, left), _counted(rng, shape, total - left)

    text = pick(rng, ("the two pictures have {} {} together", "taken together there are {} {}"))
    return text.format(NUMBERS[wanted], plural(shape)), build


def _counted(rng: np.random.Generator, shape: str, count: int) -> Wish:
    return Wish(tuple((pick(rng, COLOURS), shape) for _ in range(count)), lambda look: look[1] != shape)


def _equal_size(rng: np.random.Generator) -> tuple[str, Build]:
    """The pictures have equally many figures, or one has more."""
    sentence, right = pick(
        rng,
        (
            ("both pictures have the same number of figures", (0,)),
            ("the left picture has more figures than the right one", (1,)),
            ("the right picture has more figures than the left one", (-1,)),
            ("the pictures differ in their number of figures", (-1, 1)),
        ),
    )

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        sign = pick(rng, [sign for sign in (-1, 0, 1) if (sign in right) == truth])
        low = int(rng.integers(1, 5 if sign == 0 else 4))
        high = low if sign == 0 else int(rng.integers(low + 1, 5))
        left, other = (high, low) if sign >= 0 else (low, high)
        return Wish(total=left), Wish(total=other)

    return sentence, build


def _direction(rng: np.random.Generator) -> tuple[str, Build]:
    """In one picture an object lies to a side of another; the other picture holds the same two, either way round."""
    (first, first_name), (second, second_name) = _a_look(rng), _a_look(rng)
    while second == first:
        second, second_name = _a_look(rng)
    side, direction = pick(rng, ("left", "right")), pick(rng, tuple(OPPOSITE))

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        def wish(direction: str) -> Wish:
            return Wish(
                (first, second),
                lambda look: look not in (first, second),
                lambda objects: relation(objects[0], objects[1]) == direction,
            )

        told = wish(direction if truth else OPPOSITE[direction])
        other = wish(pick(rng, (direction, OPPOSITE[direction])))
        return (told, other) if side == "left" else (other, told)

    return f"in the {side} picture {first_name} is {DIRECTION_WORDS[direction]} {second_name}", build


def _divided(rng: np.random.Generator) -> tuple[str, Build]:
    """One object in one picture and another in the other, or the other way round."""
    (first, first_name), (second, second_name) = _a_look(rng), _a_look(rng)
    while second == first:
        second, second_name = _a_look(rng)
    side = pick(rng, ("left", "right"))

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        def wish(look: Look) -> Wish:
            return Wish((look,), lambda other: other not in (first, second))

        return (wish(first), wish(second)) if (side == "left") == truth else (wish(second), wish(first))

    return f"the {side} picture has {first_name} and the other one has {second_name}", build


_FORMS: tuple[Callable[[np.random.Generator], tuple[str, Build]], ...] = (
    _presence,
    _presence,
    _more,
    _together,
    _equal_size,
    _direction,
    _divided,
)
