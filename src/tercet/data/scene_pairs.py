"""Statements about two synthetic scenes, true or false, as in NLVR2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tercet.data.scene_tasks import DIRECTION_WORDS, OPPOSITE
from tercet.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_LARGE,
    NUMBERS,
    SCENE_SIZE,
    SHAPES,
    SIZES,
    Kind,
    Scene,
    SceneObject,
    arrange,
    pick,
    plural,
    relation,
    with_article,
)

Rng = np.random.Generator
Look = tuple[str, str]  # colour and shape
Objects = Sequence[SceneObject]
_STREAM = 6  # keeps these random streams apart from those of single scenes
_SENTENCE, _SCENES, _SHARED = 0, 1, 2
_TRIES = 20  # sentences of a form that are tried on a pair before another form is


class ScenePair(NamedTuple):
    """Two scenes, and a sentence that is true of them or not."""

    left: Scene
    right: Scene
    sentence: str
    truth: bool


class Wanted(NamedTuple):
    """What one of two scenes must hold: looks, which further looks, the layout, and the number of objects (0: any)."""

    looks: Sequence[Look] = ()
    allowed: Callable[[Look], bool] = lambda look: True
    accept: Callable[[tuple[SceneObject, ...]], bool] | None = None
    total: int = 0


class Statement(NamedTuple):
    """A sentence about two pictures.

    Attributes:
        sentence: the sentence.
        build: what the left and the right picture must hold for it to be true, or false.
        holds: whether it is true of the objects of a left and a right picture; None where that can be disputed.
    """

    sentence: str
    build: Callable[[Rng, bool], tuple[Wanted, Wanted]]
    holds: Callable[[Objects, Objects], bool | None]


def draw_pair(seed: int) -> ScenePair:
    """The pair numbered `seed`.

    Seeds 2n and 2n + 1 share their sentence, true of one and false of the other.  So no sentence tells its truth, and
    consistency (all pairs of a sentence right) can be measured.
    """
    words = _generator(seed // 2, _SENTENCE)
    statement = pick(words, _FORMS)(words, ())
    truth = bool(words.integers(2)) ^ bool(seed % 2)
    rng = _generator(seed, _SCENES)
    left, right = (_fulfil(wanted, rng) for wanted in statement.build(rng, truth))
    return ScenePair(left, right, statement.sentence, truth)


def shared_statements(pairs: Sequence[ScenePair], seed: int, count: int) -> list[list[tuple[str, bool]]]:
    """About `count` further statements about each of several pairs, and whether each is true.

    Each sentence is said of two of the pairs, true of one and false of the other, so that none tells its truth.
    """
    rng = _generator(seed, _SHARED)
    sides = [(pair.left.objects, pair.right.objects) for pair in pairs]
    found: list[dict[str, bool]] = [{pair.sentence: pair.truth} for pair in pairs]
    for own, (left, right) in enumerate(sides):
        near = [(item.colour, item.shape) for item in (*left, *right)]
        for _ in range(count // 2):
            form, truth = pick(rng, _FORMS), bool(rng.integers(2))
            for _ in range(_TRIES):
                statement = form(rng, near)
                if statement.sentence in found[own] or statement.holds(left, right) is not truth:
                    continue
                others = [
                    other
                    for other, objects in enumerate(sides)
                    if statement.sentence not in found[other] and statement.holds(*objects) is (not truth)
                ]
                if others:
                    found[own][statement.sentence] = truth
                    found[pick(rng, others)][statement.sentence] = not truth
                    break
    return [list(statements.items())[1:] for statements in found]


def _generator(seed: int, stream: int) -> Rng:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _STREAM, stream))))


def _fulfil(wanted: Wanted, rng: Rng) -> Scene:
    """A scene that holds what is wanted, and further objects that are allowed."""
    least = max(1, len(wanted.looks))
    count = wanted.total or int(rng.integers(least, max(least, 4) + 1))
    looks = list(wanted.looks)
    while len(looks) < count:
        look = pick(rng, COLOURS), pick(rng, SHAPES)
        if wanted.allowed(look):
            looks.append(look)
    while True:
        kinds = [Kind(colour, shape, pick(rng, SIZES)) for colour, shape in looks]
        if sum(kind.size == "large" for kind in kinds) <= MAX_LARGE:
            break
    objects = arrange(rng, kinds, wanted.accept)
    return Scene(int(rng.integers(2**62)), SCENE_SIZE, objects, pick(rng, BACKGROUNDS))


def _a_look(rng: Rng, near: Sequence[Look]) -> Look:
    """Any colour and shape, or one like those of `near`."""
    if near and rng.random() < 0.8:
        colour, shape = pick(rng, near)
        return colour, pick(rng, near)[1] if rng.random() < 0.25 else shape
    return pick(rng, COLOURS), pick(rng, SHAPES)


def _two_looks(rng: Rng, near: Sequence[Look]) -> tuple[Look, Look]:
    first, second = _a_look(rng, near), _a_look(rng, near)
    while second == first:
        second = _a_look(rng, ())
    return first, second


def _a_shape(rng: Rng, near: Sequence[Look]) -> str:
    return pick(rng, near)[1] if near and rng.random() < 0.8 else pick(rng, SHAPES)


def _name(look: Look) -> str:
    return with_article(" ".join(look))


def _has(objects: Objects, look: Look) -> bool:
    return any((item.colour, item.shape) == look for item in objects)


def _count(objects: Objects, shape: str) -> int:
    return sum(item.shape == shape for item in objects)


def _exactly(rng: Rng, shape: str, count: int) -> Wanted:
    return Wanted([(pick(rng, COLOURS), shape) for _ in range(count)], lambda look: look[1] != shape)


def _presence(rng: Rng, near: Sequence[Look]) -> Statement:
    """Both, exactly one, at least one or neither of the pictures has an object."""
    look = _a_look(rng, near)
    sentences, right = pick(
        rng,
        (
            (("both pictures show {}", "there is {} in each picture"), {(True, True)}),
            (("exactly one picture shows {}", "there is {} in only one picture"), {(True, False), (False, True)}),
            (("at least one picture shows {}",), {(True, True), (True, False), (False, True)}),
            (("neither picture shows {}", "neither of the pictures has {}"), {(False, False)}),
        ),
    )

    def build(rng: Rng, truth: bool) -> tuple[Wanted, Wanted]:
        cases = [(a, b) for a in (True, False) for b in (True, False) if ((a, b) in right) == truth]
        left, other = (Wanted((look,)) if has else Wanted(allowed=lambda own: own != look) for has in pick(rng, cases))
        return left, other

    return Statement(
        pick(rng, sentences).format(_name(look)),
        build,
        lambda left, other: (_has(left, look), _has(other, look)) in right,
    )


def _more(rng: Rng, near: Sequence[Look]) -> Statement:
    """One picture has more of a shape than the other."""
    shape, side = _a_shape(rng, near), pick(rng, ("left", "right"))

    def build(rng: Rng, truth: bool) -> tuple[Wanted, Wanted]:
        many = int(rng.integers(1, 4))
        few = int(rng.integers(0, many))
        if not truth and rng.random() < 0.3:
            few = many
        more, less = _exactly(rng, shape, many), _exactly(rng, shape, few)
        return (more, less) if (side == "left") == truth else (less, more)

    def holds(left: Objects, other: Objects) -> bool:
        gap = _count(left, shape) - _count(other, shape)
        return gap > 0 if side == "left" else gap < 0

    return Statement(f"the {side} picture has more {plural(shape)} than the other one", build, holds)


def _together(rng: Rng, near: Sequence[Look]) -> Statement:
    """The pictures have so many of a shape together."""
    shape, wanted = _a_shape(rng, near), int(rng.integers(2, 5))

    def build(rng: Rng, truth: bool) -> tuple[Wanted, Wanted]:
        total = wanted if truth else wanted + pick(rng, (-1, 1))
        left = int(rng.integers(max(0, total - 3), min(3, total) + 1))
        return _exactly(rng, shape, left), _exactly(rng, shape, total - left)

    text = pick(rng, ("the two pictures have {} {} together", "taken together there are {} {}"))
    return Statement(
        text.format(NUMBERS[wanted], plural(shape)),
        build,
        lambda left, other: _count(left, shape) + _count(other, shape) == wanted,
    )


def _equal_size(rng: Rng, near: Sequence[Look]) -> Statement:
    """The pictures have equally many objects, or one has more."""
    sentence, right = pick(
        rng,
        (
            ("both pictures have the same number of figures", (0,)),
            ("the left picture has more figures than the right one", (1,)),
            ("the right picture has more figures than the left one", (-1,)),
            ("the pictures differ in their number of figures", (-1, 1)),
        ),
    )

    def build(rng: Rng, truth: bool) -> tuple[Wanted, Wanted]:
        sign = pick(rng, [sign for sign in (-1, 0, 1) if (sign in right) == truth])
        low = int(rng.integers(1, 5 if sign == 0 else 4))
        high = low if sign == 0 else int(rng.integers(low + 1, 5))
        left, other = (high, low) if sign >= 0 else (low, high)
        return Wanted(total=left), Wanted(total=other)

    return Statement(sentence, build, lambda left, other: int(np.sign(len(left) - len(other))) in right)


def _direction(rng: Rng, near: Sequence[Look]) -> Statement:
    """In one picture an object lies to a side of another; the other picture holds the same two, either way round."""
    first, second = _two_looks(rng, near)
    side, direction = pick(rng, ("left", "right")), pick(rng, tuple(DIRECTION_WORDS))

    def build(rng: Rng, truth: bool) -> tuple[Wanted, Wanted]:
        def wanted(direction: str) -> Wanted:
            return Wanted(
                (first, second),
                lambda look: look not in (first, second),
                lambda objects: relation(objects[0], objects[1]) == direction,
            )

        named = wanted(direction if truth else OPPOSITE[direction])
        other = wanted(pick(rng, (direction, OPPOSITE[direction])))
        return (named, other) if side == "left" else (other, named)

    def holds(left: Objects, other: Objects) -> bool | None:
        objects = left if side == "left" else other
        found = {relation(a, b) for a in objects if _has([a], first) for b in objects if _has([b], second)}
        if direction in found:
            return True
        return False if found == {OPPOSITE[direction]} else None

    where = DIRECTION_WORDS[direction]
    return Statement(f"in the {side} picture {_name(first)} is {where} {_name(second)}", build, holds)


def _divided(rng: Rng, near: Sequence[Look]) -> Statement:
    """One object in one picture and another in the other, or the other way round."""
    first, second = _two_looks(rng, near)
    side = pick(rng, ("left", "right"))

    def build(rng: Rng, truth: bool) -> tuple[Wanted, Wanted]:
        looks = (first, second) if (side == "left") == truth else (second, first)
        left, other = (Wanted((look,), lambda own: own not in (first, second)) for look in looks)
        return left, other

    def holds(left: Objects, other: Objects) -> bool:
        named, rest = (left, other) if side == "left" else (other, left)
        return _has(named, first) and _has(rest, second)

    return Statement(f"the {side} picture has {_name(first)} and the other one has {_name(second)}", build, holds)


_FORMS: tuple[Callable[[Rng, Sequence[Look]], Statement], ...] = (
    _presence,
    _presence,
    _more,
    _together,
    _equal_size,
    _direction,
    _divided,
)
