"""From the objects of a scene to pixels: antialiased shapes over a background that says nothing about them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from tercet.data.scenes import SceneObject

SUPERSAMPLING = 4
FRACTION_BITS = 4  # of the fixed-point coordinates that cv2.fillPoly takes
COLOUR_VALUES = {
    "red": (212, 32, 38),
    "orange": (250, 134, 10),
    "yellow": (248, 222, 44),
    "green": (34, 150, 58),
    "blue": (36, 80, 214),
    "purple": (134, 40, 168),
    "black": (20, 20, 22),
    "white": (247, 247, 245),
}
COLOUR_JITTER = 14.0  # largest shift of a channel, out of 255


def draw(objects: Sequence[SceneObject], background: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the objects over a background of the named kind: uint8 [size, size, 3], RGB."""
    canvas = _background(background, size, rng)
    for item in objects:
        shift = (rng.random(3) - 0.5) * 2 * COLOUR_JITTER
        colour = np.clip(np.array(COLOUR_VALUES[item.colour]) + shift, 0, 255).astype(np.float32)
        left, top, cover = _cover(item, size)
        height, width = cover.shape
        shade = 1.0 - 0.12 * rng.random() * np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        patch = canvas[top : top + height, left : left + width]
        patch += cover[:, :, None] * (colour * shade - patch)
    canvas += (rng.random(canvas.shape, dtype=np.float32) - 0.5) * 5
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def bounding_box(item: SceneObject, size: int) -> tuple[float, float, float, float]:
    """The object's box (left, top, right, bottom) in pixels of a picture of side `size`."""
    points = np.concatenate(_outlines(item)) * size
    (left, top), (right, bottom) = points.min(0), points.max(0)
    return float(left), float(top), float(right), float(bottom)


def _cover(item: SceneObject, size: int) -> tuple[int, int, np.ndarray]:
    """Left and top of a patch of the picture, and the share of each of its pixels that the object covers: float32."""
    left, top, right, bottom = bounding_box(item, size)
    left, top = max(math.floor(left), 0), max(math.floor(top), 0)
    width, height = min(math.ceil(right), size) - left, min(math.ceil(bottom), size) - top
    mask = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    scale = SUPERSAMPLING << FRACTION_BITS
    contours = [np.round((points * size - (left, top)) * scale).astype(np.int32) for points in _outlines(item)]
    cv2.fillPoly(mask, contours, 1, shift=FRACTION_BITS)  # even-odd rule: the second outline of a ring is its hole
    cells = mask.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
    return left, top, cells.sum((1, 3), dtype=np.uint8).astype(np.float32) / SUPERSAMPLING**2


def _outlines(item: SceneObject) -> list[np.ndarray]:
    """The object's closed outlines in shares of the side, each [points, 2]."""
    cosine, sine = math.cos(item.angle), math.sin(item.angle)
    turn = np.array([[cosine, sine], [-sine, cosine]]) * item.radius
    return [points @ turn + (item.x, item.y) for points in _unit_outlines(item.shape)]


@functools.cache
def _unit_outlines(shape: str) -> list[np.ndarray]:
    """Outlines of radius about 1 around the origin, chosen so that all shapes look equally large."""
    if shape == "circle":
        return [_polygon(40, 0.92)]
    if shape == "ring":
        return [_polygon(40, 1.0), _polygon(40, 0.55)]
    if shape == "square":
        return [_polygon(4, 1.16, turn=math.pi / 4)]
    if shape == "diamond":
        return [_polygon(4, 1.1) * np.array((0.72, 1.0))]
    if shape == "triangle":
        return [_polygon(3, 1.16) + np.array((0.0, 0.16))]
    if shape == "star":
        points = np.empty((10, 2))
        points[0::2], points[1::2] = _polygon(5, 1.12), _polygon(5, 0.46, turn=math.pi / 5)
        return [points + np.array((0.0, 0.05))]
    if shape == "cross":
        arm, end = 0.32, 1.0
        corner = np.array([(arm, -end), (arm, -arm), (end, -arm)])
        quarter = np.array([(0.0, 1.0), (-1.0, 0.0)])
        return [np.concatenate([corner @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])]
    if shape == "heart":
        along = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        across = 16 * np.sin(along) ** 3
        down = -(13 * np.cos(along) - 5 * np.cos(2 * along) - 2 * np.cos(3 * along) - np.cos(4 * along))
        return [np.stack([across / 16.5, down / 16.5 - 0.08], 1)]
    raise ValueError(f"no shape named {shape!r}")


def _polygon(corners: int, radius: float, turn: float = 0.0) -> np.ndarray:
    """A regular polygon with its first corner on top, unless turned: [corners, 2]."""
    angles = np.arange(corners) * (2 * math.pi / corners) + turn
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * radius


def _background(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A muted surface of middle brightness, on which every object colour stands out: float32 [size, size, 3]."""
    base = _muted_colour(rng)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = base
    if kind == "plain":
        return canvas
    if kind == "noise":
        coarse = (rng.random((16, 16, 1), dtype=np.float32) - 0.5) * 36
        return canvas + cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)[:, :, None]
    angle = rng.random() * 2 * math.pi
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    along = math.cos(angle) * steps[None, :] + math.sin(angle) * steps[:, None]
    if kind == "gradient":
        share = np.clip(along / 1.2 + 0.5, 0, 1)[:, :, None]
        return canvas + share * (_muted_colour(rng) - base)
    contrast = 16 + 10 * rng.random()
    if kind == "striped":
        waves = np.sin(along * (2 * math.pi * (6 + 4 * rng.random())))
        return canvas + np.clip(waves * 3, -1, 1)[:, :, None] * contrast
    if kind == "speckled":
        dots = (rng.random((size // 2, size // 2), dtype=np.float32) < 0.08).astype(np.float32)
        return canvas - cv2.resize(dots, (size, size), interpolation=cv2.INTER_LINEAR)[:, :, None] * (2 * contrast)
    raise ValueError(f"no background named {kind!r}")


def _muted_colour(rng: np.random.Generator) -> np.ndarray:
    brightness = 122 + 62 * rng.random()
    tint = (rng.random(3) - 0.5) * 40
    return (brightness + tint - tint.mean()).astype(np.float32)
