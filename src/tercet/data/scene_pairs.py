"""Statements about two drawn scenes, true or false, as in NLVR2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tercet.data.scene_captions import NUMBERS, plural, with_article
from tercet.data.scene_expressions import DIRECTION_WORDS
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
from tercet.data.scenes import SCENE_SIZE, Scene

Look = tuple[str, str]  # colour and shape
_STREAM = 6  # keeps these random streams apart from those of single scenes
_SENTENCE, _SCENES, _MORE_STATEMENTS = 0, 1, 2
_TRIES = 20  # sentences of a form that are tried on a pair before another form is


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


Objects = Sequence[SceneObject]


class Statement(NamedTuple):
    """A sentence about two pictures.

    Attributes:
        sentence: the sentence.
        build: what two pictures must hold for it to be true, or false.
        holds: whether it is true of the objects of a left and a right picture; None where that can be disputed.
    """

    sentence: str
    build: Callable[[np.random.Generator, bool], tuple[Wish, Wish]]
    holds: Callable[[Objects, Objects], bool | None]


def pair_statement(seed: int, size: int = SCENE_SIZE) -> PairStatement:
    """The pair numbered `seed`.

    Seeds 2n and 2n + 1 share their sentence; one of the two is true, the other false.  So no sentence tells its
    truth, and consistency (all pairs of a sentence right) can be measured.
    """
    words = _generator(seed // 2, _SENTENCE)
    statement = pick(words, _FORMS)(words, ())
    truth = bool(words.integers(2)) ^ bool(seed % 2)
    rng = _generator(seed, _SCENES)
    wishes = statement.build(rng, truth)
    first, second = (_fulfil(wish, rng, size) for wish in wishes)
    return PairStatement(first, second, statement.sentence, truth)


def shared_statements(pairs: Sequence[PairStatement], seed: int, count: int) -> list[list[tuple[str, bool]]]:
    """About `count` further statements about each of several pairs, and whether each is true.

    A sentence that is true of some of the pairs and false of others is told of one of each, so that here, too, no
    sentence tells its truth.

    Args:
        pairs: at least two.
        seed: of the choices.
        count: statements of a pair, on average at most.

    Returns:
        The statements of each pair.
    """
    rng = _generator(seed, _MORE_STATEMENTS)
    sides = [(pair.scene_a.objects, pair.scene_b.objects) for pair in pairs]
    told: list[dict[str, bool]] = [{pair.sentence: pair.truth} for pair in pairs]
    for own, (left, right) in enumerate(sides):
        near = [(item.colour, item.shape) for item in (*left, *right)]
        for _ in range(count // 2):
            form, truth = pick(rng, _FORMS), bool(rng.integers(2))
            for _ in range(_TRIES):
                statement = form(rng, near)
                if statement.sentence in told[own] or statement.holds(left, right) is not truth:
                    continue
                others = [
                    other
                    for other, objects in enumerate(sides)
                    if statement.sentence not in told[other] and statement.holds(*objects) is (not truth)
                ]
                if others:
                    told[own][statement.sentence] = truth
                    told[pick(rng, others)][statement.sentence] = not truth
                    break
    return [list(statements.items())[1:] for statements in told]


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


def _a_look(rng: np.random.Generator, near: Sequence[Look]) -> tuple[Look, str]:
    """Any colour and shape, or one like those of `near`, and its name."""
    if near and rng.random() < 0.8:
        colour, shape = pick(rng, near)
        if rng.random() < 0.25:
            shape = pick(rng, near)[1]
    else:
        colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    return (colour, shape), with_article(f"{colour} {shape}")


def _two_looks(rng: np.random.Generator, near: Sequence[Look]) -> tuple[tuple[Look, str], tuple[Look, str]]:
    first, second = _a_look(rng, near), _a_look(rng, near)
    while second == first:
        second = _a_look(rng, ())
    return first, second


def _a_shape(rng: np.random.Generator, near: Sequence[Look]) -> str:
    return pick(rng, near)[1] if near and rng.random() < 0.8 else pick(rng, SHAPES)


def _holding(look: Look, holds: bool) -> Wish:
    """A scene with the look, or one that has its colour or its shape but not both in one object."""
    return Wish((look,)) if holds else Wish(allowed=lambda other: other != look)


def _has(objects: Objects, look: Look) -> bool:
    return any((item.colour, item.shape) == look for item in objects)


def _count(objects: Objects, shape: str) -> int:
    return sum(item.shape == shape for item in objects)


def _presence(rng: np.random.Generator, near: Sequence[Look]) -> Statement:
    """Both, exactly one, at least one or neither of the pictures has an object."""
    look, name = _a_look(rng, near)
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

    def holds(left: Objects, other: Objects) -> bool:
        return (_has(left, look), _has(other, look)) in right

    return Statement(pick(rng, sentences).format(name), build, holds)


def _more(rng: np.random.Generator, near: Sequence[Look]) -> Statement:
    """One picture has more of a shape than the other."""
    shape, side = _a_shape(rng, near), pick(rng, ("left", "right"))

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        many = int(rng.integers(1, 4))
        few = int(rng.integers(0, many))
        if not truth and rng.random() < 0.3:
            few = many
        more, less = _counted(rng, shape, many), _counted(rng, shape, few)
        return (more, less) if (side == "left") == truth else (less, more)

    def holds(left: Objects, other: Objects) -> bool:
        gap = _count(left, shape) - _count(other, shape)
        return gap > 0 if side == "left" else gap < 0

    return Statement(f"the {side} picture has more {plural(shape)} than the other one", build, holds)


def _together(rng: np.random.Generator, near: Sequence[Look]) -> Statement:
    """The pictures have so many of a shape together."""
    shape, wanted = _a_shape(rng, near), int(rng.integers(2, 5))

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        total = wanted if truth else wanted + pick(rng, (-1, 1))
        left = int(rng.integers(max(0, total - 3), min(3, total) + 1))
        return _counted(rng, shape, left), _counted(rng, shape, total - left)

    def holds(left: Objects, other: Objects) -> bool:
        return _count(left, shape) + _count(other, shape) == wanted

    text = pick(rng, ("the two pictures have {} {} together", "taken together there are {} {}"))
    return Statement(text.format(NUMBERS[wanted], plural(shape)), build, holds)


def _counted(rng: np.random.Generator, shape: str, count: int) -> Wish:
    return Wish(tuple((pick(rng, COLOURS), shape) for _ in range(count)), lambda look: look[1] != shape)


def _equal_size(rng: np.random.Generator, near: Sequence[Look]) -> Statement:
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

    def holds(left: Objects, other: Objects) -> bool:
        return int(np.sign(len(left) - len(other))) in right

    return Statement(sentence, build, holds)


def _direction(rng: np.random.Generator, near: Sequence[Look]) -> Statement:
    """In one picture an object lies to a side of another; the other picture holds the same two, either way round."""
    (first, first_name), (second, second_name) = _two_looks(rng, near)
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

    def holds(left: Objects, other: Objects) -> bool | None:
        objects = left if side == "left" else other
        pairs = [(a, b) for a in objects if _has([a], first) for b in objects if _has([b], second)]
        found = {relation(a, b) for a, b in pairs}
        if direction in found:
            return True
        return False if found == {OPPOSITE[direction]} else None

    return Statement(f"in the {side} picture {first_name} is {DIRECTION_WORDS[direction]} {second_name}", build, holds)


def _divided(rng: np.random.Generator, near: Sequence[Look]) -> Statement:
    """One object in one picture and another in the other, or the other way round."""
    (first, first_name), (second, second_name) = _two_looks(rng, near)
    side = pick(rng, ("left", "right"))

    def build(rng: np.random.Generator, truth: bool) -> tuple[Wish, Wish]:
        def wish(look: Look) -> Wish:
            return Wish((look,), lambda other: other not in (first, second))

        return (wish(first), wish(second)) if (side == "left") == truth else (wish(second), wish(first))

    def holds(left: Objects, other: Objects) -> bool:
        told, second_told = (left, other) if side == "left" else (other, left)
        return _has(told, first) and _has(second_told, second)

    return Statement(f"the {side} picture has {first_name} and the other one has {second_name}", build, holds)


_FORMS: tuple[Callable[[np.random.Generator, Sequence[Look]], Statement], ...] = (
    _presence,
    _presence,
    _more,
    _together,
    _equal_size,
    _direction,
    _divided,
)
