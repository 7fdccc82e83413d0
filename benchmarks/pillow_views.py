"""The training views as anybody would write them with Pillow: what `pipeline.py` times and the tests compare with.

The same draws as Tercet's (`data.changes`), operation by operation with Pillow's own functions, one image at a time.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tercet.data.changes import Change, draw_crop, draw_full

GREY = (128, 128, 128)


def decode(data: bytes) -> Image.Image:
    """A JPEG's pixels."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def view(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """One view as published: crop, resize, jitter, grey, blur, flip, RandAugment; uint8 `[3, size, size]`."""
    top, left, height, width = draw_crop(image.height, image.width, rng, (0.2, 1.0))
    cut = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    for change in draw_full(rng):
        cut = apply(cut, change)
    return np.ascontiguousarray(np.asarray(cut).transpose(2, 0, 1))


def apply(image: Image.Image, change: Change) -> Image.Image:
    """One change."""
    name, amount = change
    match name:
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(amount)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(amount)
        case "saturation":
            return ImageEnhance.Color(image).enhance(amount)
        case "hue":
            return turn_hue(image, amount)
        case "grey":
            return image.convert("L").convert("RGB")
        case "blur":
            return image.filter(ImageFilter.GaussianBlur(amount))
        case "flip":
            return ImageOps.mirror(image)
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(amount)
    return warp(image, name, amount)


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """The hue in 8 bits, as the published transform turns it."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.array(int(turn * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def warp(image: Image.Image, name: str, amount: float) -> Image.Image:
    """A shear, a shift or a turn.  Pillow asks where a pixel comes from, and counts from its corner, not its centre."""
    middle_x, middle_y = image.width / 2, image.height / 2
    if name == "rotate":
        cosine, sine = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        # OpenCV and the published code turn about the corner between the middle pixels as if it were a pixel's centre.
        middle_x, middle_y = middle_x + 0.5, middle_y + 0.5
        data = (
            cosine,
            -sine,
            middle_x - cosine * middle_x + sine * middle_y,
            sine,
            cosine,
            middle_y - sine * middle_x - cosine * middle_y,
        )
    else:
        data = {
            "shear_x": (1, -amount, amount / 2, 0, 1, 0),
            "shear_y": (1, 0, 0, -amount, 1, amount / 2),
            "translate_x": (1, 0, amount, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, amount),
        }[name]
    return image.transform(image.size, Image.Transform.AFFINE, data, resample=Image.Resampling.BILINEAR, fillcolor=GREY)
