"""Convolutions in place of the patch projection, and a position table that begins with sines."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8  # of a group norm, which unlike a batch norm treats an image alike in student, teacher and evaluation
POSITION_DEVIATION = 0.2  # half of what the stem's own vectors begin with
LONGEST_WAVE = 100.0  # in patches, over 2 pi


class ConvolutionStem(nn.Module):
    """Residual stages that halve the image each, down to one vector a patch (the hybrid ViT of arXiv 2010.11929)."""

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        """
        Args:
            channels: of each stage; as many stages as the patch size has factors of two.
            width: channels of a token.
        """
        super().__init__()
        pairs = itertools.pairwise((3, *channels))
        self.halve = nn.ModuleList(nn.Conv2d(before, after, 3, 2, 1) for before, after in pairs)
        self.residual = nn.ModuleList(Residual(after) for after in channels)
        self.norm = nn.GroupNorm(GROUPS, channels[-1])
        self.project = nn.Conv2d(channels[-1], width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `[batch, 3, height, width]` to `[batch, patches, width]`, row by row."""
        hidden = images.contiguous(memory_format=torch.channels_last)
        for halve, residual in zip(self.halve, self.residual, strict=True):
            hidden = residual(halve(hidden))
        return self.project(F.gelu(self.norm(hidden))).flatten(2).transpose(1, 2)


class Residual(nn.Module):
    """A 3x3 convolution beside the identity, behind a norm and a GELU.

    One and not two: it learns shapes as soon, costs half, and leaves a token closer to its own patch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.convolution = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to the same."""
        return hidden + self.convolution(F.gelu(self.norm(hidden)))


def sine_positions(grid: int, width: int) -> Tensor:
    """A table of two-dimensional sines: half of the channels tell the row, half the column.

    Args:
        grid: patches along one side.
        width: channels, a multiple of 4.

    Returns:
        `[1, 1 + grid**2, width]`; row 0, that of the class token, is 0.
    """
    waves = LONGEST_WAVE ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * waves
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = along[:, None].expand(-1, grid, -1), along[None].expand(grid, -1, -1)
    table = torch.cat([rows, columns], dim=2).flatten(0, 1) * (POSITION_DEVIATION * 2**0.5)
    return torch.cat([torch.zeros(1, width), table])[None]
