"""What drawn scenes give to the downstream tasks: questions and entailments.

All are pure functions of the scene.  Truth and falsehood are worded alike: which answer is right cannot be guessed
from the words without the picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from tercet.data.scene_captions import NUMBERS, plural, with_article
from tercet.data.scene_expressions import DIRECTION_WORDS, FIGURE, by_neighbour, outermost, refer
from tercet.data.scene_layout import COLOURS, OPPOSITE, SHAPES, SIZES, SceneObject, pick, relation
from tercet.data.scenes import Scene, scene_generator

Label = Literal["entailment", "neutral", "contradiction"]

QUESTION_KINDS = ("colour", "shape", "count", "position", "yes/no")
CLEAR_OF_MIDDLE = 0.1  # share of the side that an object keeps from the middle to count as left, right, top or bottom
COUNT_ANSWERS = ("zero", "one", "two", "three", "four")
COUNT_WEIGHTS = (0.7, 0.7, 2.0, 4.0, 5.0)  # large counts are rarer in scenes, so they are asked for when they occur
REMINDERS = 0.1  # share of the scenes asked for places, or by them, that are asked everything else too

_QUESTIONS, _ENTAILMENTS, _PLACES, _REFERRED = 3, 4, 7, 8  # random streams of a scene; 0 to 2 draw and describe it


class Question(NamedTuple):
    """A question with its one right answer."""

    text: str
    answer: str
    kind: str


class Claim(NamedTuple):
    """One thing said as a statement and asked as a yes/no question."""

    statement: str
    question: str


def questions(scene: Scene) -> list[Question]:
    """Questions about a scene: at most one of colour and of shape, up to two of count, of position and of yes/no."""
    rng = scene_generator(scene.seed, _QUESTIONS)
    found = [_attribute_question(scene, attribute, rng) for attribute in ("colour", "shape")]
    found += [_total_question(scene, rng), _count_question(scene, rng), _relation_question(scene, rng)]
    placed = _placed(scene, rng)
    if placed is not None:
        found.append(_half_question(*placed))
    for _ in range(2):
        truth = bool(rng.integers(2))
        claim = _claim(scene, rng, truth)
        found.append(Question(claim.question, "yes" if truth else "no", "yes/no"))
    return list(dict.fromkeys(question for question in found if question is not None))


def place_questions(scene: Scene) -> list[Question]:
    """In which halves of the picture each figure clearly lies that words tell from the others, across and down.

    One scene in ten is asked all of `questions` too: places are learned where they are most of what is asked, and
    without some of the rest a model would forget it (docs/results.md).
    """
    rng = scene_generator(scene.seed, _PLACES)
    named = [(item, refer(scene, item, rng)) for item in scene.objects]
    asked = [_half_question(name, half) for item, name in named if name is not None for half in _halves(item)]
    return _reminded(scene, asked, rng)


def referred_questions(scene: Scene) -> list[Question]:
    """Colour and shape of figures that are told by where they lie: "what colour is the leftmost star?".

    Only where another figure would give another answer, so that a model has to look at the one that the words mean.
    One scene in ten is asked all of `questions` too.
    """
    rng = scene_generator(scene.seed, _REFERRED)
    asked: list[Question] = []
    for item in scene.objects:
        others = [other for other in scene.objects if other is not item]
        for place, noun in itertools.product((outermost, by_neighbour), ("", FIGURE)):
            name = place(scene, item, rng, noun)
            rivals = others if place is by_neighbour or noun else [o for o in others if o.shape == item.shape]
            attributes = [
                attribute
                for attribute in (("colour", "shape") if noun else ("colour",))
                if any(getattr(rival, attribute) != getattr(item, attribute) for rival in rivals)
            ]
            if name is not None and attributes:
                asked.append(_ask(pick(rng, attributes), name, item, rng))
    return _reminded(scene, asked, rng)


def entailments(scene: Scene) -> list[tuple[str, Label]]:
    """Hypotheses about a scene: two that it entails, two that it contradicts, two that it leaves open.

    The open ones speak of what no picture shows: when, why, how and for whom it was drawn.
    """
    rng = scene_generator(scene.seed, _ENTAILMENTS)
    made: list[tuple[str, Label]] = []
    for _ in range(2):
        made.append((_framed(_claim(scene, rng, True).statement, rng), "entailment"))
        made.append((_framed(_neutral(scene, rng), rng), "neutral"))
        made.append((_framed(_claim(scene, rng, False).statement, rng), "contradiction"))
    return list(dict.fromkeys(made))


def _reminded(scene: Scene, asked: list[Question], rng: np.random.Generator) -> list[Question]:
    """What is `asked`, each once, and in `REMINDERS` of the scenes all of `questions` too."""
    if rng.random() < REMINDERS:
        asked = asked + questions(scene)
    return list(dict.fromkeys(asked))


def _attribute_question(scene: Scene, attribute: str, rng: np.random.Generator) -> Question | None:
    referred = _referred(scene, rng, attribute)
    return None if referred is None else _ask(attribute, referred[1], referred[0], rng)


def _ask(attribute: str, name: str, item: SceneObject, rng: np.random.Generator) -> Question:
    """The colour or shape of `item`, called `name`."""
    text = pick(rng, ("what {0} is the {1}?", "what is the {0} of the {1}?", "which {0} does the {1} have?"))
    return Question(text.format(attribute, name), getattr(item, attribute), attribute)


def _total_question(scene: Scene, rng: np.random.Generator) -> Question:
    text = pick(rng, ("how many figures are there?", "how many figures are in the picture?"))
    return Question(text, COUNT_ANSWERS[len(scene.objects)], "count")


def _count_question(scene: Scene, rng: np.random.Generator) -> Question:
    """How many of a colour or shape: first the answer is drawn among those that the scene allows, then the question."""
    name = pick(rng, ("colour", "shape"))
    by_count: dict[int, list[str]] = {}
    for value in COLOURS if name == "colour" else SHAPES:
        by_count.setdefault(sum(getattr(item, name) == value for item in scene.objects), []).append(value)
    counts = sorted(by_count)
    weights = np.cumsum([COUNT_WEIGHTS[count] for count in counts])
    count = counts[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    value = pick(rng, by_count[count])
    what = f"{value} figures" if name == "colour" else plural(value)
    text = pick(rng, ("how many {} are there?", "how many {} can be seen?", "what is the number of {}?"))
    return Question(text.format(what), COUNT_ANSWERS[count], "count")


def _relation_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _related_pair(scene, rng)
    if pair is None:
        return None
    first, second, direction = pair
    text = pick(rng, ("where is the {} seen from the {}?", "on which side of the {1} is the {0}?"))
    return Question(text.format(first, second), direction, "position")


def _half_question(name: str, half: str) -> Question:
    asked = "left or right" if half in ("left", "right") else "top or bottom"
    return Question(f"in which half is the {name}, {asked}?", half, "position")


def _claim(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim:
    """Something said of the scene that is true or false as asked for, in a form drawn without regard to the truth."""
    forms: tuple[Callable[[Scene, np.random.Generator, bool], Claim | None], ...] = (
        _exists,
        _has_colour,
        _has_size,
        _has_relation,
        _is_in_half,
        _numbers,
    )
    while True:
        claim = pick(rng, forms)(scene, rng, truth)
        if claim is not None:
            return claim


def _exists(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim:
    """A colour and shape that occur together, or that occur apart at most."""
    if truth:
        item = pick(rng, scene.objects)
        colour, shape = item.colour, item.shape
    else:
        present = {(item.colour, item.shape) for item in scene.objects}
        while True:
            colour = pick(rng, scene.objects).colour if rng.random() < 0.6 else pick(rng, COLOURS)
            shape = pick(rng, scene.objects).shape if rng.random() < 0.6 else pick(rng, SHAPES)
            if (colour, shape) not in present:
                break
            if rng.random() < 0.5:
                colour = pick(rng, [other for other in COLOURS if (other, shape) not in present])
                break
    name = with_article(f"{colour} {shape}")
    statement = pick(rng, ("there is {}", "{} can be seen", "one of the figures is {}"))
    return Claim(statement.format(name), pick(rng, ("is there {}?", "can {} be seen?")).format(name))


def _has_colour(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim | None:
    referred = _referred(scene, rng, "colour")
    if referred is None:
        return None
    item, name = referred
    colour = item.colour if truth else pick(rng, [colour for colour in COLOURS if colour != item.colour])
    return Claim(f"the {name} is {colour}", f"is the {name} {colour}?")


def _has_size(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim | None:
    referred = _referred(scene, rng, "size")
    if referred is None:
        return None
    item, name = referred
    size = item.size if truth else next(size for size in SIZES if size != item.size)
    return Claim(f"the {name} is {size}", f"is the {name} {size}?")


def _has_relation(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim | None:
    pair = _related_pair(scene, rng)
    if pair is None:
        return None
    first, second, direction = pair
    words = DIRECTION_WORDS[direction if truth else OPPOSITE[direction]]
    return Claim(f"the {first} is {words} the {second}", f"is the {first} {words} the {second}?")


def _is_in_half(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim | None:
    placed = _placed(scene, rng)
    if placed is None:
        return None
    name, half = placed
    if not truth:
        half = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[half]
    return Claim(f"the {name} is in the {half} half", f"is the {name} in the {half} half?")


def _numbers(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim:
    count = len(scene.objects)
    if not truth:
        count = pick(rng, [other for other in NUMBERS if other != count])
    verb, noun = ("is", "figure") if count == 1 else ("are", "figures")
    number = NUMBERS[count]
    return Claim(f"there {verb} exactly {number} {noun}", f"{verb} there exactly {number} {noun}?")


def _referred(scene: Scene, rng: np.random.Generator, without: str) -> tuple[SceneObject, str] | None:
    """Any object that can be named without the attribute, and that name."""
    for index in rng.permutation(len(scene.objects)):
        name = refer(scene, scene.objects[index], rng, without)
        if name is not None:
            return scene.objects[index], name
    return None


def _related_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """The names of two objects, and how the first clearly lies to the second."""
    objects = scene.objects
    pairs = [(a, b) for a in objects for b in objects if a is not b and relation(a, b) is not None]
    for index in rng.permutation(len(pairs)):
        first, second = pairs[index]
        names = refer(scene, first, rng), refer(scene, second, rng)
        direction = relation(first, second)
        if names[0] is not None and names[1] is not None and direction is not None:
            return names[0], names[1], direction
    return None


def _placed(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The name of an object and the half of the picture that it clearly lies in."""
    referred = _referred(scene, rng, "")
    if referred is None:
        return None
    item, name = referred
    halves = _halves(item)
    return (name, pick(rng, halves)) if halves else None


def _halves(item: SceneObject) -> list[str]:
    """The halves of the picture, across and down, that an object clearly lies in."""
    halves = []
    if abs(item.x - 0.5) > CLEAR_OF_MIDDLE:
        halves.append("left" if item.x < 0.5 else "right")
    if abs(item.y - 0.5) > CLEAR_OF_MIDDLE:
        halves.append("top" if item.y < 0.5 else "bottom")
    return halves


def _framed(statement: str, rng: np.random.Generator) -> str:
    return pick(rng, ("", "", "", "in this picture ", "here ", "as far as one can tell ")) + statement


def _neutral(scene: Scene, rng: np.random.Generator) -> str:
    """Something that may be true and that no look at the picture decides."""
    item = pick(rng, scene.objects)
    name = f"the {refer(scene, item, rng) or 'figure drawn last'}"
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    form = int(rng.integers(6))
    if form == 0:
        done = pick(rng, ("painted", "drawn", "coloured", "added", "finished", "planned", "corrected", "chosen"))
        when = (
            "in the morning",
            "at night",
            "before lunch",
            "on a Monday",
            "in a hurry",
            "with great care",
            "by a child",
        )
        return f"{name} was {done} {pick(rng, (*when, 'by two people', 'by accident', 'in summer', 'while it rained'))}"
    if form == 1:
        who = pick(rng, ("a child", "the artist", "a teacher", "her brother", "an old friend", "the neighbour"))
        return f"{who} {pick(rng, ('likes', 'dislikes', 'asked for', 'remembers', 'is proud of', 'dreamt of'))} {name}"
    if form == 2:
        once = ("used to be", "was first meant to be", "will some day become", "was nearly")
        return f"{name} {pick(rng, once)} {pick(rng, (colour, with_article(shape), pick(rng, SIZES)))}"
    if form == 3:
        more = ("is made of paper", "smells of paint", "feels rough", "is still wet", "stands for luck", "has a name")
        return f"{name} {pick(rng, (*more, f'has a {colour} back', f'covers an older {shape}'))}"
    if form == 4:
        whole = ("hangs in a school", "was made for a book", "took an hour to make", "was sold at once", "won a prize")
        return (
            f"{pick(rng, ('the picture', 'this drawing'))} {pick(rng, (*whole, 'belongs to a doctor', 'has a twin'))}"
        )
    hope = pick(rng, ("wanted", "promised", "forgot", "refused", "tried", "was told"))
    return f"{pick(rng, ('the artist', 'the pupil'))} {hope} to draw another {colour} {shape}"
