"""What drawn scenes give to the downstream tasks: questions, entailments and referring expressions.

All are pure functions of the scene.  Truth and falsehood are worded alike: which answer is right cannot be guessed
from the words without the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from tercet.data.scene_captions import NUMBERS, plural, with_article
from tercet.data.scene_layout import COLOURS, OPPOSITE, SHAPES, SIZES, SceneObject, pick, relation
from tercet.data.scenes import Scene, scene_generator

Label = Literal["entailment", "neutral", "contradiction"]
Box = tuple[float, float, float, float]

EXPRESSION_KINDS = ("attributes", "outermost", "neighbour")
QUESTION_KINDS = ("colour", "shape", "count", "position", "yes/no")
DIRECTION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
CLEAR_OF_MIDDLE = 0.1  # share of the side that an object keeps from the middle to count as left, right, top or bottom
COUNT_ANSWERS = ("zero", "one", "two", "three", "four")
COUNT_WEIGHTS = (0.7, 0.7, 2.0, 4.0, 5.0)  # large counts are rarer in scenes, so they are asked for when they occur
REMINDERS = 0.1  # share of the scenes asked for places that are asked everything else too

_QUESTIONS, _ENTAILMENTS, _EXPRESSIONS, _PLACES = 3, 4, 5, 7  # random streams of a scene; 0 to 2 draw and describe it


class Question(NamedTuple):
    """A question with its one right answer."""

    text: str
    answer: str
    kind: str


class Expression(NamedTuple):
    """A phrase that refers to one object.

    Attributes:
        text: the phrase.
        box: (left, top, right, bottom) of the object in pixels.
        kind: what tells the object apart: 'attributes' of its own; being 'outermost' among those of its shape; or the
            side of a 'neighbour' that it lies on.
    """

    text: str
    box: Box
    kind: str


class Claim(NamedTuple):
    """One thing said as a statement and asked as a yes/no question."""

    statement: str
    question: str


def questions(scene: Scene) -> list[Question]:
    """Questions about a scene: at most one of colour and of shape, up to two of count, of position and of yes/no."""
    rng = scene_generator(scene.seed, _QUESTIONS)
    found = [_colour_question(scene, rng), _shape_question(scene, rng), _total_question(scene, rng)]
    found += [_count_question(scene, rng), _relation_question(scene, rng)]
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
    if rng.random() < REMINDERS:
        asked += questions(scene)
    return list(dict.fromkeys(asked))


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


def expressions(scene: Scene) -> list[Expression]:
    """Phrases that each refer to exactly one object.  An object that nothing tells apart from another has none."""
    rng = scene_generator(scene.seed, _EXPRESSIONS)
    made: dict[str, Expression] = {}
    for item, box in zip(scene.objects, scene.boxes, strict=True):
        phrases = refer(scene, item, rng), _outermost(scene, item, rng), _by_neighbour(scene, item, rng)
        for kind, phrase in zip(EXPRESSION_KINDS, phrases, strict=True):
            if phrase is not None:
                text = f"the {phrase}"
                made[text] = Expression(text, box, kind)
    return list(made.values())


def refer(scene: Scene, item: SceneObject, rng: np.random.Generator, without: str = "") -> str | None:
    """Words that fit `item` and no other object of the scene, such as 'small red circle'; None when there are none.

    Args:
        without: 'colour', 'shape' or 'size', when that must not be told.
    """
    options = []
    for names in (("shape",), ("colour", "shape"), ("size", "shape"), ("size", "colour", "shape"), ("size", "colour")):
        told = tuple(name for name in names if name != without)
        if told and sum(all(getattr(other, n) == getattr(item, n) for n in told) for other in scene.objects) == 1:
            options.append(told)
    if without == "shape" and len(scene.objects) == 1:
        options.append(())
    if not options:
        return None
    told = pick(rng, options)
    if not told:
        return "figure"
    words = [getattr(item, name) for name in ("size", "colour") if name in told]
    return " ".join([*words, item.shape if "shape" in told else pick(rng, ("one", "figure"))])


def _colour_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    referred = _referred(scene, rng, "colour")
    if referred is None:
        return None
    item, name = referred
    text = pick(rng, ("what colour is the {}?", "what is the colour of the {}?", "which colour does the {} have?"))
    return Question(text.format(name), item.colour, "colour")


def _shape_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    referred = _referred(scene, rng, "shape")
    if referred is None:
        return None
    item, name = referred
    text = pick(rng, ("what shape is the {}?", "what is the shape of the {}?", "which shape does the {} have?"))
    return Question(text.format(name), item.shape, "shape")


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


def _outermost(scene: Scene, item: SceneObject, rng: np.random.Generator) -> str | None:
    """'leftmost star': the object clearly furthest to one side among two or more of its shape."""
    rivals = [other for other in scene.objects if other.shape == item.shape and other is not item]
    if not rivals:
        return None
    gaps = {
        "leftmost": min(other.x for other in rivals) - item.x,
        "rightmost": item.x - max(other.x for other in rivals),
        "topmost": min(other.y for other in rivals) - item.y,
        "lowest": item.y - max(other.y for other in rivals),
    }
    sides = [side for side, gap in gaps.items() if gap > 0.08]
    return f"{pick(rng, sides)} {item.shape}" if sides else None


def _by_neighbour(scene: Scene, item: SceneObject, rng: np.random.Generator) -> str | None:
    """'circle above the red square': the only object of its shape anywhere to that side of a nameable object."""
    options = []
    for other in scene.objects:
        direction = relation(item, other)
        name = refer(scene, other, rng) if other is not item else None
        if direction is None or name is None:
            continue
        rivals = [
            rival for rival in scene.objects if rival is not item and rival is not other and rival.shape == item.shape
        ]
        if not any(_lies(direction, rival, other) for rival in rivals):
            options.append(f"{item.shape} {DIRECTION_WORDS[direction]} the {name}")
    return pick(rng, options) if options else None


def _lies(direction: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether `first` lies at all to that side of `second`, however little."""
    return {
        "left": first.x < second.x,
        "right": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }[direction]
