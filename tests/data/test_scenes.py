"""Scenes: deterministic, disjoint between splits, and truly described, as a separate reader finds."""

from __future__ import annotations

import itertools
import pickle
import re
import time
from collections import Counter

import cv2
import numpy as np
import pytest

from tercet.data.scene_captions import MAX_WORDS
from tercet.data.scenes import SPLITS, Scene, SceneSource, draw_scene
from tercet.errors import TercetError

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
    return [draw_scene(seed) for seed in range(1500)]


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
    openings = Counter(re.match(rf"(?:{OPENINGS})?", scene.caption).group(0) for scene in scenes)  # type: ignore[union-attr]
    assert len(openings) == 8
    assert len({scene.caption for scene in scenes}) > 0.9 * len(scenes)


def test_one_caption_many_pictures() -> None:
    by_kinds: dict[object, list[Scene]] = {}
    for seed in range(3000):
        scene = draw_scene(seed)
        by_kinds.setdefault(scene.kinds, []).append(scene)
    twins = [group for group in by_kinds.values() if len(group) > 1]
    assert twins
    for first, second, *_ in twins:
        assert np.abs(first.image.astype(int) - second.image).mean() > 2


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


def test_deterministic_and_size_is_a_parameter() -> None:
    source, again = SceneSource(20, "test", 3), SceneSource(40, "test", 3)
    for index in range(20):
        assert source.image(index) == again.image(index)
        assert source.captions(index) == again.captions(index)
    assert SceneSource(5, "test", 4).captions(0) != source.captions(0)
    large = draw_scene(9, size=160)
    assert large.image.shape == (160, 160, 3)
    assert large.captions == draw_scene(9).captions


def test_pictures_do_not_drift_between_versions() -> None:
    scene = draw_scene(12345)
    assert scene.caption == "two little black triangles"
    assert abs(float(scene.image.mean()) - 141.0) < 0.5


def test_splits_are_disjoint() -> None:
    seeds = [
        {source.scene(i).seed for i in range(400)}
        for source in (SceneSource(400, s) for s in ("train", "validation", "test"))
    ]
    assert all(len(group) == 400 for group in seeds)
    assert not (seeds[0] & seeds[1] or seeds[0] & seeds[2] or seeds[1] & seeds[2])


def test_distinct_split_has_no_scene_within_another() -> None:
    source = SceneSource(500, "test", distinct=True)
    kinds = [objects_of(source.scene(i)) for i in range(500)]
    for first, second in itertools.combinations(kinds, 2):
        assert not first <= second
        assert not second <= first
    captions = [source.captions(i) for i in range(500)]
    assert all(len(each) == 1 for each in captions)
    assert len({each[0] for each in captions}) == 500
    assert source.caption_counts.sum() == 500
    assert {len(source.scene(i).objects) for i in range(500)} == {1, 2, 3, 4}


def test_figures_stand_alone_and_are_those_of_no_other_split() -> None:
    source = SceneSource(400, "figures")
    scenes = [source.scene(index) for index in range(400)]
    assert all(len(scene.objects) == 1 for scene in scenes)
    assert len({scene.kinds for scene in scenes}) > 100  # of 128 kinds
    assert read_objects(scenes[0].caption) == objects_of(scenes[0])
    others = {SceneSource(400, split).scene(index).seed for split in SPLITS for index in range(400)}
    assert others.isdisjoint(scene.seed for scene in scenes)


def test_source_protocol() -> None:
    source = SceneSource(10, "validation", 1)
    assert source.image_count == len(source) == 10
    assert source.caption_counts.tolist() == [3] * 10
    assert source.key(4) == "scenes:validation#4"
    assert source.rejected == []
    decoded = cv2.imdecode(np.frombuffer(source.image(4), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.array_equal(decoded, source.array(4))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.captions(9) == source.captions(9)
    assert len(pickle.dumps(SceneSource(1000, "train"))) < 20_000


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(TercetError, match="no split named 'dev'"):
        SceneSource(5, "dev")
    with pytest.raises(TercetError, match="at least 1"):
        SceneSource(0)
    with pytest.raises(IndexError):
        SceneSource(5).image(5)


def test_drawing_is_quick() -> None:
    start = time.process_time()
    for seed in range(50):
        assert draw_scene(seed).image.size
    assert (time.process_time() - start) / 50 < 0.02
