"""Explanations of a match or an answer: a heatmap for each word of a text, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from tercet.data.augment import Pixels
from tercet.tasks.grounding import peak
from tercet.tasks.heatmaps import enlarge

PIECE = "##"
# The image stays visible under the colours: it turns grey, and keeps this share of its light where heat is greatest.
MIN_IMAGE = 0.25
MIN_OPACITY = 0.35


@dataclass(frozen=True)
class WordHeat:
    """A word and where it is seen.

    Attributes:
        word: its pieces joined.
        heatmap: `[rows, columns]` of patches, 0 and up.
        strength: the greatest heat of this word as a share of the greatest of all words, 0 to 1.
    """

    word: str
    heatmap: Tensor
    strength: float


@dataclass(frozen=True)
class Explanation:
    """Where in an image a text is seen, and how well they fit.

    Attributes:
        text: the text, as given.
        pixels: the image, uint8 `[height, width, 3]`.
        heatmap: of the whole text, `[rows, columns]` of patches; higher is more.
        words: in their order; empty where the mode does not tell words apart.
        match: the probability that they belong together; None without the fusion encoder.
        answer: what the model answers, where the text is a question to it.
    """

    text: str
    pixels: Pixels
    heatmap: Tensor
    words: list[WordHeat]
    match: float | None = None
    answer: str | None = None

    def enlarged(self) -> Tensor:
        """The map of the whole text at the size of the image, `[height, width]`."""
        return enlarge(self.heatmap[None], *self.pixels.shape[:2])[0]

    @property
    def point(self) -> tuple[float, float]:
        """The strongest point, (x, y) in pixels of the image."""
        return peak(self.enlarged())

    def overlay(self, word: int | None = None, side: int | None = None) -> Pixels:
        """The image in grey with the heat of a word, or of the whole text, in colour on it; weak words in faint colour.

        Args:
            word: index in `words`; None: the whole text.
            side: pixels of the longer side; default that of the image.

        Returns:
            uint8 `[height, width, 3]`.
        """
        pixels = self.pixels if side is None else fit(self.pixels, side)
        if word is None:
            return blend(pixels, self.heatmap)
        return blend(pixels, self.words[word].heatmap, self.words[word].strength)


def join_pieces(pieces: Sequence[tuple[str, Tensor]]) -> list[WordHeat]:
    """Word pieces with their maps `[rows, columns]` to words; the map of a word is the mean over its pieces."""
    words: list[tuple[str, list[Tensor]]] = []
    for piece, heatmap in pieces:
        if piece.startswith(PIECE) and words:
            text, maps = words[-1]
            words[-1] = (text + piece.removeprefix(PIECE), [*maps, heatmap])
        else:
            words.append((piece, [heatmap]))
    joined = [(text, torch.stack(maps).mean(dim=0)) for text, maps in words]
    most = max((heatmap.max().item() for _, heatmap in joined), default=0.0)
    return [WordHeat(text, heatmap, heatmap.max().item() / most if most > 0 else 0.0) for text, heatmap in joined]


def blend(pixels: Pixels, heatmap: Tensor, strength: float = 1.0) -> Pixels:
    """Heat in colour over an image in grey; the scale ends at the map's own maximum, and zeros have no colour.

    Args:
        pixels: uint8 `[height, width, 3]`.
        heatmap: `[rows, columns]`, 0 and up.
        strength: 0 to 1; how opaque the colour is, from `MIN_OPACITY` up.

    Returns:
        uint8 `[height, width, 3]`.
    """
    from matplotlib import colormaps

    height, width = pixels.shape[:2]
    heat = enlarge(heatmap[None].float(), height, width)[0].clamp(min=0)
    heat = (heat / heat.max().clamp(min=1e-12)).numpy()[..., None]
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32) / 255
    # Light grey, so that the dark end of the colours shows on a dark image.
    grey = 0.25 + 0.75 * grey
    colours = colormaps["inferno"](0.15 + 0.8 * heat[..., 0])[..., :3]
    opacity = MIN_OPACITY + (1 - MIN_OPACITY) * math.sqrt(strength)
    weight = opacity * (1 - MIN_IMAGE) * heat**0.8
    return np.rint(255 * ((1 - weight) * grey + weight * colours)).astype(np.uint8)


def fit(pixels: Pixels, side: int) -> Pixels:
    """The image with a longer side of `side` pixels; enlarged or reduced."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(1, math.floor(scale * length + 0.5)) for length in pixels.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(pixels, (width, height), interpolation=how)  # pyright: ignore[reportReturnType]
