"""The vision transformer, for images of any size that its patches divide."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import VisionConfig
from tercet.errors import TercetError
from tercet.model.layers import EMBEDDING_STD, Encoder, Linear, VisionBlock, init_std, take_rows

# Statistics of CLIP's training images, which the published models are normalised with.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

GROUPS = 8  # of a group norm, which unlike a batch norm treats an image alike in student, teacher and evaluation
POSITION_STD = 0.2  # half of that of the convolution stem's own vectors at the start
LONGEST_WAVE = 100.0  # in patches, over 2 pi


class VisionTransformer(Encoder):
    """Patches and a class token through pre-norm blocks, with a final norm over all tokens (ViT, arXiv 2010.11929).

    A convolution stem, pooling by the maximum and patches that see their neighbours alone (`model.vision.stem`, `pool`
    and `window`) are ours, for few images: see benchmarks/notes/results.md.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        width = config.width
        self.pool = config.pool
        self.window = config.window
        self.patch_embed = (
            ConvolutionStem(config.stem_channels, width)
            if config.stem == "convolution"
            else Linear(3 * config.patch_size**2, width)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        mlp_width = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(VisionBlock(width, config.heads, mlp_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1), persistent=False)
        self._initialise()
        if config.stem == "convolution":
            self.position_embed.data.copy_(sine_positions(config.grid, width))

    def _initialise(self) -> None:
        for parameter in (self.class_token, self.position_embed):
            nn.init.trunc_normal_(parameter, std=EMBEDDING_STD)
        std = init_std(self.position_embed.shape[2])
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, drop: float = 0.0) -> Tensor:
        """Encode images.

        Args:
            images: `[batch, 3, height, width]`, uint8 from 0 to 255 or float already normalised.
            drop: share of the patches that each image loses at random, while training (FLIP, arXiv 2212.00794).

        Returns:
            `image_embeds` `[batch, 1 + patches, width]`; row 0 is the class token, patches run row by row, those that
            are left in their order.

        Raises:
            TercetError: height or width is not a multiple of the patch size.
        """
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        if (rows * self.patch_size, columns * self.patch_size) != tuple(images.shape[-2:]):
            height, width = images.shape[-2:]
            raise TercetError(
                f"an image of {width}x{height} pixels does not divide into patches of {self.patch_size}; "
                f"resize it to multiples of {self.patch_size}"
            )
        pixels = self.normalise(images)
        convolves = isinstance(self.patch_embed, ConvolutionStem)
        patches = self.patch_embed(pixels) if convolves else to_patches(pixels, self.patch_size)
        positions = resize_position_embed(self.position_embed, rows, columns)
        left = None
        if drop > 0 and self.training:
            left = draw_patches(patches, kept_patches(rows * columns, drop))
            own = take_rows(positions[:, 1:].expand(patches.shape[0], -1, -1), left)
            patches = take_rows(patches, left)
            positions = torch.cat([positions[:, :1].expand(patches.shape[0], -1, -1), own], dim=1)
        embedded = patches if convolves else self.patch_embed(patches)
        hidden = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), embedded], dim=1) + positions
        mask = None if self.window is None else neighbours(rows, columns, self.window, left, hidden.device)
        for block in self.blocks:
            hidden = self.run(block, hidden, mask)
        if self.pool == "maximum":
            hidden = torch.cat([hidden[:, :1] + hidden[:, 1:].amax(dim=1, keepdim=True), hidden[:, 1:]], dim=1)
        return self.norm(hidden)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images to normalised floats; floats pass as they are."""
        if images.dtype != torch.uint8:
            return images
        return (images.to(self.image_mean.dtype) / 255.0 - self.image_mean) / self.image_std


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """`[batch, 3, height, width]` to flat patches `[batch, patches, 3 * patch_size**2]`, channel first, row by row."""
    batch, channels, height, width = images.shape
    patches = images.view(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def kept_patches(patches: int, drop: float) -> int:
    """How many of an image's patches remain when a share `drop` of them is dropped; at least one."""
    return max(1, round(patches * (1 - drop)))


def draw_patches(patches: Tensor, count: int) -> Tensor:
    """`count` patches of each image, all equally likely, in ascending order: indices `[batch, count]`.

    Args:
        patches: `[batch, patches, channels]`.
        count: how many are drawn.
    """
    chances = torch.rand(patches.shape[:2], device=patches.device)
    return chances.topk(count, dim=1).indices.sort(dim=1).values


def neighbours(rows: int, columns: int, window: int, left: Tensor | None, device: torch.device) -> Tensor:
    """Which tokens see which: patches those around them, the class token all patches and itself.

    Patches that saw all others would carry what the whole image shows, and a text that asks where something is would
    read it off any of them.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        window: rows and columns around a patch.
        left: of patches that were dropped, those that are left, `[batch, kept]`; None: all are there.
        device: where the mask is to be.

    Returns:
        Bool `[1 or batch, 1, tokens, tokens]`, True where a token of the third dimension sees one of the fourth.
    """
    place = torch.arange(rows * columns, device=device)
    place = place[None] if left is None else left
    row, column = place // columns, place % columns
    apart = torch.maximum((row[:, :, None] - row[:, None]).abs(), (column[:, :, None] - column[:, None]).abs())
    seen = F.pad(apart <= window, (1, 0), value=False)
    return F.pad(seen, (0, 0, 1, 0), value=True)[:, None]


def resize_position_embed(position_embed: Tensor, rows: int, columns: int) -> Tensor:
    """Bicubic resize of a square grid of position embeddings; the class token's row is kept.

    Args:
        position_embed: `[1, 1 + side**2, width]`.
        rows: patches from top to bottom.
        columns: patches from left to right.

    Returns:
        `[1, 1 + rows * columns, width]`; the input itself when the grid already fits.
    """
    side = math.isqrt(position_embed.shape[1] - 1)
    if (rows, columns) == (side, side):
        return position_embed
    class_row, grid = position_embed[:, :1], position_embed[:, 1:]
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([class_row, grid.flatten(2).transpose(1, 2).to(class_row.dtype)], dim=1)


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
    table = torch.cat([rows, columns], dim=2).flatten(0, 1) * (POSITION_STD * 2**0.5)
    return torch.cat([torch.zeros(1, width), table])[None]
