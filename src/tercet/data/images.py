"""Bytes to pixels, uint8 RGB `[height, width, 3]`, and pixels to the square views that a model sees.

Decoding is strict: an image that is truncated, too large or no image at all raises `BrokenImage` with the reason, and
is never filled in with grey.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from tercet.data.augment import (
    Compat,
    Crop,
    Operation,
    Pixels,
    apply_operations,
    sample_augmentations,
    sample_crop,
    sample_flip,
    sample_rand_augment,
)
from tercet.errors import TercetError

Augment = Literal["full", "light", "whole", "none"]

PIXEL_LIMIT = 89_478_485
# Pillow also reads formats that run other programs (EPS) or that nobody keeps photographs in; they stay shut.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_JPEG_END = b"\xff\xd9"
_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


class BrokenImage(TercetError):  # noqa: N818 - a sample's state; it is counted more often than raised
    """An image that cannot be used: `name` says which, `reason` why."""

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
        with _reporting_broken_images(name, data):
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
        with _reporting_broken_images(self._name, self.data):
            pixels = _decode_jpeg(self.data, self._image, reduction)
            if pixels is None:
                if reduction > 1:
                    width, height = self._image.size
                    self._image.draft(self._image.mode, (width // reduction, height // reduction))
                self._image.load()
                pixels = _to_rgb(self._image, self._name)
            return _turn_upright(pixels, self._orientation)


def decode(data: bytes, name: str, pixel_limit: int = PIXEL_LIMIT) -> Pixels:
    """Decode an image file to uint8 RGB `[height, width, 3]`, upright as its EXIF data says.

    Transparency is composited on white, 16-bit grey is scaled to 8, CMYK and palettes become RGB, and of an animation
    the first frame is taken.

    Args:
        data: the file's bytes.
        name: names the image in the error.
        pixel_limit: reject images with more pixels, before decoding them.  Pillow's own ceiling of 178,956,970 pixels
            stays in force above any limit.

    Raises:
        BrokenImage: empty, truncated, too large, a web page or drawing, or no image of a known format.
    """
    return EncodedImage(data, name, pixel_limit).pixels()


@contextlib.contextmanager
def _reporting_broken_images(name: str, data: bytes) -> Iterator[None]:
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
    with _reporting_broken_images(name, b""):
        image.load()
    return _turn_upright(_to_rgb(image, name), _orientation(image))


def resize(image: Pixels, size: int) -> Pixels:
    """The evaluation transform: `[height, width, 3]` to `[size, size, 3]`, bicubic, aspect ratio not kept."""
    if image.shape[:2] == (size, size):
        return image.copy()
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def resize_fast(image: Pixels, size: int) -> Pixels:
    """As `resize` and within a grey level of it, in a fifth of the time.

    PyTorch's antialiased bicubic filter works on the same fixed-point weights as Pillow's, with vector instructions.
    """
    if image.shape[:2] == (size, size):
        return image.copy()
    channels_last = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class ViewTransform:
    """Training views of an image: each is cropped, resized and augmented at random.

    Attributes:
        size: side of a view in pixels.
        augment: "full" (crop, then all of `sample_augmentations`), "light" (crop and flip), "whole" (resize, flip and
            RandAugment, as the published grounding) or "none" (resize).
        crop_scale: smallest and largest share of the image's area that a crop keeps.
        compat: "published" brings back the defects of the published RandAugment, and decodes at full size.
    """

    size: int
    augment: Augment = "full"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    compat: Compat = "tercet"

    def __call__(
        self, image: EncodedImage | Pixels, rng: np.random.Generator, count: int = 2, flip: bool = True
    ) -> list[Pixels]:
        """`count` independent views, uint8 `[size, size, 3]`; the same state of `rng` gives the same views.

        Args:
            image: an encoded one is decoded once for all views, a JPEG at a part of its size where no crop shows it.
            rng: source of every random choice.
            count: views to make.
            flip: whether views may be mirrored; captions are never changed with their image.

        Raises:
            BrokenImage: truncated or damaged.
        """
        height, width = (image.height, image.width) if isinstance(image, EncodedImage) else image.shape[:2]
        # Sampled before decoding, so that the crops say how large the image must be decoded.
        sampled = [self.sample(height, width, rng, flip) for _ in range(count)]
        if isinstance(image, EncodedImage):
            side = min(min(crop[2:]) if crop else min(height, width) for crop, _ in sampled)
            pixels = image.pixels(1 if self._exact else reduction_for(side, self.size))
        else:
            pixels = image
        scale = pixels.shape[0] / height, pixels.shape[1] / width
        return [
            apply_operations(self._cut(pixels, crop, scale), operations, self.compat) for crop, operations in sampled
        ]

    def sample(
        self, height: int, width: int, rng: np.random.Generator, flip: bool = True
    ) -> tuple[Crop | None, list[Operation]]:
        """The crop of a view (None: the whole image) and the operations on it after it has been resized."""
        if self.augment == "none":
            return None, []
        if self.augment == "whole":
            return None, (sample_flip(rng) if flip else []) + sample_rand_augment(rng)
        crop = sample_crop(height, width, rng, self.crop_scale)
        if self.augment == "full":
            return crop, sample_augmentations(rng, flip)
        return crop, sample_flip(rng) if flip else []

    def _cut(self, pixels: Pixels, crop: Crop | None, scale: tuple[float, float]) -> Pixels:
        """The crop of an image decoded at `scale` of its size, resized to a view."""
        if crop is not None:
            top, height = round(crop[0] * scale[0]), max(1, round(crop[2] * scale[0]))
            left, width = round(crop[1] * scale[1]), max(1, round(crop[3] * scale[1]))
            pixels = pixels[top : top + height, left : left + width]
        return resize(pixels, self.size) if self._exact else resize_fast(pixels, self.size)

    @property
    def _exact(self) -> bool:
        """Without augmentation a view equals that of evaluation, to the last bit."""
        return self.compat == "published" or self.augment == "none"


def reduction_for(side: int, minimum_side: int) -> int:
    """The largest of 8, 4, 2, 1 that leaves `side` at least `minimum_side` pixels."""
    return next((factor for factor in (8, 4, 2) if side // factor >= minimum_side), 1)


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
