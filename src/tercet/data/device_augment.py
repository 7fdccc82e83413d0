"""The changes of `augment` on a whole batch of views at once, in PyTorch, for a device with more to spare than a host.

The host draws the changes (`changes`) and says in a `Schedule` which rows undergo which operation in which order, so
that the device works through a list of batched operations and the host never waits for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tercet.data.augment import Compat
from tercet.data.batches import HostBatch
from tercet.data.changes import Change

FILL = 128.0
LARGEST_SIGMA = 2.0  # of `changes.draw_full`; up to it a box reaches two pixels


@dataclass
class Schedule(HostBatch):
    """Which rows of a batch undergo which operation, in order.

    Attributes:
        names: operations [operations].
        counts: how many rows undergo each [operations].
        rows: int64 [sum of counts]; the rows of each operation, those of the first one first.
        amounts: float32 [sum of counts]; how much of the operation each row undergoes.
        compat: "published" brings back two defects of the published operations.
    """

    names: list[str]
    counts: list[int]
    rows: Tensor
    amounts: Tensor
    compat: Compat = "tercet"

    def apply(self, images: Tensor) -> Tensor:
        """Views uint8 `[batch, 3, height, width]` after their changes, on the device where both lie."""
        result = images.clone()
        start = 0
        for name, count in zip(self.names, self.counts, strict=True):
            rows, amounts = self.rows[start : start + count], self.amounts[start : start + count]
            result.index_copy_(0, rows, OPERATIONS[name](result.index_select(0, rows), amounts, self.compat))
            start += count
        return result


def schedule(changes: Sequence[Sequence[Change]], compat: Compat = "tercet") -> Schedule:
    """Operations over many rows that together make the changes of every row, each row's in its own order.

    Again and again the operation that most rows wait for is put next.
    """
    names: list[str] = []
    counts: list[int] = []
    rows: list[int] = []
    amounts: list[float] = []
    places = [0] * len(changes)
    waiting = [row for row, own in enumerate(changes) if own]
    while waiting:
        name = Counter(changes[row][places[row]][0] for row in waiting).most_common(1)[0][0]
        chosen = [row for row in waiting if changes[row][places[row]][0] == name]
        names.append(name)
        counts.append(len(chosen))
        rows += chosen
        amounts += [changes[row][places[row]][1] for row in chosen]
        for row in chosen:
            places[row] += 1
        waiting = [row for row in waiting if places[row] < len(changes[row])]
    return Schedule(
        names, counts, torch.tensor(rows, dtype=torch.int64), torch.tensor(amounts, dtype=torch.float32), compat
    )


def adjust_brightness(images: Tensor, factors: Tensor, _: Compat) -> Tensor:
    """Scale every channel."""
    return _truncate(images * _each(factors))


def adjust_contrast(images: Tensor, factors: Tensor, _: Compat) -> Tensor:
    """Scale the distance from each image's mean grey."""
    means = _luma(images).mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
    return _truncate(means + _each(factors) * (images - means))


def adjust_saturation(images: Tensor, factors: Tensor, _: Compat) -> Tensor:
    """Scale every pixel's distance from its own grey."""
    grey = _luma(images)
    return _truncate(grey + _each(factors) * (images - grey))


def adjust_hue(images: Tensor, turns: Tensor, _: Compat) -> Tensor:
    """Turn the hue by a share of the colour circle."""
    pixels = images / 255.0
    red, green, blue = pixels.unbind(dim=1)
    value, least = pixels.amax(dim=1), pixels.amin(dim=1)
    spread = value - least
    divisor = spread.clamp(min=1e-12)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixth = (sixth + 6 * turns[:, None, None]) % 6
    # A channel lies `spread` below the value at the far side of the circle, and rises to it over a sixth.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        distance = (offset + sixth) % 6
        channels.append(value - spread * torch.minimum(distance, 4 - distance).clamp(0, 1))
    return (torch.stack(channels, dim=1) * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_grey(images: Tensor, _: Tensor, __: Compat) -> Tensor:
    """The luma in all three channels."""
    return _luma(images).to(torch.uint8).expand_as(images)


def blur(images: Tensor, sigmas: Tensor, _: Compat) -> Tensor:
    """Gaussian blur by three extended boxes in each direction, edges repeated."""
    box = _box_kernels(sigmas)
    kernels = _convolve_each(_convolve_each(box, box), box)
    rows, channels, height, width = images.shape
    reach = kernels.shape[1] // 2
    stacked = images.to(torch.float32).reshape(1, rows * channels, height, width)
    weights = kernels.repeat_interleave(channels, dim=0)
    padded = functional.pad(stacked, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(padded, weights[:, None, None, :], groups=rows * channels)
    done = functional.conv2d(across, weights[:, None, :, None], groups=rows * channels)
    return done.round_().clamp_(0, 255).to(torch.uint8).reshape(images.shape)


def flip_horizontally(images: Tensor, _: Tensor, __: Compat) -> Tensor:
    """Left becomes right."""
    return images.flip(3)


def autocontrast(images: Tensor, _: Tensor, compat: Compat) -> Tensor:
    """Stretch each channel to 0 to 255; see `augment.autocontrast`."""
    low = images.amin(dim=(2, 3)).to(torch.float64)[..., None]
    high = images.amax(dim=(2, 3)).to(torch.float64)[..., None]
    greys = torch.arange(256, device=images.device, dtype=torch.float64)
    scale = 255.0 / (high - low).clamp(min=1)
    table = (greys * scale - low * scale).clamp_(0, 255)
    if compat == "published":
        table = torch.where(low > 0, 255.0, table)
    return _look_up(torch.where(high == low, greys, table).to(torch.uint8), images)


def equalize(images: Tensor, _: Tensor, __: Compat) -> Tensor:
    """Make each channel's histogram as flat as a table of grey levels can."""
    rows, channels = images.shape[:2]
    values = images.reshape(rows, channels, -1).to(torch.int64)
    histogram = torch.zeros(rows, channels, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    last = histogram.gather(2, values.amax(dim=2, keepdim=True))
    step = (histogram.sum(dim=2, keepdim=True) - last) // 255
    below = histogram.cumsum(dim=2) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    greys = torch.arange(256, device=images.device)
    return _look_up(torch.where(step == 0, greys, table).to(torch.uint8), images)


def sharpen(images: Tensor, factors: Tensor, compat: Compat) -> Tensor:
    """Scale the distance from a 3x3-smoothed image; the outermost pixels stay."""
    if min(images.shape[2:]) < 3:
        return images
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    pixels = images.to(torch.float32)
    smooth = functional.conv2d(pixels, kernel / 13, groups=3).round_()
    sharp = smooth + _each(factors) * (pixels[:, :, 1:-1, 1:-1] - smooth)
    result = images.clone()
    inside = (sharp.to(torch.int32) & 255).to(torch.uint8) if compat == "published" else _truncate(sharp)
    result[:, :, 1:-1, 1:-1] = inside
    return result


def shear_x(images: Tensor, slopes: Tensor, _: Compat) -> Tensor:
    """Move each row to the right by its number times the slope."""
    return _warp(images, 1, -slopes, 0, 0, 1, 0)


def shear_y(images: Tensor, slopes: Tensor, _: Compat) -> Tensor:
    """Move each column down by its number times the slope."""
    return _warp(images, 1, 0, 0, -slopes, 1, 0)


def translate_x(images: Tensor, pixels: Tensor, _: Compat) -> Tensor:
    """Move the images to the left."""
    return _warp(images, 1, 0, pixels, 0, 1, 0)


def translate_y(images: Tensor, pixels: Tensor, _: Compat) -> Tensor:
    """Move the images up."""
    return _warp(images, 1, 0, 0, 0, 1, pixels)


def rotate(images: Tensor, degrees: Tensor, _: Compat) -> Tensor:
    """Turn the images about their centre, counter-clockwise."""
    height, width = images.shape[2:]
    angles = degrees * (math.pi / 180)
    cosine, sine = angles.cos(), angles.sin()
    middle_x, middle_y = width / 2, height / 2
    return _warp(
        images,
        cosine,
        -sine,
        middle_x - cosine * middle_x + sine * middle_y,
        sine,
        cosine,
        middle_y - sine * middle_x - cosine * middle_y,
    )


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Compat], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
    "grey": to_grey,
    "blur": blur,
    "flip": flip_horizontally,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "sharpness": sharpen,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}


def _each(amounts: Tensor) -> Tensor:
    """One amount an image, laid over its pixels."""
    return amounts[:, None, None, None]


def _truncate(values: Tensor) -> Tensor:
    """Clip to 0 to 255 and drop the fraction, as Pillow does."""
    return values.clamp(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """ITU-R 601 luma, whole numbers in float32 `[batch, 1, height, width]`."""
    red, green, blue = images.to(torch.float32).split(1, dim=1)
    return (red * 0.299 + green * 0.587 + blue * 0.114).round_()


def _look_up(table: Tensor, images: Tensor) -> Tensor:
    """Grey levels through a table for each channel of each image, `[batch, 3, 256]`."""
    return table.gather(2, images.flatten(2).to(torch.int64)).view(images.shape)


def _box_kernels(sigmas: Tensor) -> Tensor:
    """The extended boxes of `augment.blur`, `[batch, 5]`."""
    variance = sigmas.clamp(max=LARGEST_SIGMA).square()[:, None] / 3
    radius = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    end = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1) ** 2))
    offsets = torch.arange(-2, 3, device=sigmas.device).abs()
    kernels = torch.where(offsets <= radius, 1.0, torch.where(offsets == radius + 1, end, 0.0))
    return kernels / kernels.sum(dim=1, keepdim=True)


def _convolve_each(first: Tensor, second: Tensor) -> Tensor:
    """Row by row, in full: `[batch, m]` with `[batch, n]` gives `[batch, m + n - 1]`."""
    rows = len(first)
    flipped = second.flip(1)[:, None]
    padded = functional.pad(first, (second.shape[1] - 1, second.shape[1] - 1))
    return functional.conv1d(padded[None], flipped, groups=rows)[0]


Coefficient = Tensor | float


def _warp(
    images: Tensor,
    a: Coefficient,
    b: Coefficient,
    shift_x: Coefficient,
    c: Coefficient,
    d: Coefficient,
    shift_y: Coefficient,
) -> Tensor:
    """Bilinear: the pixel at (x, y) comes from (a x + b y + shift_x, c x + d y + shift_y); mid-grey outside."""
    rows, _, height, width = images.shape
    device = images.device
    x = torch.arange(width, device=device, dtype=torch.float32)[None, None, :]
    y = torch.arange(height, device=device, dtype=torch.float32)[None, :, None]

    def along(value: Coefficient) -> Coefficient:
        return value[:, None, None] if isinstance(value, Tensor) else value

    from_x = along(a) * x + along(b) * y + along(shift_x)
    from_y = along(c) * x + along(d) * y + along(shift_y)
    grid = torch.stack(
        [
            ((2 * from_x + 1) / width - 1).expand(rows, height, width),
            ((2 * from_y + 1) / height - 1).expand(rows, height, width),
        ],
        dim=3,
    )
    moved = functional.grid_sample(images - FILL, grid, padding_mode="zeros", align_corners=False)
    return (moved + FILL).round_().clamp_(0, 255).to(torch.uint8)
