"""Local-global mutual information: pooling of every grid, and batches with nothing to compare."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tercet.errors import TercetError
from tercet.objectives.local import local_global, pool_patches

EYE = torch.eye(3, dtype=torch.bool)


@pytest.mark.parametrize("pixels", range(224, 481, 16))
@pytest.mark.parametrize("side", [None, 4])
def test_pooling_covers_every_patch_of_every_grid(pixels: int, side: int | None) -> None:
    grid = pixels // 16
    patches = torch.randn(2, grid * grid, 3, requires_grad=True)
    pooled = pool_patches(patches, side)
    wanted = side or int(grid**0.5)
    assert pooled.shape == (2, wanted * wanted, 3)
    pooled.sum().backward()
    assert patches.grad is not None and (patches.grad > 0).all()


@pytest.mark.parametrize(("grid", "side"), [(4, None), (9, None), (16, None), (16, 4), (24, 4), (8, 4), (4, 4)])
def test_ours_and_the_published_windows_agree_where_those_divide_the_grid(grid: int, side: int | None) -> None:
    patches = torch.randn(2, grid * grid, 5)
    torch.testing.assert_close(pool_patches(patches, side), pool_patches(patches, side, published=True))


@pytest.mark.parametrize(
    ("side", "grid"), [(None, grid) for grid in (6, 7, 8, 12, 14, 15, 20, 24)] + [(4, grid) for grid in (5, 7, 15)]
)
def test_published_pooling_refuses_the_grids_that_crash_the_published_code(side: int | None, grid: int) -> None:
    with pytest.raises(TercetError, match=f"{grid}x{grid}"):
        pool_patches(torch.randn(1, grid * grid, 2), side, published=True)


@pytest.mark.parametrize("grid", [9, 12, 14, 18])
def test_published_pooling_for_retrieval(grid: int) -> None:
    assert pool_patches(torch.randn(1, grid * grid, 2), 4, published=True).shape == (1, 16, 2)


def test_it_is_infonce_over_each_local() -> None:
    feats = F.normalize(torch.randn(3, 4), dim=-1)
    locals_ = F.normalize(torch.randn(3, 2, 4), dim=-1)
    temperature = torch.tensor(0.2)
    terms = []
    for i in range(3):
        negatives = torch.cat([locals_[k] for k in range(3) if k != i]) @ feats[i] / temperature
        for j in range(2):
            logits = torch.cat([(locals_[i, j] @ feats[i] / temperature)[None], negatives])
            terms.append(-logits.log_softmax(0)[0])
    torch.testing.assert_close(local_global(feats, locals_, temperature, EYE), torch.stack(terms).mean())


def test_captions_of_cls_alone_one_token_and_none_at_all() -> None:
    feats = F.normalize(torch.randn(3, 4), dim=-1).requires_grad_()
    words = F.normalize(torch.randn(3, 2, 4), dim=-1)
    temperature = torch.tensor(0.07)
    mask = torch.tensor([[False, False], [True, False], [True, True]])
    loss = local_global(feats, words, temperature, EYE, mask)
    assert loss.isfinite()
    loss.backward()
    assert feats.grad is not None and feats.grad.isfinite().all()
    # The caption without words counts neither as a sample nor through its padding.
    moved = words.clone()
    moved[0] = 99.0
    torch.testing.assert_close(local_global(feats, moved, temperature, EYE, mask), loss)
    assert local_global(feats, words, temperature, EYE, torch.zeros(3, 2, dtype=torch.bool)).item() == 0
    assert local_global(feats, words[:, :0], temperature, EYE, mask[:, :0]).item() == 0


def test_a_batch_of_one_or_of_one_image_has_no_negatives() -> None:
    feats = F.normalize(torch.randn(3, 4), dim=-1).requires_grad_()
    regions = F.normalize(torch.randn(3, 2, 4), dim=-1)
    loss = local_global(feats, regions, torch.tensor(0.07), torch.ones(3, 3, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert feats.grad is not None and (feats.grad == 0).all()
    assert local_global(feats[:1], regions[:1], torch.tensor(0.07), EYE[:1, :1]).item() == 0
