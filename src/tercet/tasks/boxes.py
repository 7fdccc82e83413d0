"""Boxes and points against a heatmap: ranking a detector's boxes, the pointing game, and what counts as a hit.

A box is (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
HIT = 0.5  # intersection over union from which a box counts as found


def box_scores(heatmap: Tensor, boxes: Sequence[Box]) -> Tensor:
    """How much of a map lies in each box: the sum over its pixels over the root of its area, `[boxes]`.

    Args:
        heatmap: `[height, width]`, at the size that the boxes are given in.
        boxes: the candidates.
    """
    scores = []
    for left, top, right, bottom in boxes:
        inside = heatmap[max(0, int(top)) : max(0, int(bottom)), max(0, int(left)) : max(0, int(right))]
        scores.append(inside.sum() / ((right - left) * (bottom - top)) ** 0.5)
    return torch.stack(scores)


def choose_box(heatmap: Tensor, boxes: Sequence[Box]) -> tuple[int, float]:
    """Index and score of the box with the highest score; of equal ones the first.

    Where no score is positive, the published code keeps the box of the expression before; here it is the best all the
    same.
    """
    scores = box_scores(heatmap, boxes)
    best = int(scores.argmax())
    return best, float(scores[best])


def overlap(first: Box, second: Box, published: bool = False) -> float:
    """Intersection over union of two boxes.

    Args:
        first: a box.
        second: another.
        published: count an intersection of at most one pixel across, or down, as none.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    least = 1.0 if published else 0.0
    if width <= least or height <= least:
        return 0.0
    shared = width * height
    return shared / (area(first) + area(second) - shared)


def area(box: Box) -> float:
    """Square pixels of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def peak(heatmap: Tensor) -> tuple[float, float]:
    """The middle (x, y) of the strongest pixel of a map `[height, width]`."""
    row, column = divmod(int(heatmap.argmax()), heatmap.shape[1])
    return column + 0.5, row + 0.5


def inside(point: tuple[float, float], boxes: Sequence[Box]) -> bool:
    """Whether a point lies in any of the boxes, their edges included."""
    x, y = point
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)
