"""Bytes to pixels, and pixels to the square views that a model sees: uint8 RGB arrays `[height, width, 3]`.

Decoding is strict: an image that is cut short, too large or no image at all raises `BrokenImage` with the reason,
and is never filled in with grey.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import warnings
from typing import Literal

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tercet.data.augment import Compat, Pixels, augment_fully, flip_sometimes, rand_augment
from tercet.errors import TercetError

Augment = Literal["full", "light", "whole", "none"]

PIXEL_LIMIT = 89_478_485
# Pillow also reads formats that run other programs (EPS) or that nobody keeps photographs in; they stay shut.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_JPEG_END = b"\xff\xd9"
_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


class BrokenImage(TercetError):  # noqa: N818 - a sample's state; it is counted more often than raised
    """An image that cannot be used: `name` says which sample, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives the way back from a worker process
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(data: bytes, name: str, pixel_limit: int = PIXEL_LIMIT, minimum_side: int | None = None) -> Pixels:
    """Decode an image file to uint8 RGB `[height, width, 3]`, upright as its EXIF data says.

    Transparency is laid on white, 16-bit grey is scaled to 8, CMYK and palettes become RGB, and of an animation
    the first frame is taken.

    Args:
        data: the file's bytes.
        name: names the sample in the error.
        pixel_limit: refuse images with more pixels, before decoding them.  Pillow's own ceiling of 178,956,970
            pixels stays in force above any limit.
        minimum_side: let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many
            pixels; faster, and a little different from decoding in full.

    Raises:
        BrokenImage: empty, cut short, too large, a web page or drawing, or no image of a known format.
    """
    if not data:
        raise BrokenImage(name, "the image file is empty")
    try:
        with warnings.catch_warnings():
            # The limit below is ours; Pillow's warning would be a second voice about the same thing.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_formats())
        width, height = image.size
        if width * height > pixel_limit:
            raise BrokenImage(name, f"{width} x {height} pixels are more than pixel_limit {pixel_limit} allows")
        pixels = _decode_jpeg(data, image, minimum_side)
        if pixels is None:
            if minimum_side is not None:
                image.draft(image.mode, (minimum_side, minimum_side))
            image.load()
            pixels = _to_rgb(image, name)
        return _turn_upright(pixels, _orientation(image))
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(name, f"more pixels than Pillow's ceiling of {2 * PIXEL_LIMIT:,} allows") from error
    except UnidentifiedImageError as error:
        raise BrokenImage(name, _what_instead(data)) from error
    except Exception as error:  # hostile bytes bring decoders to raise nearly anything
        raise BrokenImage(
            name, f"the image cannot be decoded ({_one_line(error)}); it is damaged or cut short"
        ) from error


def from_pillow(image: Image.Image, name: str) -> Pixels:
    """An image that Pillow has opened, as `decode` gives it: uint8 RGB `[height, width, 3]`, upright.

    Raises:
        BrokenImage: cut short, or of samples that do not fit into 8 bits.
    """
    try:
        image.load()
    except Exception as error:  # hostile bytes bring decoders to raise nearly anything
        raise BrokenImage(
            name, f"the image cannot be decoded ({_one_line(error)}); it is damaged or cut short"
        ) from error
    return _turn_upright(_to_rgb(image, name), _orientation(image))


def resize(image: Pixels, size: int) -> Pixels:
    """The evaluation transform: `[height, width, 3]` to `[size, size, 3]`, bicubic, aspect ratio not kept."""
    if image.shape[:2] == (size, size):
        return image.copy()
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def two_views(
    image: Pixels,
    size: int,
    rng: np.random.Generator,
    augment: Augment = "full",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    compat: Compat = "tercet",
    flip: bool = True,
) -> tuple[Pixels, Pixels]:
    """Two independently augmented views of one decoded image, each uint8 `[size, size, 3]`; see `one_view`.

    With `augment="none"` both are the same array.
    """
    first = one_view(image, size, rng, augment, crop_scale, compat, flip)
    if augment == "none":
        return first, first
    return first, one_view(image, size, rng, augment, crop_scale, compat, flip)


def one_view(
    image: Pixels,
    size: int,
    rng: np.random.Generator,
    augment: Augment = "full",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    compat: Compat = "tercet",
    flip: bool = True,
) -> Pixels:
    """One view of an image for training, uint8 `[size, size, 3]`.

    Args:
        image: uint8 `[height, width, 3]`.
        size: side of the view in pixels.
        rng: source of every random choice: the same state gives the same view.
        augment: "full" (crop, then all of `augment_fully`), "light" (crop and flip), "whole" (resize, flip and
            RandAugment, as the published grounding) or "none" (resize).
        crop_scale: smallest and largest share of the image's area that the crop keeps.
        compat: "published" brings back the published RandAugment's defects.
        flip: whether left and right may be exchanged; captions are not changed with the image.
    """
    if augment == "none":
        return resize(image, size)
    if augment == "whole":
        view = resize(image, size)
        return rand_augment(flip_sometimes(view, rng) if flip else view, rng, compat=compat)
    top, left, height, width = draw_crop(image.shape[0], image.shape[1], rng, crop_scale)
    view = resize(image[top : top + height, left : left + width], size)
    if augment == "full":
        return augment_fully(view, rng, compat, flip)
    return flip_sometimes(view, rng) if flip else view


def draw_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
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


def sufficient_side(size: int, crop_scale: tuple[float, float]) -> int:
    """`minimum_side` for `decode` at which even the smallest, narrowest crop still has `size` pixels each way."""
    return math.ceil(size / math.sqrt(crop_scale[0] * 3 / 4))


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of ours that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_jpeg(data: bytes, image: Image.Image, minimum_side: int | None) -> Pixels | None:
    """OpenCV's decoder for plain JPEGs: the same pixels in half the time.  None where Pillow must do it.

    OpenCV fills a file that was cut short with grey and says nothing, so only files that end as a JPEG ends are
    given to it.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not data.endswith(_JPEG_END):
        return None
    flags = cv2.IMREAD_COLOR
    if minimum_side is not None:
        flags = _REDUCED.get(_reduction(min(image.size), minimum_side), flags)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        return None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # pyright: ignore[reportReturnType]


def _reduction(side: int, minimum_side: int) -> int:
    """The largest of 8, 4, 2, 1 that leaves `side` at least `minimum_side` pixels."""
    return next((factor for factor in (8, 4, 2) if side // factor >= minimum_side), 1)


def _to_rgb(image: Image.Image, name: str) -> Pixels:
    """A loaded image of any mode as RGB `[height, width, 3]`."""
    if image.mode == "F":
        raise BrokenImage(name, "its samples are floating point, of no agreed range; convert it to 8 bits")
    if image.mode.startswith("I"):
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise BrokenImage(name, "its samples have more than 16 bits; convert it to 8 bits")
        grey = ((samples + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; damaged EXIF data says nothing about the pixels, which are sound, so it counts as 1."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return value if value in range(1, 9) else 1


def _turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the camera's EXIF orientation."""
    if orientation == 1:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _what_instead(data: bytes) -> str:
    """What bytes that no decoder knows seem to be."""
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start:
        return "an SVG drawing, not a photograph; render it to PNG first"
    if start.startswith(b"<"):
        return "a web page or XML text, not an image; the download probably failed"
    return f"not an image of a known format (it starts with {data[:8]!r})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
