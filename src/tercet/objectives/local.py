"""Local-global mutual information (`lmi`): a global summary against its own regions or tokens.

Section 3.4 of arXiv 2202.10401.  The anchor is the student's global feature; the locals are the teacher's, and the
negatives are the locals of the other samples of the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.errors import TercetError
from tercet.objectives.loss import average

# Logit of a local that must not count, as published; e to this power is 0 in every floating type.
EXCLUDED = -1e4


def pool_patches(patch_feats: Tensor, side: int | None = None, published: bool = False) -> Tensor:
    """Average the patch features of a square grid into regions, which are not normalised again.

    Args:
        patch_feats: unit vectors `[batch, grid * grid, embed_dim]`, row by row.
        side: regions along one side; None takes the whole root of the grid, as published for pre-training (4 regions a
            side for 16 patches).  The published retrieval fine-tuning has 4 whatever the grid.
        published: use the published windows, which do not overlap, drop what remains at the edge, and exist for some
            grids only.  Otherwise the windows cover every patch of any grid.

    Returns:
        `[batch, side * side, embed_dim]`.

    Raises:
        TercetError: the grid is not square, or the published windows do not exist for it.
    """
    grid = math.isqrt(patch_feats.shape[1])
    if grid * grid != patch_feats.shape[1]:
        raise TercetError(f"lmi pools square images only, and {patch_feats.shape[1]} patches are no square")
    wanted = side or math.isqrt(grid)
    maps = patch_feats.transpose(1, 2).unflatten(2, (grid, grid))
    if not published:
        return F.adaptive_avg_pool2d(maps, min(wanted, grid)).flatten(2).transpose(1, 2)
    window = max(1, grid // side if side else wanted)
    if grid // window != wanted:
        raise TercetError(
            f"the published pooling does not exist for a grid of {grid}x{grid} patches; "
            "set compat: tercet, or another model.vision.image_size"
        )
    return F.avg_pool2d(maps, window).flatten(2).transpose(1, 2)


def local_global(
    global_feats: Tensor,
    local_feats: Tensor,
    temperature: Tensor,
    same: Tensor,
    mask: Tensor | None = None,
    start: int = 0,
    count: float | None = None,
) -> Tensor:
    """InfoNCE between each global feature and each of its own locals.

    Args:
        global_feats: the student's unit vectors `[batch, embed_dim]`.
        local_feats: the teacher's `[samples, locals, embed_dim]`, without gradient: of the batch, or with several ranks
            of all their batches.
        temperature: `[]`.
        same: bool `[batch, samples]`, true where another sample's locals are no negatives (its own at least).
        mask: bool `[samples, locals]`, true where a local is real; None when all are.
        start: which of the samples is the first of the batch.
        count: divides the sum over samples; None: as many as have locals.  See `average`.

    Returns:
        Mean over the locals of a sample, then over the samples that have any, `[]`.  0 when nothing is left to
        compare: a caption of `[CLS]` alone has no locals, and a batch of one has no negatives.
    """
    if local_feats.shape[1] == 0:
        return global_feats.sum() * 0
    logits = torch.einsum("ie,kle->ikl", global_feats, local_feats) / temperature
    own = slice(start, start + logits.shape[0])
    positives = logits[:, own].diagonal(dim1=0, dim2=1).T
    negatives = logits.masked_fill(same[:, :, None], EXCLUDED)
    if mask is not None:
        negatives = negatives.masked_fill(~mask[None], EXCLUDED)
    # -log(e^p / (e^p + sum e^n)) = softplus(log sum e^n - p); the negatives are shared by all locals of a sample.
    losses = F.softplus(negatives.flatten(1).logsumexp(dim=1)[:, None] - positives)
    if mask is None:
        return average(losses.mean(dim=1), count)
    locals_of = mask[own].sum(dim=1)
    per_sample = (losses * mask[own]).sum(dim=1) / locals_of.clamp(min=1)
    return per_sample.sum() / ((locals_of > 0).sum().clamp(min=1) if count is None else count)
