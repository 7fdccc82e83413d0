"""Photometric and geometric changes of one uint8 image `[height, width, 3]`, RGB, on the CPU.

What is done to an image is drawn by `changes`; `device_augment` does the same to a whole batch on a device.  The
arithmetic is Pillow's, in which the method was published; `compat="published"` brings back the two defects of the
published operations as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from tercet.data.changes import Change

Pixels = npt.NDArray[np.uint8]
Compat = Literal["tercet", "published"]

FILL = (128, 128, 128)
FAST_TAPS = 7  # OpenCV 5 takes five times as long for 13 as for 9, and three times as long for 9 as for 7
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
    box = _box_kernel(sigma / math.sqrt(3))
    kernel = np.convolve(box, box)
    if len(kernel) + len(box) - 1 <= FAST_TAPS:
        return _convolve(image, np.convolve(kernel, box))
    return _convolve(_convolve(image, kernel), box)


def _convolve(image: Pixels, kernel: npt.NDArray[np.float64]) -> Pixels:
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
    for channel in range(3):
        low, high = (int(value) for value in cv2.minMaxLoc(cv2.extractChannel(image, channel))[:2])
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
    inside = image[1:-1, 1:-1]
    smooth: Pixels = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]  # pyright: ignore[reportAssignmentType]
    result = image.copy()
    if compat == "published":
        start = smooth.astype(np.float32)
        sharp = start + np.float32(factor) * (inside.astype(np.float32) - start)
        # through integers: casting an out-of-range float to a byte is undefined, and differs between processors
        result[1:-1, 1:-1] = (sharp.astype(np.int32) & 255).astype(np.uint8)
    else:
        result[1:-1, 1:-1] = _extrapolate(smooth, inside, factor)
    return result


def shear_x(image: Pixels, slope: float) -> Pixels:
    """Move each row to the right by `slope` times its number; what comes in is mid-grey."""
    return _warp(image, [[1, slope, 0], [0, 1, 0]])


def shear_y(image: Pixels, slope: float) -> Pixels:
    """Move each column down by `slope` times its number; what comes in is mid-grey."""
    return _warp(image, [[1, 0, 0], [slope, 1, 0]])


def translate_x(image: Pixels, pixels: float) -> Pixels:
    """Move the image to the left by `pixels`; what comes in is mid-grey."""
    return _shift(image, pixels, 1) if pixels == round(pixels) else _warp(image, [[1, 0, -pixels], [0, 1, 0]])


def translate_y(image: Pixels, pixels: float) -> Pixels:
    """Move the image up by `pixels`; what comes in is mid-grey."""
    return _shift(image, pixels, 0) if pixels == round(pixels) else _warp(image, [[1, 0, 0], [0, 1, -pixels]])


def rotate(image: Pixels, degrees: float) -> Pixels:
    """Turn the image about its centre, counter-clockwise; what comes in is mid-grey."""
    height, width = image.shape[:2]
    return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))


def apply_changes(image: Pixels, changes: Sequence[Change], compat: Compat = "tercet") -> Pixels:
    """`image` after `changes`, one after the other; `published` brings back two defects of the published operations."""
    for name, amount in changes:
        image = OPERATIONS[name](image, amount, compat)
    return image


Operation = Callable[[Pixels, float, Compat], Pixels]

OPERATIONS: dict[str, Operation] = {
    "brightness": lambda image, factor, compat: adjust_brightness(image, factor),
    "contrast": lambda image, factor, compat: adjust_contrast(image, factor),
    "saturation": lambda image, factor, compat: adjust_saturation(image, factor),
    "hue": lambda image, turn, compat: adjust_hue(image, turn),
    "grey": lambda image, _, compat: to_grey(image),
    "blur": lambda image, sigma, compat: blur(image, sigma),
    "flip": lambda image, _, compat: flip_horizontally(image),
    "autocontrast": lambda image, _, compat: autocontrast(image, compat),
    "equalize": lambda image, _, compat: equalize(image),
    "sharpness": sharpen,
    "shear_x": lambda image, slope, compat: shear_x(image, slope),
    "shear_y": lambda image, slope, compat: shear_y(image, slope),
    "translate_x": lambda image, pixels, compat: translate_x(image, pixels),
    "translate_y": lambda image, pixels, compat: translate_y(image, pixels),
    "rotate": lambda image, degrees, compat: rotate(image, degrees),
}


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


def _shift(image: Pixels, pixels: float, axis: int) -> Pixels:
    """Move the image by whole `pixels` towards the start of an axis, as `_warp` does; mid-grey comes in."""
    result = np.empty_like(image)
    source, target = np.moveaxis(image, axis, 0), np.moveaxis(result, axis, 0)
    reach = min(abs(round(pixels)), len(source))
    kept = len(source) - reach
    if pixels > 0:
        target[:kept], target[kept:] = source[reach:], FILL
    else:
        target[reach:], target[:reach] = source[:kept], FILL
    return result
