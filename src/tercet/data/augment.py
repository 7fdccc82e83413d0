"""The augmentation of TCL (arXiv 2202.10401, section 4): crop, colour jitter, grey, blur, flip, then RandAugment.

What is done to a view is sampled first, without its pixels, as a crop and a list of operations `(name, amount)`, always
in the same order from the generator that the caller passes in.  `apply_operations` then does it to a uint8 image
`[height, width, 3]`, RGB.  The arithmetic is Pillow's, in which the method was published; `compat="published"` also
brings back two defects of the published operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Compat = Literal["tercet", "published"]
Operation = tuple[str, float]
Crop = tuple[int, int, int, int]

FILL = (128, 128, 128)  # mid-grey, where a warp has no pixel to take
FAST_TAPS = 7  # OpenCV 5 takes five times as long for 13 as for 9, and three times as long for 9 as for 7
_GREYS = np.arange(256, dtype=np.float32)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13

# RandAugment's operations (arXiv 1909.13719) and the amount of each at level 10, in either direction.  None: it has no
# amount, or a factor that follows from the level.  A sampled number is an index into this tuple, so its order matters.
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


def sample_augmentations(rng: np.random.Generator, flip: bool = True) -> list[Operation]:
    """All operations that follow the random crop, in the published order.

    `flip=False` is for captions that mention left and right, since a caption never changes with its image.
    """
    operations: list[Operation] = []
    if rng.random() < 0.8:
        operations += sample_jitter(rng)
    if rng.random() < 0.2:
        operations.append(("grey", 0.0))
    if rng.random() < 0.5:
        operations.append(("blur", rng.uniform(0.1, 2.0)))
    if flip:
        operations += sample_flip(rng)
    return operations + sample_rand_augment(rng)


def sample_jitter(rng: np.random.Generator, strength: float = 0.4, hue: float = 0.1) -> list[Operation]:
    """Brightness, contrast, saturation by factors in `1 ± strength` and hue by up to `hue` of a turn, in any order."""
    factors = rng.uniform(1 - strength, 1 + strength, size=3).tolist()
    amounts = [*factors, rng.uniform(-hue, hue)]
    operations = list(zip(("brightness", "contrast", "saturation", "hue"), amounts, strict=True))
    return [operations[index] for index in rng.permutation(len(operations))]


def sample_flip(rng: np.random.Generator) -> list[Operation]:
    """A horizontal flip with probability one half."""
    return [("flip", 0.0)] if rng.random() < 0.5 else []


def sample_rand_augment(
    rng: np.random.Generator, count: int = 2, level: float = 7, probability: float = 0.5
) -> list[Operation]:
    """RandAugment as published: `count` operations sampled with replacement, each applied with `probability`.

    At level 7 of 10 factors are 1.36, shears 0.21, translations 7 pixels at every image size, rotations 21 degrees.
    """
    operations: list[Operation] = []
    for index in rng.integers(len(RAND_AUGMENT), size=count):
        if rng.random() >= probability:
            continue
        name, largest = RAND_AUGMENT[index]
        if largest is not None:
            amount = largest * level / 10
            operations.append((name, -amount if rng.random() < 0.5 else amount))
        elif name != "identity":
            operations.append((name, 0.1 + 1.8 * level / 10))
    return operations


def sample_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """A random rectangle `(top, left, height, width)` of an image.

    Its share of the area is uniform in `scale`, width / height log-uniform in `ratio`, its position uniform.  When ten
    samples do not fit: the largest centred rectangle whose ratio is within bounds.
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


def apply_operations(image: Pixels, operations: Sequence[Operation], compat: Compat = "tercet") -> Pixels:
    """`image` after the operations, one after another.  The input is never written to."""
    for name, amount in operations:
        image = apply_operation(image, name, amount, compat)
    return image


def apply_operation(image: Pixels, name: str, amount: float, compat: Compat = "tercet") -> Pixels:
    """`image` after one operation.  What a warp moves in from outside is mid-grey."""
    match name:
        case "brightness":
            return adjust_brightness(image, amount)
        case "contrast":
            return adjust_contrast(image, amount)
        case "saturation":
            return adjust_saturation(image, amount)
        case "hue":
            return adjust_hue(image, amount)
        case "grey":
            return to_grey(image)
        case "blur":
            return blur(image, amount)
        case "flip":
            return cv2.flip(image, 1)  # pyright: ignore[reportReturnType]
        case "autocontrast":
            return autocontrast(image, compat)
        case "equalize":
            return equalize(image)
        case "sharpness":
            return sharpen(image, amount, compat)
        case "shear_x":  # rows move to the right by `amount` times their number
            return _warp(image, [[1, amount, 0], [0, 1, 0]])
        case "shear_y":  # columns move down by `amount` times their number
            return _warp(image, [[1, 0, 0], [amount, 1, 0]])
        case "translate_x":  # to the left, by pixels
            return _warp(image, [[1, 0, -amount], [0, 1, 0]])
        case "translate_y":  # up, by pixels
            return _warp(image, [[1, 0, 0], [0, 1, -amount]])
        case "rotate":  # counter-clockwise about the centre, by degrees
            height, width = image.shape[:2]
            return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), amount, 1))
    raise ValueError(f"no augmentation is named {name!r}")


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Scale every channel by `factor`; 1 changes nothing, 0 gives black."""
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
    """The luma (ITU-R 601) in all three channels."""
    return cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB)  # pyright: ignore[reportReturnType]


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur of standard deviation `sigma` pixels, edges repeated.

    The kernel is three extended boxes one after another, as Pillow's is (Gwosdek et al., SSVM 2011).  Its variance is
    `sigma` squared even below half a pixel, where a sampled Gaussian hardly blurs at all.
    """
    box = _box_kernel(sigma / math.sqrt(3))
    kernel = np.convolve(box, box)
    if len(kernel) + len(box) - 1 <= FAST_TAPS:
        return _convolve(image, np.convolve(kernel, box))
    return _convolve(_convolve(image, kernel), box)


def autocontrast(image: Pixels, compat: Compat = "tercet") -> Pixels:
    """Stretch each channel to 0 to 255; a channel of a single value stays.

    `published`: the minimum was an unsigned byte and its negation wrapped around, so a channel whose minimum is above 0
    turns white.
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
    for channel in range(3):
        histogram = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = int(histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
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


def _truncate(values: npt.NDArray[np.floating]) -> Pixels:
    """Clip to 0 to 255 and drop the fraction, as Pillow does."""
    return np.clip(values, 0, 255).astype(np.uint8)


def _extrapolate(start: Pixels, end: Pixels, factor: float) -> Pixels:
    """`start + factor * (end - start)`, clipped, fraction dropped: half a level less makes OpenCV round down."""
    return cv2.addWeighted(end, factor, start, 1 - factor, -0.4999)  # pyright: ignore[reportReturnType]


def _luma(image: Pixels) -> Pixels:
    """ITU-R 601 luma `[height, width]`."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # pyright: ignore[reportReturnType]


def _box_kernel(sigma: float) -> npt.NDArray[np.float64]:
    """The extended box of standard deviation `sigma`: whole weights within its radius and a fraction at both ends."""
    radius = math.floor((math.sqrt(12 * sigma**2 + 1) - 1) / 2)
    length = 2 * radius + 1
    end = length * (radius * (radius + 1) - 3 * sigma**2) / (6 * (sigma**2 - (radius + 1) ** 2))
    kernel = np.ones(length + 2)
    kernel[0] = kernel[-1] = end
    return kernel / kernel.sum()


def _convolve(image: Pixels, kernel: npt.NDArray[np.float64]) -> Pixels:
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)  # pyright: ignore[reportReturnType]


def _warp(image: Pixels, matrix: list[list[float]] | cv2.typing.MatLike) -> Pixels:
    """Affine map `[2, 3]` from where a pixel is to where it goes, bilinear."""
    height, width = image.shape[:2]
    return cv2.warpAffine(  # pyright: ignore[reportReturnType]
        image,
        np.asarray(matrix, np.float64),
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )
