"""The square views of an image that a model sees while training: uint8 RGB arrays `[size, size, 3]`.

A view is drawn first, as a crop and a list of changes, and made afterwards.  Both views of an image are drawn before it
is decoded, so that a JPEG can be decoded at a part of its size where neither crop would show the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tercet.data.augment import Compat, Pixels, apply_changes
from tercet.data.changes import Change, Crop, draw_crop, draw_flip, draw_full, draw_rand_augment
from tercet.data.images import EncodedImage, reduction_of, resize

Augment = Literal["full", "light", "whole", "none"]


@dataclass(frozen=True)
class View:
    """What becomes of an image.

    Attributes:
        crop: `(top, left, height, width)` of the part that is kept; None: the whole image.
        changes: what is done after the crop has been resized to the size of the view.
    """

    crop: Crop | None
    changes: list[Change]


@dataclass(frozen=True)
class ViewStyle:
    """How views are drawn and made.

    Attributes:
        size: side of a view in pixels.
        augment: "full" (crop, then all of `draw_full`), "light" (crop and flip), "whole" (resize, flip and RandAugment,
            as the published grounding) or "none" (resize).
        crop_scale: smallest and largest share of the image's area that a crop keeps.
        compat: "published" brings back the published RandAugment's defects, and decodes in full.
    """

    size: int
    augment: Augment = "full"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    compat: Compat = "tercet"

    def draw(self, height: int, width: int, rng: np.random.Generator, flip: bool = True) -> View:
        """A view of an image of that size: the same state of `rng` gives the same view.

        `flip` says whether left and right may be exchanged; captions are not changed with the image.
        """
        if self.augment == "none":
            return View(None, [])
        if self.augment == "whole":
            return View(None, (draw_flip(rng) if flip else []) + draw_rand_augment(rng))
        crop = draw_crop(height, width, rng, self.crop_scale)
        if self.augment == "full":
            return View(crop, draw_full(rng, flip))
        return View(crop, draw_flip(rng) if flip else [])

    def draw_two(self, height: int, width: int, rng: np.random.Generator, flip: bool = True) -> tuple[View, View]:
        """Two views drawn independently."""
        return self.draw(height, width, rng, flip), self.draw(height, width, rng, flip)

    def decode(self, image: EncodedImage, views: tuple[View, ...]) -> Pixels:
        """The pixels that `views` are cut from, decoded once and no larger than they need."""
        if self.compat == "published":
            return image.pixels()
        sides = [min(view.crop[2:]) if view.crop else min(image.height, image.width) for view in views]
        return image.pixels(reduction_of(min(sides), self.size))

    def cut(self, pixels: Pixels, view: View, height: int, width: int) -> Pixels:
        """The crop of `view` at the size of a view, before its changes.

        Args:
            pixels: the image, possibly decoded at a part of its size.
            view: drawn for an image of `height` and `width`.
        """
        part = pixels
        if view.crop is not None:
            top, left, tall, wide = view.crop
            if pixels.shape[:2] != (height, width):
                down, across = pixels.shape[0] / height, pixels.shape[1] / width
                top, tall = round(top * down), max(1, round(tall * down))
                left, wide = round(left * across), max(1, round(wide * across))
            part = pixels[top : top + tall, left : left + wide]
        # Where nothing is drawn the view is the one of evaluation, to the last bit.
        exact = self.compat == "published" or self.augment == "none"
        return resize(part, self.size) if exact else resize_fast(part, self.size)

    def make(self, pixels: Pixels, view: View, height: int, width: int) -> Pixels:
        """`view` of an image: its crop, resized and changed."""
        return apply_changes(self.cut(pixels, view, height, width), view.changes, self.compat)


def resize_fast(image: Pixels, size: int) -> Pixels:
    """As `images.resize` and within a grey level of it, in a fifth of the time.

    PyTorch's antialiased bicubic filter works on the same fixed-point weights as Pillow's, with vector instructions.
    """
    if image.shape[:2] == (size, size):
        return image.copy()
    channels_last = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def one_view(
    image: Pixels,
    size: int,
    rng: np.random.Generator,
    augment: Augment = "full",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    compat: Compat = "tercet",
    flip: bool = True,
) -> Pixels:
    """One view of a decoded image for training, uint8 `[size, size, 3]`; see `ViewStyle` for the arguments."""
    style = ViewStyle(size, augment, crop_scale, compat)
    height, width = image.shape[:2]
    return style.make(image, style.draw(height, width, rng, flip), height, width)
