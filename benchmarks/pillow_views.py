"""The training views in plain Pillow, which `pipeline.py` times and the tests compare with.

Written from the paper and the published settings, without Tercet's code, random choices included.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

GREY = (128, 128, 128)
RAND_AUGMENT = ("identity", "autocontrast", "equalize", "brightness", "sharpness")
RAND_AUGMENT += ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
AT_LEVEL_7 = {"brightness": 1.36, "sharpness": 1.36, "shear_x": 0.21, "shear_y": 0.21}
AT_LEVEL_7 |= {"translate_x": 7.0, "translate_y": 7.0, "rotate": 21.0}


def decode(data: bytes) -> Image.Image:
    """A JPEG's pixels."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def view(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """One view as published: crop, resize, jitter, grey, blur, flip, RandAugment; uint8 `[3, size, size]`."""
    left, top, right, bottom = random_crop(image.width, image.height, rng)
    cut = image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.uniform() < 0.8:
        jitter = {name: rng.uniform(0.6, 1.4) for name in ("brightness", "contrast", "saturation")}
        jitter["hue"] = rng.uniform(-0.1, 0.1)
        for name in rng.permutation(list(jitter)).tolist():
            cut = apply(cut, name, jitter[name])
    if rng.uniform() < 0.2:
        cut = apply(cut, "grey")
    if rng.uniform() < 0.5:
        cut = apply(cut, "blur", rng.uniform(0.1, 2.0))
    if rng.uniform() < 0.5:
        cut = apply(cut, "flip")
    for name in rng.choice(RAND_AUGMENT, 2).tolist():
        if rng.uniform() < 0.5:
            amount = AT_LEVEL_7.get(name, 0.0)
            two_sided = name.startswith(("shear", "translate", "rotate"))
            cut = apply(cut, name, -amount if two_sided and rng.uniform() < 0.5 else amount)
    return np.ascontiguousarray(np.asarray(cut).transpose(2, 0, 1))


def random_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop of a fifth to all of the area: left, top, right, bottom."""
    for _ in range(10):
        area = width * height * rng.uniform(0.2, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if wide <= width and tall <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
            return left, top, left + wide, top + tall
    wide, tall = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def apply(image: Image.Image, name: str, amount: float = 0.0) -> Image.Image:
    """One operation."""
    match name:
        case "identity":
            return image
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
    """Shift the hue in 8 bits, as the published transform does."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.array(int(turn * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def warp(image: Image.Image, name: str, amount: float) -> Image.Image:
    """Shear, translate or rotate.  Pillow takes the inverse map, and counts from a pixel's corner, not its centre."""
    middle_x, middle_y = image.width / 2, image.height / 2
    if name == "rotate":
        cosine, sine = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        # OpenCV and the published code rotate about the corner between the middle pixels as if it were a centre.
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
