"""Listed images to what a row of the table and the model need: bytes hashed, pixels, a thumbnail."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from tercet.data.augment import Pixels
from tercet.data.images import PIXEL_LIMIT, BrokenImage, decode, resize
from tercet.data.listing import ListedImage, read_image
from tercet.errors import TercetError

THUMBNAIL_SIDE = 256
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 85, cv2.IMWRITE_JPEG_OPTIMIZE, 1]


@dataclass
class Prepared:
    """An image that was read.

    Attributes:
        image: what was listed, its size filled in.
        sha256: of its bytes, in hexadecimal.
        width: pixels, upright.
        height: pixels, upright.
        thumbnail: JPEG.
        pixels: what the model sees, uint8 `[image_size, image_size, 3]`.
    """

    image: ListedImage
    sha256: str
    width: int
    height: int
    thumbnail: bytes
    pixels: Pixels


def prepare(image: ListedImage, image_size: int, pixel_limit: int = PIXEL_LIMIT) -> Prepared | str:
    """Read and decode one image; the reason, where that fails."""
    try:
        data = read_image(image.uri, image.size, image.offset)
        # As every evaluation decodes: in full, so that an image is embedded here as `embed_images` embeds it.
        pixels = decode(data, image.uri, pixel_limit)
    except (BrokenImage, TercetError) as error:
        reason = str(error)
        return reason if image.uri in reason else f"{image.uri}: {reason}"
    height, width = pixels.shape[:2]
    size = image.size or len(data)
    listed = ListedImage(image.uri, image.caption, size, image.modified, image.offset)
    sha256 = hashlib.sha256(data).hexdigest()
    return Prepared(listed, sha256, width, height, make_thumbnail(pixels), resize(pixels, image_size))


def prepare_some(images: Sequence[ListedImage], image_size: int) -> list[Prepared | str]:
    """`prepare` of several, in their order."""
    return [prepare(image, image_size) for image in images]


def make_thumbnail(pixels: Pixels) -> bytes:
    """A JPEG whose longer side has `THUMBNAIL_SIDE` pixels at most; small images are not enlarged."""
    scale = THUMBNAIL_SIDE / max(pixels.shape[:2])
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)  # pyright: ignore
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _JPEG)
    return np.asarray(encoded).tobytes()
