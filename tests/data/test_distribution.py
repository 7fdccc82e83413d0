"""Our views have the distribution of a plain Pillow pipeline: each operation, and all of them together."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tercet.data.augment import OPERATIONS, Pixels
from tercet.data.changes import draw_full
from tercet.data.images import resize
from tercet.data.views import ViewStyle

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pillow_views

DRAWS, SIZE = 300, 64
# Kolmogorov-Smirnov at a level of 0.001 for two samples of DRAWS.
CRITICAL = 1.95 * (2 / DRAWS) ** 0.5


@pytest.fixture(scope="module")
def photographs(data_dir: Path) -> list[Pixels]:
    files = sorted((data_dir / "flickr8k" / "originals").glob("*.jpg"))[:20]
    return [np.array(Image.open(file).convert("RGB").resize((160, 120))) for file in files]


def statistics(view: Pixels) -> list[float]:
    """Brightness, contrast, colour and sharpness of a view, and two of its pixels."""
    values = view.astype(float)
    colour = values.max(axis=2) - values.min(axis=2)
    edges = np.abs(np.diff(values, axis=1)).mean()
    return [values.mean(), values.std(), colour.mean(), edges, values[SIZE // 2, SIZE // 2, 0], values[2, 3, 2]]


def apart(first: list[list[float]], second: list[list[float]]) -> float:
    """The largest distance between the distribution functions of two samples, over all statistics."""
    largest = 0.0
    for one, other in zip(np.array(first).T, np.array(second).T, strict=True):
        places = np.sort(np.concatenate([one, other]))
        functions = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (one, other)]
        largest = max(largest, float(np.abs(functions[0] - functions[1]).max()))
    return largest


def amounts_of(name: str, rng: np.random.Generator) -> float:
    """An amount as `draw_full` draws it."""
    while True:
        for drawn, amount in draw_full(rng):
            if drawn == name:
                return amount


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_pillows_distribution(name: str, photographs: list[Pixels]) -> None:
    small = [resize(image, SIZE) for image in photographs]
    ours, theirs, paired = [], [], []
    rng, other_rng = np.random.default_rng(1), np.random.default_rng(2)
    for draw in range(DRAWS):
        image = small[draw % len(small)]
        amount = amounts_of(name, rng)
        view = OPERATIONS[name](image, amount, "tercet")
        same = np.asarray(pillow_views.apply(Image.fromarray(image), (name, amount)))
        other = np.asarray(pillow_views.apply(Image.fromarray(image), (name, amounts_of(name, other_rng))))
        paired.append([view.mean() - same.mean(), view.std() - same.std(), np.abs(view.astype(int) - same).mean()])
        ours.append(statistics(view))
        theirs.append(statistics(other))
    assert apart(ours, theirs) < CRITICAL
    # By the same draw: means and deviations within a level, pixels within a level on average.
    means = np.abs(np.array(paired)).mean(axis=0)
    assert means[0] < 0.5 and means[1] < 0.5 and means[2] < 1.0, means


def test_whole_views_have_pillows_distribution(photographs: list[Pixels]) -> None:
    ours, theirs = [], []
    for draw in range(DRAWS):
        image = photographs[draw % len(photographs)]
        height, width = image.shape[:2]
        style = ViewStyle(SIZE)
        drawn, _ = style.draw_two(height, width, np.random.default_rng((1, draw)))
        first = style.make(image, drawn, height, width)
        plain = pillow_views.view(Image.fromarray(image), SIZE, np.random.default_rng((2, draw)))
        ours.append(statistics(first))
        theirs.append(statistics(plain.transpose(1, 2, 0)))
    assert apart(ours, theirs) < CRITICAL


def test_the_test_tells_distributions_apart(photographs: list[Pixels]) -> None:
    ours, theirs = [], []
    for draw in range(DRAWS):
        image = photographs[draw % len(photographs)]
        height, width = image.shape[:2]
        style = ViewStyle(SIZE)
        view = style.draw(height, width, np.random.default_rng((1, draw)))
        without_jitter = [change for change in view.changes if change[0] not in ("blur", "grey")]
        ours.append(statistics(style.make(image, type(view)(view.crop, without_jitter), height, width)))
        theirs.append(
            statistics(
                pillow_views.view(Image.fromarray(image), SIZE, np.random.default_rng((2, draw))).transpose(1, 2, 0)
            )
        )
    assert apart(ours, theirs) > CRITICAL
