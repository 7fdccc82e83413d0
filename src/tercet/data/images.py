"""Bytes to pixels: uint8 RGB arrays `[height, width, 3]`.  What a model sees of them is made in `views`.

Decoding is strict: an image that is cut short, too large or no image at all raises `BrokenImage` with the reason,
and is never filled in with grey.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import struct
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tercet.data.augment import Pixels
from tercet.errors import TercetError

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


class EncodedImage:
    """An image file whose header is read and whose pixels are not yet.

    Attributes:
        data: the file's bytes.
        format: as Pillow names it, such as JPEG.
        height, width: of the upright image, in pixels.

    Raises:
        BrokenImage: empty, too large, a web page or drawing, or no image of a known format.
    """

    def __init__(self, data: bytes, name: str, pixel_limit: int = PIXEL_LIMIT) -> None:
        self.data = data
        self._name = name
        if not data:
            raise BrokenImage(name, "the image file is empty")
        with _told_as_broken(name, data):
            with warnings.catch_warnings():
                # The limit below is ours; Pillow's warning would be a second voice about the same thing.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self._image = Image.open(io.BytesIO(data), formats=_formats())
            width, height = self._image.size
            if width * height > pixel_limit:
                raise BrokenImage(name, f"{width} x {height} pixels are more than pixel_limit {pixel_limit} allows")
            if self._image.format == "TIFF":
                self._image.load()  # which turns it upright, and changes its size and its tag
                width, height = self._image.size
            self._orientation = _orientation(self._image)
        self.format = self._image.format or ""
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)

    def pixels(self, reduction: int = 1) -> Pixels:
        """The upright image, once: uint8 RGB `[height, width, 3]`.

        Args:
            reduction: 2, 4 or 8 lets a JPEG be decoded at that part of its size, which is faster and a little different
                from shrinking it later; other formats come in full.

        Raises:
            BrokenImage: cut short or damaged.
        """
        with _told_as_broken(self._name, self.data):
            pixels = _decode_jpeg(self.data, self._image, reduction)
            if pixels is None:
                if reduction > 1:
                    width, height = self._image.size
                    self._image.draft(self._image.mode, (width // reduction, height // reduction))
                self._image.load()
                pixels = _to_rgb(self._image, self._name)
            return _turn_upright(pixels, self._orientation)


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
    image = EncodedImage(data, name, pixel_limit)
    return image.pixels(1 if minimum_side is None else reduction_of(min(image.height, image.width), minimum_side))


@contextlib.contextmanager
def _told_as_broken(name: str, data: bytes) -> Iterator[None]:
    """Turns whatever a decoder raises into a `BrokenImage` that says what `data` seems to be."""
    try:
        yield
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
    with _told_as_broken(name, b""):
        image.load()
    return _turn_upright(_to_rgb(image, name), _orientation(image))


def resize(image: Pixels, size: int) -> Pixels:
    """The evaluation transform: `[height, width, 3]` to `[size, size, 3]`, bicubic, aspect ratio not kept."""
    if image.shape[:2] == (size, size):
        return image.copy()
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def sufficient_side(size: int, crop_scale: tuple[float, float]) -> int:
    """`minimum_side` for `decode` at which even the smallest, narrowest crop still has `size` pixels each way."""
    return math.ceil(size / math.sqrt(crop_scale[0] * 3 / 4))


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of ours that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_jpeg(data: bytes, image: Image.Image, reduction: int) -> Pixels | None:
    """OpenCV's decoder for plain JPEGs: the same pixels in half the time.  None where Pillow must do it.

    OpenCV fills a file that was cut short with grey and says nothing, so only files that end as a JPEG ends are
    given to it.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not data.endswith(_JPEG_END):
        return None
    flags = _REDUCED.get(reduction, cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is not None and reduction in _REDUCED:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return pixels  # pyright: ignore[reportReturnType]


def reduction_of(side: int, minimum_side: int) -> int:
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
