"""Words that refer to one figure of a drawn scene: by what it looks like, or by where it lies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tercet.data.scene_layout import SceneObject, pick, relation
from tercet.data.scenes import Scene, scene_generator

Box = tuple[float, float, float, float]

EXPRESSION_KINDS = ("attributes", "outermost", "neighbour")
DIRECTION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
FIGURE = "figure"  # an object of any shape

_EXPRESSIONS = 5  # this module's random stream of a scene


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


def expressions(scene: Scene) -> list[Expression]:
    """Phrases that each refer to exactly one object.  An object that nothing tells apart from another has none."""
    rng = scene_generator(scene.seed, _EXPRESSIONS)
    made: dict[str, Expression] = {}
    for item, box in zip(scene.objects, scene.boxes, strict=True):
        phrases = refer(scene, item, rng), outermost(scene, item, rng), by_neighbour(scene, item, rng)
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


def outermost(scene: Scene, item: SceneObject, rng: np.random.Generator, noun: str = "") -> str | None:
    """'leftmost star': the object clearly furthest to one side among two or more of its shape, or of all (`FIGURE`).

    Args:
        noun: the shape, by default, or `FIGURE`.
    """
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
    """'circle above the red square': the only object of its shape anywhere to that side of a nameable object.

    Args:
        noun: the shape, by default, or `FIGURE`: then the only object at all to that side.
    """
    options = []
    for other in scene.objects:
        direction = relation(item, other)
        name = refer(scene, other, rng) if other is not item else None
        if direction is None or name is None:
            continue
        rivals = [rival for rival in scene.objects if rival is not item and rival is not other]
        if not any(
            (noun == FIGURE or rival.shape == item.shape) and _lies(direction, rival, other) for rival in rivals
        ):
            options.append(f"{noun or item.shape} {DIRECTION_WORDS[direction]} the {name}")
    return pick(rng, options) if options else None


def _lies(direction: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether `first` lies at all to that side of `second`, however little."""
    return {
        "left": first.x < second.x,
        "right": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }[direction]
