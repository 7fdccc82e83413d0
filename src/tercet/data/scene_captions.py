"""Captions of drawn scenes, from a small grammar with many ways to say one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tercet.data.scene_layout import Kind, SceneObject, pick, relation

MAX_WORDS = 23  # a word more and the tokens, [CLS] included, would pass the default limit of 25

NOUNS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross",),
    "heart": ("heart",),
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
PLACES = {
    ("left", "top"): ("in the top left corner", "at the upper left"),
    ("right", "top"): ("in the top right corner", "at the upper right"),
    ("left", "bottom"): ("in the bottom left corner", "at the lower left"),
    ("right", "bottom"): ("in the bottom right corner", "at the lower right"),
}


def plural(noun: str) -> str:
    """The plural of a shape's noun."""
    if noun == "cross":
        return "crosses"
    return "rhombuses" if noun == "rhombus" else noun + "s"


def with_article(phrase: str) -> str:
    """The phrase with 'a' or 'an' before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def write_captions(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> list[str]:
    """Three different true captions.

    The first two name colour, shape, size and number of all objects; the third is casual: it may leave out sizes,
    name a place, or name the background.
    """
    captions: list[str] = []
    writers = (_complete, _complete, _casual)
    while len(captions) < len(writers):
        caption = writers[len(captions)](objects, background, rng)
        if caption not in captions and len(caption.split()) <= MAX_WORDS:
            captions.append(caption)
    return captions


def _complete(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> str:
    """All objects with colour, shape, size and number; a relation of two of them where there is a clear one."""
    groups = Counter(item.kind for item in objects)
    if rng.random() < 0.5:
        single = [item for item in objects if groups[item.kind] == 1]
        pairs = [(first, second) for first in single for second in single if relation(first, second) is not None]
        if pairs:
            first, second = pick(rng, pairs)
            rest = [kind for kind in groups if kind not in (first.kind, second.kind)]
            caption = _related(first, second, rng)
            return caption + (
                pick(rng, (" and also ", " along with ", " with ")) + _list(rest, groups, rng) if rest else ""
            )
    named = _list(list(groups), groups, rng)
    if len(objects) == 1 and rng.random() < 0.4:
        return named + pick(rng, (" alone", " and nothing else", " by itself"))
    if rng.random() < 0.2:
        verb = "is" if named.startswith(("a ", "an ")) else "are"
        return f"there {verb} {named}"
    return pick(rng, OPENINGS) + named


def _related(first: SceneObject, second: SceneObject, rng: np.random.Generator) -> str:
    direction = relation(first, second)
    if direction is None:
        raise ValueError("the two objects lie in no clear direction to each other")
    words = pick(rng, RELATION_WORDS[direction])
    verb = pick(rng, ("", "", "is ", "lies "))
    return f"{_name(first.kind, 1, rng)} {verb}{words} {_name(second.kind, 1, rng)}"


def _casual(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> str:
    """A looser caption: sizes left out, or one object with its place, or the number of all shapes."""
    groups = Counter((item.colour, item.shape) for item in objects)
    loose = {Kind(colour, shape, ""): count for (colour, shape), count in groups.items()}
    form = int(rng.integers(4))
    if form == 0:
        cornered = [(item, place) for item in objects if (place := _corner(item)) is not None]
        if cornered:
            item, place = pick(rng, cornered)
            return f"{_name(item.kind, 1, rng)} {pick(rng, PLACES[place])}"
    if form == 1 and len(objects) > 1:
        item = pick(rng, objects)
        things = pick(rng, ("shapes", "figures", "objects"))
        return f"{NUMBERS[len(objects)]} {things} with {_name(item.kind, 1, rng)} among them"
    named = pick(rng, OPENINGS) + _list(list(loose), loose, rng)
    if form == 2 and background in ("striped", "speckled"):
        return f"{named} on a {background} {pick(rng, ('background', 'ground'))}"
    return named


def _corner(item: SceneObject) -> tuple[str, str] | None:
    """The corner that the object clearly stands in."""
    if abs(item.x - 0.5) < 0.16 or abs(item.y - 0.5) < 0.16:
        return None
    return "left" if item.x < 0.5 else "right", "top" if item.y < 0.5 else "bottom"


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
