"""Synthetic scenes: deterministic, disjoint between splits, and truly described, as a separate reader finds."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from tercet.data.scenes import HELD_OUT, MAX_WORDS, SPLITS, Scene, draw_scene, split_scenes

NOUNS = ["circle", "disc", "square", "triangle", "star", "cross", "heart", "ring", "hoop", "diamond", "rhombus"]
SHAPE_OF = {noun + end: noun for noun in NOUNS for end in ("", "s", "es")}
SHAPE_OF |= {"disc": "circle", "discs": "circle", "hoop": "ring", "hoops": "ring"}
SHAPE_OF |= {"rhombus": "diamond", "rhombuses": "diamond"}
SIZE_OF = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
NUMBER_OF = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
PHRASE = re.compile(
    r"\b(a|an|two|three|four) (?:(small|little|tiny|large|big|huge) )?"
    r"(red|orange|yellow|green|blue|purple|black|white) ([a-z]+)"
)
RELATION = re.compile(
    r" (?:is |lies )?"
    r"(left of|to the left of|right of|to the right of|above|over|below|under|beneath|beside|next to) an? "
)
OPENINGS = "a picture of |a drawing of |an image with |here we see |this shows |there is |there are "


def read_objects(caption: str) -> Counter[tuple[str, str, str | None]]:
    """The (colour, shape, size) that a caption names, counted."""
    found: Counter[tuple[str, str, str | None]] = Counter()
    for number, size, colour, noun in PHRASE.findall(caption):
        found[colour, SHAPE_OF[noun], SIZE_OF.get(size)] += NUMBER_OF[number]
    return found


def lies(word: str, dx: float, dy: float) -> bool:
    """Whether an offset, first minus second, agrees with the relation's words."""
    if word in ("beside", "next to"):
        return abs(dx) > abs(dy)
    if "left" in word:
        return dx < 0 and abs(dx) > abs(dy)
    if "right" in word:
        return dx > 0 and abs(dx) > abs(dy)
    if word in ("above", "over"):
        return dy < 0 and abs(dy) > abs(dx)
    return dy > 0 and abs(dy) > abs(dx)


def objects_of(scene: Scene) -> Counter[tuple[str, str, str | None]]:
    return Counter((item.colour, item.shape, item.size) for item in scene.objects)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(4 * seed) for seed in range(1500)]


def test_complete_captions_name_exactly_the_objects(scenes: list[Scene]) -> None:
    for scene in scenes:
        for caption in scene.captions[:2]:
            assert read_objects(caption) == objects_of(scene), caption


def test_casual_captions_name_only_what_is_there(scenes: list[Scene]) -> None:
    for scene in scenes:
        present = objects_of(scene)
        for (colour, shape, size), count in read_objects(scene.captions[2]).items():
            matching = sum(n for kind, n in present.items() if kind[:2] == (colour, shape) and size in (None, kind[2]))
            assert matching >= count, scene.captions[2]


def test_relations_in_captions_hold(scenes: list[Scene]) -> None:
    seen = 0
    for scene in scenes:
        for caption in scene.captions:
            match = RELATION.search(caption)
            if match is None:
                continue
            first, second = [
                Counter(read_objects(part)) for part in (caption[: match.start()], "a " + caption[match.end() :])
            ]
            subject = next(iter(first))
            target = next(iter(second))
            pairs = [
                (a.x - b.x, a.y - b.y)
                for a, b in itertools.permutations(scene.objects, 2)
                if (a.colour, a.shape, a.size) == subject and (b.colour, b.shape, b.size) == target
            ]
            assert len(pairs) == 1, caption
            assert lies(match.group(1), *pairs[0]), caption
            seen += 1
    assert seen > 300


def test_places_and_numbers_in_captions_hold(scenes: list[Scene]) -> None:
    places = numbers = backgrounds = 0
    for scene in scenes:
        caption = scene.captions[2]
        if match := re.search(r"(top|upper|bottom|lower) (left|right)", caption):
            vertical, horizontal = match.groups()
            kind = next(iter(read_objects(caption)))
            assert any(
                (item.colour, item.shape, item.size) == kind
                and (item.x < 0.5) == (horizontal == "left")
                and (item.y < 0.5) == (vertical in ("top", "upper"))
                for item in scene.objects
            ), caption
            places += 1
        if match := re.match(r"(one|two|three|four) (shapes|figures|objects) ", caption):
            assert NUMBER_OF[match.group(1)] == len(scene.objects)
            numbers += 1
        if match := re.search(r"on a (\w+) (background|ground)", caption):
            assert match.group(1) == scene.background
            backgrounds += 1
    assert min(places, numbers, backgrounds) > 50


def test_captions_differ_are_short_and_vary(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert len(set(scene.captions)) == 3
        assert all(len(caption.split()) <= MAX_WORDS for caption in scene.captions)
    openings = Counter(re.match(rf"(?:{OPENINGS})?", scene.captions[0]).group(0) for scene in scenes)  # type: ignore[union-attr]
    assert len(openings) == 8
    assert len({scene.captions[0] for scene in scenes}) > 0.9 * len(scenes)


def test_objects_lie_inside_apart_and_are_visible(scenes: list[Scene]) -> None:
    for scene in scenes[:300]:
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        for (left, top, right, bottom), item in zip(scene.boxes, scene.objects, strict=True):
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            width = max(right - left, bottom - top)
            assert (width < 17) == (item.size == "small")
        for first, second in itertools.combinations(scene.boxes, 2):
            across = min(first[2], second[2]) - max(first[0], second[0])
            down = min(first[3], second[3]) - max(first[1], second[1])
            smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
            assert max(across, 0) * max(down, 0) < 0.35 * smaller


def test_colours_in_the_picture_are_those_named(scenes: list[Scene]) -> None:
    reference = {
        "red": (212, 32, 38),
        "orange": (250, 134, 10),
        "yellow": (248, 222, 44),
        "green": (34, 150, 58),
        "blue": (36, 80, 214),
        "purple": (134, 40, 168),
        "black": (20, 20, 22),
        "white": (247, 247, 245),
    }
    for scene in scenes[:300]:
        for item in scene.objects:
            if item.shape == "ring":
                continue
            pixel = scene.image[int(item.y * 64), int(item.x * 64)].astype(int)
            nearest = min(reference, key=lambda name: float(np.abs(pixel - np.array(reference[name])).sum()))
            assert nearest == item.colour


def test_pictures_do_not_drift_between_versions() -> None:
    scene = draw_scene(12345)
    assert scene.captions[0] == "two little black triangles"
    assert abs(float(scene.image.mean()) - 141.0) < 0.5
    large = draw_scene(12345, size=160)
    assert large.image.shape == (160, 160, 3)
    assert large.captions == scene.captions


def test_splits_are_disjoint_and_can_be_continued() -> None:
    seeds = {split: [scene.seed for scene in split_scenes(split, 300)] for split in SPLITS}
    assert len({seed for group in seeds.values() for seed in group}) == 300 * len(SPLITS)
    for split, group in seeds.items():
        assert [scene.seed for scene in split_scenes(split, 3, 200)] == group[200:203]


def test_shapes_stand_alone_and_scenes_do_not() -> None:
    shapes = list(split_scenes("shapes", 400))
    assert all(len(scene.objects) == 1 for scene in shapes)
    assert len({scene.kinds for scene in shapes}) > 100  # of 128 kinds
    assert {len(scene.objects) for scene in split_scenes("train", 200)} == {1, 2, 3, 4}


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_held_out_scene_is_within_another(split: str) -> None:
    scenes = list(split_scenes(split, 500))
    kinds = [objects_of(scene) for scene in scenes]
    for first, second in itertools.combinations(kinds, 2):
        assert not first <= second
        assert not second <= first
    assert len({scene.captions[0] for scene in scenes}) == 500
