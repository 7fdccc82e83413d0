"""Photometric and geometric changes of one uint8 image `[height, width, 3]`, RGB, on the CPU.

The augmentation of TCL (arXiv 2202.10401, section 4): colour jitter, grey, Gaussian blur, horizontal flip, then
RandAugment (arXiv 1909.13719) with two operations at level 7 of 10.  Every random choice is drawn from the
`numpy.random.Generator` that the caller passes in.  The arithmetic is Pillow's, in which the method was
published; `compat="published"` brings back the two defects of the published operations as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Compat = Literal["tercet", "published"]

FILL = (128, 128, 128)
_GREYS = np.arange(256, dtype=np.float32)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Scale every channel of `[height, width, 3]` by `factor`; 1 changes nothing, 0 gives black."""
    return cv2.LUT(image, _truncate(_GREYS * np.float32(factor)))  # pyright: ignore[reportReturnType]


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Scale the distance from the image's mean grey by `factor`; 1 changes nothing, 0 gives a flat grey."""
    mean = np.float32(math.floor(cv2.mean(_luma(image))[0] + 0.5))
    return cv2.LUT(image, _truncate(mean + np.float32(factor) * (_GREYS - mean)))  # pyright: ignore[reportReturnType]


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    """Scale every pixel's distance from its own grey by `factor`; 1 changes nothing, 0 gives a grey image."""
    return _extrapolate(to_grey(image), image, factor)


def adjust_hue(image: Pixels, turn: float) -> Pixels:
    """Turn the hue by `turn` of the colour circle; 0 changes nothing, 0.5 and -0.5 give the opposite colours.

    In floating point: Pillow keeps the hue in 8 bits, which alone moves a saturated colour by up to 6 grey levels.
    """
    hsv = cv2.cvtColor(np.multiply(image, np.float32(1 / 255), dtype=np.float32), cv2.COLOR_RGB2HSV)
    hue = hsv[..., 0]
    hue += np.float32(360 * (turn % 1.0))
    np.subtract(hue, 360, out=hue, where=hue >= 360)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), alpha=255)  # pyright: ignore[reportReturnType]


def to_grey(image: Pixels) -> Pixels:
    """The luma (ITU-R 601) of `[height, width, 3]` in all three channels."""
    return cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB)  # pyright: ignore[reportReturnType]


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur of standard deviation `sigma` pixels, edges repeated.

    The kernel is three extended boxes one after the other, as Pillow's is (Gwosdek et al., SSVM 2011).  Its
    variance is `sigma` squared even below half a pixel, where a sampled Gaussian hardly blurs at all.
    """
    kernel = _box_kernel(sigma / math.sqrt(3))
    kernel = np.convolve(np.convolve(kernel, kernel), kernel)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)  # pyright: ignore[reportReturnType]


def flip_horizontally(image: Pixels) -> Pixels:
    """Left becomes right."""
    return cv2.flip(image, 1)  # pyright: ignore[reportReturnType]


def autocontrast(image: Pixels, compat: Compat = "tercet") -> Pixels:
    """Stretch each channel to 0 to 255; a channel of a single value stays.

    `published`: the minimum was an unsigned byte and its negation wrapped around, so a channel whose minimum is
    above 0 turns white.
    """
    table = np.empty((1, 256, 3), np.uint8)
    for channel, histogram in enumerate(_histograms(image)):
        present = np.flatnonzero(histogram)
        low, high = int(present[0]), int(present[-1])
        if high == low:
            table[0, :, channel] = _GREYS
        elif low and compat == "published":
            table[0, :, channel] = 255
        else:
            # float64, term by term as Pillow: a product that should be whole must not fall below it
            scale = 255.0 / (high - low)
            table[0, :, channel] = _truncate(np.arange(256) * scale - low * scale)
    return cv2.LUT(image, table)  # pyright: ignore[reportReturnType]


def equalize(image: Pixels) -> Pixels:
    """Make each channel's histogram as flat as a table of grey levels can; a channel of a single value stays."""
    table = np.empty((1, 256, 3), np.uint8)
    for channel, histogram in enumerate(_histograms(image)):
        present = np.flatnonzero(histogram)
        step = int(histogram.sum() - histogram[present[-1]]) // 255
        if step == 0:
            table[0, :, channel] = _GREYS
        else:
            below = np.cumsum(histogram) - histogram
            table[0, :, channel] = np.minimum((below + step // 2) // step, 255)
    return cv2.LUT(image, table)  # pyright: ignore[reportReturnType]


def sharpen(image: Pixels, factor: float, compat: Compat = "tercet") -> Pixels:
    """Scale the distance from a 3x3-smoothed image by `factor`; the outermost pixels stay.

    `published`: values beyond 0 and 255 wrapped around modulo 256 where they should have been clipped.
    """
    if min(image.shape[:2]) < 3:
        return image
    smooth = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1].astype(np.float32)
    sharp = smooth + np.float32(factor) * (image[1:-1, 1:-1].astype(np.float32) - smooth)
    result = image.copy()
    # through integers: casting an out-of-range float to a byte is undefined, and differs between processors
    result[1:-1, 1:-1] = (sharp.astype(np.int32) & 255).astype(np.uint8) if compat == "published" else _truncate(sharp)
    return result


def shear_x(image: Pixels, slope: float) -> Pixels:
    """Move each row to the right by `slope` times its number; what comes in is mid-grey."""
    return _warp(image, [[1, slope, 0], [0, 1, 0]])


def shear_y(image: Pixels, slope: float) -> Pixels:
    """Move each column down by `slope` times its number; what comes in is mid-grey."""
    return _warp(image, [[1, 0, 0], [slope, 1, 0]])


def translate_x(image: Pixels, pixels: float) -> Pixels:
    """Move the image to the left by `pixels`; what comes in is mid-grey."""
    return _warp(image, [[1, 0, -pixels], [0, 1, 0]])


def translate_y(image: Pixels, pixels: float) -> Pixels:
    """Move the image up by `pixels`; what comes in is mid-grey."""
    return _warp(image, [[1, 0, 0], [0, 1, -pixels]])


def rotate(image: Pixels, degrees: float) -> Pixels:
    """Turn the image about its centre, counter-clockwise; what comes in is mid-grey."""
    height, width = image.shape[:2]
    return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))


def jitter_colour(image: Pixels, rng: np.random.Generator, strength: float = 0.4, hue: float = 0.1) -> Pixels:
    """Brightness, contrast and saturation by factors in `1 ± strength` and hue by up to `hue` of a turn, any order."""
    low, high = 1 - strength, 1 + strength
    brightness, contrast, saturation = rng.uniform(low, high, size=3)
    turn = rng.uniform(-hue, hue)
    steps: tuple[tuple[Callable[[Pixels, float], Pixels], float], ...] = (
        (adjust_brightness, brightness),
        (adjust_contrast, contrast),
        (adjust_saturation, saturation),
        (adjust_hue, turn),
    )
    for index in rng.permutation(len(steps)):
        change, amount = steps[index]
        image = change(image, amount)
    return image


def rand_augment(
    image: Pixels,
    rng: np.random.Generator,
    operations: int = 2,
    level: float = 7,
    compat: Compat = "tercet",
    probability: float = 0.5,
) -> Pixels:
    """RandAugment as published: `operations` names drawn with replacement, each applied with `probability`.

    Args:
        image: uint8 `[height, width, 3]`.
        rng: source of every choice.
        operations: names drawn.
        level: 0 to 10; at 7 factors are 1.36, shears 0.21, translations 7 pixels whatever the size, turns 21 degrees.
        compat: "published" turns channels white in AutoContrast and wraps around in Sharpness.
        probability: of applying a drawn operation.
    """
    for index in rng.integers(len(RAND_AUGMENT), size=operations):
        if rng.random() < probability:
            image = RAND_AUGMENT[index](image, level / 10, rng, compat)
    return image


def augment_fully(image: Pixels, rng: np.random.Generator, compat: Compat = "tercet", flip: bool = True) -> Pixels:
    """All that follows the random crop, in the published order: jitter, grey, blur, flip, RandAugment.

    `flip=False` is for captions that say left and right: the caption is never changed with the image.
    """
    if rng.random() < 0.8:
        image = jitter_colour(image, rng)
    if rng.random() < 0.2:
        image = to_grey(image)
    if rng.random() < 0.5:
        image = blur(image, rng.uniform(0.1, 2.0))
    if flip:
        image = flip_sometimes(image, rng)
    return rand_augment(image, rng, compat=compat)


def flip_sometimes(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Left becomes right in half of the draws."""
    return flip_horizontally(image) if rng.random() < 0.5 else image


_Operation = Callable[[Pixels, float, np.random.Generator, Compat], Pixels]


def _either_way(change: Callable[[Pixels, float], Pixels], reach: float) -> _Operation:
    """`change` by `reach` times the share of the level, forward or backward with equal chance."""

    def apply(image: Pixels, share: float, rng: np.random.Generator, compat: Compat) -> Pixels:
        amount = reach * share
        return change(image, -amount if rng.random() < 0.5 else amount)

    return apply


# A drawn number is an index into this tuple: its order is part of what a seed means.
RAND_AUGMENT: tuple[_Operation, ...] = (
    lambda image, share, rng, compat: image,
    lambda image, share, rng, compat: autocontrast(image, compat),
    lambda image, share, rng, compat: equalize(image),
    lambda image, share, rng, compat: adjust_brightness(image, 0.1 + 1.8 * share),
    lambda image, share, rng, compat: sharpen(image, 0.1 + 1.8 * share, compat),
    _either_way(shear_x, 0.3),
    _either_way(shear_y, 0.3),
    _either_way(translate_x, 10.0),
    _either_way(translate_y, 10.0),
    _either_way(rotate, 30.0),
)


def _truncate(values: npt.NDArray[np.floating]) -> Pixels:
    """Clip to 0 to 255 and drop the fraction, as Pillow does."""
    return np.clip(values, 0, 255).astype(np.uint8)


def _extrapolate(start: Pixels, end: Pixels, factor: float) -> Pixels:
    """`start + factor * (end - start)`, clipped, fraction dropped: half a level less makes OpenCV round down."""
    return cv2.addWeighted(end, factor, start, 1 - factor, -0.4999)  # pyright: ignore[reportReturnType]


def _luma(image: Pixels) -> Pixels:
    """ITU-R 601 luma `[height, width]`."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # pyright: ignore[reportReturnType]


def _histograms(image: Pixels) -> list[npt.NDArray[np.int64]]:
    """How many pixels have each of the 256 values, channel by channel."""
    return [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64) for channel in range(3)]


def _box_kernel(sigma: float) -> npt.NDArray[np.float64]:
    """The extended box of standard deviation `sigma`: whole weights within its radius and a fraction at both ends."""
    radius = math.floor((math.sqrt(12 * sigma**2 + 1) - 1) / 2)
    length = 2 * radius + 1
    end = length * (radius * (radius + 1) - 3 * sigma**2) / (6 * (sigma**2 - (radius + 1) ** 2))
    kernel = np.ones(length + 2)
    kernel[0] = kernel[-1] = end
    return kernel / kernel.sum()


def _warp(image: Pixels, matrix: list[list[float]] | npt.NDArray[np.floating] | cv2.typing.MatLike) -> Pixels:
    """Affine map `[2, 3]` from where a pixel is to where it goes, bilinear, mid-grey outside."""
    height, width = image.shape[:2]
    return cv2.warpAffine(  # pyright: ignore[reportReturnType]
        image,
        np.asarray(matrix, np.float64),
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )
