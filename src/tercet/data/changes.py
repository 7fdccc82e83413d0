"""Which changes a view undergoes: drawn without looking at its pixels, so that any processor can make them later.

The augmentation of TCL (arXiv 2202.10401, section 4): colour jitter, grey, Gaussian blur, horizontal flip, then
RandAugment (arXiv 1909.13719) with two operations at level 7 of 10.  Every choice is drawn from the
`numpy.random.Generator` that the caller passes in, and always in the same order.
"""

from __future__ import annotations

import math

import numpy as np

Change = tuple[str, float]
Crop = tuple[int, int, int, int]

# RandAugment's operations and what is drawn for each: nothing, a factor that follows from the level, or an amount of so
# much at level 10, either way.  A drawn number is an index into this tuple: its order is part of what a seed means.
RAND_AUGMENT: tuple[tuple[str, float | None], ...] = (
    ("identity", None),
    ("autocontrast", None),
    ("equalize", None),
    ("brightness", None),
    ("sharpness", None),
    ("shear_x", 0.3),
    ("shear_y", 0.3),
    ("translate_x", 10.0),
    ("translate_y", 10.0),
    ("rotate", 30.0),
)


def draw_full(rng: np.random.Generator, flip: bool = True) -> list[Change]:
    """All that follows the random crop, in the published order: jitter, grey, blur, flip, RandAugment.

    `flip=False` is for captions that say left and right: the caption is never changed with the image.
    """
    changes: list[Change] = []
    if rng.random() < 0.8:
        changes += draw_jitter(rng)
    if rng.random() < 0.2:
        changes.append(("grey", 0.0))
    if rng.random() < 0.5:
        changes.append(("blur", rng.uniform(0.1, 2.0)))
    if flip:
        changes += draw_flip(rng)
    return changes + draw_rand_augment(rng)


def draw_jitter(rng: np.random.Generator, strength: float = 0.4, hue: float = 0.1) -> list[Change]:
    """Brightness, contrast and saturation by factors in `1 ± strength` and hue by up to `hue` of a turn, any order."""
    factors = rng.uniform(1 - strength, 1 + strength, size=3).tolist()
    amounts = [*factors, rng.uniform(-hue, hue)]
    steps = list(zip(("brightness", "contrast", "saturation", "hue"), amounts, strict=True))
    return [steps[index] for index in rng.permutation(len(steps))]


def draw_flip(rng: np.random.Generator) -> list[Change]:
    """Left becomes right in half of the draws."""
    return [("flip", 0.0)] if rng.random() < 0.5 else []


def draw_rand_augment(
    rng: np.random.Generator, operations: int = 2, level: float = 7, probability: float = 0.5
) -> list[Change]:
    """RandAugment as published: `operations` names drawn with replacement, each applied with `probability`.

    At level 7 of 10 factors are 1.36, shears 0.21, translations 7 pixels whatever the size, turns 21 degrees.
    """
    changes: list[Change] = []
    share = level / 10
    for index in rng.integers(len(RAND_AUGMENT), size=operations):
        if rng.random() >= probability:
            continue
        name, reach = RAND_AUGMENT[index]
        if reach is not None:
            amount = reach * share
            changes.append((name, -amount if rng.random() < 0.5 else amount))
        elif name != "identity":
            changes.append((name, 0.1 + 1.8 * share))
    return changes


def draw_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """A random rectangle `(top, left, height, width)` with a share of the area in `scale` and width/height in `ratio`.

    Share uniform, ratio log-uniform, place uniform.  When ten draws do not fit, the largest centred rectangle
    whose ratio is within bounds.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, round(width / ratio[0]))
    crop_width = min(width, round(height * ratio[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
