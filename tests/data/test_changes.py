"""What is drawn for a view: the published chances, amounts and order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.augment import OPERATIONS
from tercet.data.changes import RAND_AUGMENT, draw_crop, draw_flip, draw_full, draw_jitter, draw_rand_augment

DRAWS = 4000


def test_choices_have_the_published_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tercet.data.changes.draw_rand_augment", lambda rng: [])
    rng = np.random.default_rng(5)
    drawn = [dict(draw_full(rng)) for _ in range(DRAWS)]
    shares = {name: sum(name in one for one in drawn) / DRAWS for name in ("hue", "grey", "blur", "flip")}
    assert shares == pytest.approx({"hue": 0.8, "grey": 0.2, "blur": 0.5, "flip": 0.5}, abs=0.03)
    sigmas = np.array([one["blur"] for one in drawn if "blur" in one])
    assert 0.1 <= sigmas.min() < 0.15 and 1.95 < sigmas.max() <= 2.0
    assert sigmas.mean() == pytest.approx(1.05, abs=0.06)


def test_changes_come_in_the_published_order() -> None:
    rng = np.random.default_rng(1)
    places = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "grey": 1, "blur": 2, "flip": 3}
    for _ in range(500):
        before_rand_augment = [places[name] for name, _ in draw_full(rng) if name in places]
        first = before_rand_augment[: len(before_rand_augment) - before_rand_augment[::-1].count(0)]
        assert first == sorted(first)


def test_jitter_keeps_within_its_strength_in_any_order() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_jitter(rng) for _ in range(DRAWS)]
    orders = Counter(tuple(name for name, _ in one) for one in drawn)
    assert len(orders) == 24 and max(orders.values()) < 2 * DRAWS / 24
    for name in ("brightness", "contrast", "saturation"):
        factors = np.array([dict(one)[name] for one in drawn])
        assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
        assert factors.mean() == pytest.approx(1.0, abs=0.015)
    turns = np.array([dict(one)["hue"] for one in drawn])
    assert -0.1 <= turns.min() < -0.098 and 0.098 < turns.max() <= 0.1


def test_rand_augment_has_the_published_chances() -> None:
    rng = np.random.default_rng(2)
    drawn = Counter(change for _ in range(5 * DRAWS) for change in draw_rand_augment(rng))
    by_name = Counter()
    for (name, _), count in drawn.items():
        by_name[name] += count
    assert set(by_name) == {name for name, _ in RAND_AUGMENT} - {"identity"}
    for name, reach in RAND_AUGMENT[1:]:
        assert by_name[name] / (5 * DRAWS) == pytest.approx(0.1, abs=0.01), name
        amounts = {amount for other, amount in drawn if other == name}
        if reach is None:
            assert sorted(amounts) == [pytest.approx(1.36)]
        else:
            assert sorted(amounts) == [pytest.approx(-0.7 * reach), pytest.approx(0.7 * reach)]
            assert drawn[name, max(amounts)] / by_name[name] == pytest.approx(0.5, abs=0.05)


def test_flipping_can_be_switched_off() -> None:
    rng = np.random.default_rng(0)
    assert not any(name == "flip" for _ in range(200) for name, _ in draw_full(rng, flip=False))
    assert sum(bool(draw_flip(rng)) for _ in range(DRAWS)) / DRAWS == pytest.approx(0.5, abs=0.03)


def test_every_change_can_be_made() -> None:
    rng = np.random.default_rng(3)
    assert {name for _ in range(500) for name, _ in draw_full(rng)} == set(OPERATIONS)


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**32 - 1), st.sampled_from([(0.2, 1.0), (0.5, 1.0)]))
def test_crops_lie_inside_and_keep_their_bounds(height: int, width: int, seed: int, scale: tuple[float, float]) -> None:
    top, left, crop_height, crop_width = draw_crop(height, width, np.random.default_rng(seed), scale)
    assert top >= 0 and left >= 0 and crop_height >= 1 and crop_width >= 1
    assert top + crop_height <= height and left + crop_width <= width
    if min(height, width) >= 100:
        assert 0.74 <= crop_width / crop_height <= 1.35


def test_crops_have_uniform_areas_and_places() -> None:
    rng = np.random.default_rng(3)
    crops = np.array([draw_crop(400, 400, rng, (0.2, 0.5)) for _ in range(3000)])
    shares = crops[:, 2] * crops[:, 3] / 400**2
    assert 0.195 < shares.min() < 0.21 and 0.49 < shares.max() < 0.505
    assert shares.mean() == pytest.approx(0.35, abs=0.008)
    ratios = np.log(crops[:, 3] / crops[:, 2])
    assert ratios.mean() == pytest.approx(0, abs=0.02) and np.abs(ratios).max() <= np.log(4 / 3) + 0.02
    places = crops[:, :2] / (401 - crops[:, 2:])
    assert places.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1))],
)
def test_extreme_shapes_fall_back_to_the_centre(height: int, width: int, expected: tuple[int, ...]) -> None:
    assert draw_crop(height, width, np.random.default_rng(0), (0.9, 1.0)) == expected
