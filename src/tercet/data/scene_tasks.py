"""What synthetic scenes give to the downstream tasks: questions, entailments and referring expressions.

All are pure functions of the scene.  Truth and falsehood are worded alike: which answer is right cannot be guessed from
the words without the picture.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from tercet.data.scenes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    pick,
    plural,
    relation,
    scene_generator,
    with_article,
)

Box = tuple[float, float, float, float]
Label = Literal["entailment", "neutral", "contradiction"]

QUESTION_KINDS = ("colour", "shape", "count", "position", "yes/no")
EXPRESSION_KINDS = ("attributes", "outermost", "neighbour")
DIRECTION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "top": "bottom", "bottom": "top"}
FIGURE = "figure"  # an object of any shape
CLEAR_OF_MIDDLE = 0.1  # share of the side that an object keeps from the middle to count as left, right, top or bottom
COUNT_ANSWERS = ("zero", *NUMBERS.values())
COUNT_WEIGHTS = (0.7, 0.7, 2.0, 4.0, 5.0)  # large counts are rarer in scenes, so they are asked for when they occur
REPLAY_SHARE = 0.1  # of the scenes asked about locations, or by them, that are asked everything else too

# Random streams of a scene; 0 to 2 draw and describe it.
_QUESTIONS, _ENTAILMENTS, _EXPRESSIONS, _LOCATIONS, _REFERRED = 3, 4, 5, 7, 8


class Question(NamedTuple):
    """A question with its one right answer."""

    text: str
    answer: str
    kind: str


class Claim(NamedTuple):
    """One thing said as a statement and asked as a yes/no question."""

    statement: str
    question: str


class Expression(NamedTuple):
    """A phrase that refers to one object, its box (left, top, right, bottom) in pixels, and what tells it apart.

    `kind`: 'attributes' of its own; being 'outermost' among those of its shape; the side of a 'neighbour' it is on.
    """

    text: str
    box: Box
    kind: str


def expressions(scene: Scene) -> list[Expression]:
    """Phrases that each refer to exactly one object.  An object that nothing tells apart from another has none."""
    rng = scene_generator(scene.seed, _EXPRESSIONS)
    found: dict[str, Expression] = {}
    for item, box in zip(scene.objects, scene.boxes, strict=True):
        phrases = refer(scene, item, rng), outermost(scene, item, rng), by_neighbour(scene, item, rng)
        for kind, phrase in zip(EXPRESSION_KINDS, phrases, strict=True):
            if phrase is not None:
                found[f"the {phrase}"] = Expression(f"the {phrase}", box, kind)
    return list(found.values())


def refer(scene: Scene, item: SceneObject, rng: np.random.Generator, without: str = "") -> str | None:
    """Words that fit `item` and no other object of the scene, such as 'small red circle'; None when there are none.

    `without`: 'colour', 'shape' or 'size', when that must not be mentioned.
    """
    options: list[tuple[str, ...]] = []
    for names in (("shape",), ("colour", "shape"), ("size", "shape"), ("size", "colour", "shape"), ("size", "colour")):
        used = tuple(name for name in names if name != without)
        if used and sum(all(getattr(other, n) == getattr(item, n) for n in used) for other in scene.objects) == 1:
            options.append(used)
    if without == "shape" and len(scene.objects) == 1:
        options.append(())
    if not options:
        return None
    used = pick(rng, options)
    if not used:
        return FIGURE
    words = [getattr(item, name) for name in ("size", "colour") if name in used]
    return " ".join([*words, item.shape if "shape" in used else pick(rng, ("one", FIGURE))])


def outermost(scene: Scene, item: SceneObject, rng: np.random.Generator, noun: str = "") -> str | None:
    """'leftmost star': the object clearly furthest to one side among two or more of its shape, or of all (`FIGURE`)."""
    rivals = [other for other in scene.objects if noun == FIGURE or other.shape == item.shape]
    rivals.remove(item)
    if not rivals:
        return None
    gaps = {
        "leftmost": min(other.x for other in rivals) - item.x,
        "rightmost": item.x - max(other.x for other in rivals),
        "topmost": min(other.y for other in rivals) - item.y,
        "lowest": item.y - max(other.y for other in rivals),
    }
    sides = [side for side, gap in gaps.items() if gap > 0.08]
    return f"{pick(rng, sides)} {noun or item.shape}" if sides else None


def by_neighbour(scene: Scene, item: SceneObject, rng: np.random.Generator, noun: str = "") -> str | None:
    """'circle above the red square': the only object of its shape, or at all (`FIGURE`), anywhere to that side."""

    def is_there(direction: str, first: SceneObject, second: SceneObject) -> bool:
        along = first.x - second.x if direction in ("left", "right") else first.y - second.y
        return along < 0 if direction in ("left", "above") else along > 0

    options = []
    for other in scene.objects:
        direction = relation(item, other)
        name = refer(scene, other, rng) if other is not item else None
        if direction is None or name is None:
            continue
        rivals = [rival for rival in scene.objects if rival not in (item, other)]
        alike = [rival for rival in rivals if noun == FIGURE or rival.shape == item.shape]
        if not any(is_there(direction, rival, other) for rival in alike):
            options.append(f"{noun or item.shape} {DIRECTION_WORDS[direction]} the {name}")
    return pick(rng, options) if options else None


def questions(scene: Scene) -> list[Question]:
    """Questions about a scene: at most one of colour and of shape, up to two of count, of position and of yes/no."""
    rng = scene_generator(scene.seed, _QUESTIONS)
    found = [_attribute_question(scene, attribute, rng) for attribute in ("colour", "shape")]
    found += [_total_question(scene, rng), _count_question(scene, rng), _relation_question(scene, rng)]
    located = _located(scene, rng)
    if located is not None:
        found.append(_half_question(*located))
    for _ in range(2):
        truth = bool(rng.integers(2))
        found.append(Question(_claim(scene, rng, truth).question, "yes" if truth else "no", "yes/no"))
    return list(dict.fromkeys(question for question in found if question is not None))


def location_questions(scene: Scene) -> list[Question]:
    """In which halves of the picture each object is that words tell from the others, across and down.

    One scene in ten is asked all of `questions` too: locations are learned where they are most of what is asked, and
    without some of the rest a model would forget it (benchmarks/notes/results.md).
    """
    rng = scene_generator(scene.seed, _LOCATIONS)
    named = [(item, refer(scene, item, rng)) for item in scene.objects]
    asked = [_half_question(name, half) for item, name in named if name is not None for half in _halves(item)]
    return _with_replay(scene, asked, rng)


def referred_questions(scene: Scene) -> list[Question]:
    """Colour and shape of objects that are named by where they are: "what colour is the leftmost star?".

    Only where another object would give another answer, so that a model has to look at the one that the words mean.
    One scene in ten is asked all of `questions` too.
    """
    rng = scene_generator(scene.seed, _REFERRED)
    asked: list[Question] = []
    for item in scene.objects:
        others = [other for other in scene.objects if other is not item]
        for phrase, noun in itertools.product((outermost, by_neighbour), ("", FIGURE)):
            name = phrase(scene, item, rng, noun)
            rivals = others if phrase is by_neighbour or noun else [o for o in others if o.shape == item.shape]
            attributes = [
                attribute
                for attribute in (("colour", "shape") if noun else ("colour",))
                if any(getattr(rival, attribute) != getattr(item, attribute) for rival in rivals)
            ]
            if name is not None and attributes:
                asked.append(_ask(pick(rng, attributes), name, item, rng))
    return _with_replay(scene, asked, rng)


def entailments(scene: Scene) -> list[tuple[str, Label]]:
    """Hypotheses about a scene: two that it entails, two that it contradicts, two that it leaves open.

    The open ones speak of what no picture shows: when, why, how and for whom it was drawn.
    """
    rng = scene_generator(scene.seed, _ENTAILMENTS)
    frames = ("", "", "", "in this picture ", "here ", "as far as one can tell ")
    found: list[tuple[str, Label]] = []
    for _ in range(2):
        for label in ("entailment", "neutral", "contradiction"):
            text = _neutral(scene, rng) if label == "neutral" else _claim(scene, rng, label == "entailment").statement
            found.append((pick(rng, frames) + text, label))
    return list(dict.fromkeys(found))


def _with_replay(scene: Scene, asked: list[Question], rng: np.random.Generator) -> list[Question]:
    if rng.random() < REPLAY_SHARE:
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
    """How many of a colour or shape: the answer is drawn among those that the scene allows, then the question."""
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
    has_colour = functools.partial(_has_attribute, attribute="colour", values=COLOURS)
    has_size = functools.partial(_has_attribute, attribute="size", values=SIZES)
    forms = (_exists, has_colour, has_size, _has_relation, _is_in_half, _has_count)
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
        shape = pick(rng, scene.objects).shape if rng.random() < 0.6 else pick(rng, SHAPES)
        near = [item.colour for item in scene.objects] if rng.random() < 0.6 else []
        others = [colour for colour in near or COLOURS if (colour, shape) not in present]
        colour = pick(rng, others or [colour for colour in COLOURS if (colour, shape) not in present])
    name = with_article(f"{colour} {shape}")
    statement = pick(rng, ("there is {}", "{} can be seen", "one of the figures is {}"))
    return Claim(statement.format(name), pick(rng, ("is there {}?", "can {} be seen?")).format(name))


def _has_attribute(
    scene: Scene, rng: np.random.Generator, truth: bool, attribute: str, values: Sequence[str]
) -> Claim | None:
    """An object's colour or size."""
    referred = _referred(scene, rng, attribute)
    if referred is None:
        return None
    item, name = referred
    own = getattr(item, attribute)
    return _says(name, own if truth else pick(rng, [value for value in values if value != own]))


def _has_relation(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim | None:
    pair = _related_pair(scene, rng)
    if pair is None:
        return None
    first, second, direction = pair
    return _says(first, f"{DIRECTION_WORDS[direction if truth else OPPOSITE[direction]]} the {second}")


def _is_in_half(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim | None:
    located = _located(scene, rng)
    if located is None:
        return None
    name, half = located
    return _says(name, f"in the {half if truth else OPPOSITE[half]} half")


def _has_count(scene: Scene, rng: np.random.Generator, truth: bool) -> Claim:
    count = len(scene.objects)
    if not truth:
        count = pick(rng, [other for other in NUMBERS if other != count])
    verb, what = "is" if count == 1 else "are", f"exactly {NUMBERS[count]} figure{'s' * (count > 1)}"
    return Claim(f"there {verb} {what}", f"{verb} there {what}?")


def _says(name: str, what: str) -> Claim:
    return Claim(f"the {name} is {what}", f"is the {name} {what}?")


def _referred(scene: Scene, rng: np.random.Generator, without: str = "") -> tuple[SceneObject, str] | None:
    """Any object that can be named without the attribute, and that name."""
    for index in rng.permutation(len(scene.objects)):
        name = refer(scene, scene.objects[index], rng, without)
        if name is not None:
            return scene.objects[index], name
    return None


def _related_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """The names of two objects, and how the first clearly lies to the second."""
    pairs = [(a, b, direction) for a, b in itertools.permutations(scene.objects, 2) if (direction := relation(a, b))]
    for index in rng.permutation(len(pairs)):
        first, second, direction = pairs[index]
        names = refer(scene, first, rng), refer(scene, second, rng)
        if names[0] is not None and names[1] is not None:
            return names[0], names[1], direction
    return None


def _located(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The name of an object and the half of the picture that it clearly lies in."""
    referred = _referred(scene, rng)
    halves = [] if referred is None else _halves(referred[0])
    return (referred[1], pick(rng, halves)) if referred is not None and halves else None


def _halves(item: SceneObject) -> list[str]:
    """The halves of the picture, across and down, that an object clearly lies in."""
    halves = []
    if abs(item.x - 0.5) > CLEAR_OF_MIDDLE:
        halves.append("left" if item.x < 0.5 else "right")
    if abs(item.y - 0.5) > CLEAR_OF_MIDDLE:
        halves.append("top" if item.y < 0.5 else "bottom")
    return halves


# Statements that no look at the picture decides: any start of a row with any end of it.
_NEUTRAL = (
    (
        [
            f"{{name}} was {done}"
            for done in ("painted", "drawn", "coloured", "added", "planned", "corrected", "chosen")
        ],
        ["in the morning", "at night", "before lunch", "in a hurry", "with great care", "by a child", "by two people"],
    ),
    (
        [f"{who} {{does}}" for who in ("a child", "the artist", "a teacher", "her brother", "an old friend")],
        ["{name}"],
    ),
    (
        [f"{{name}} {once}" for once in ("used to be", "was first meant to be", "will some day become", "was nearly")],
        ["{colour}", "a {shape}", "{size}"],
    ),
    (
        ["{name}"],
        ["is made of paper", "smells of paint", "feels rough", "has a {colour} back", "covers an older {shape}"],
    ),
    (
        ["the picture", "this drawing"],
        ["hangs in a school", "was made for a book", "took an hour to make", "won a prize", "has a twin"],
    ),
    (
        [f"{who} {hope} to draw" for who in ("the artist", "the pupil") for hope in ("wanted", "forgot", "was told")],
        ["another {colour} {shape}"],
    ),
)
_DOES = ("likes", "dislikes", "asked for", "remembers", "is proud of", "dreamt of")


def _neutral(scene: Scene, rng: np.random.Generator) -> str:
    starts, ends = pick(rng, _NEUTRAL)
    name = refer(scene, pick(rng, scene.objects), rng) or "figure drawn last"
    options = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "does": _DOES}
    words = {key: pick(rng, values) for key, values in options.items()}
    return f"{pick(rng, starts)} {pick(rng, ends)}".format(name=f"the {name}", **words)
