"""Patches that are left out at random, and patches that see their neighbours alone."""

from __future__ import annotations

import torch

from tercet.config import VisionConfig
from tercet.model.vision import VisionTransformer, draw_patches, neighbours


def test_patches_are_drawn_without_repeats_in_order_and_all_alike() -> None:
    torch.manual_seed(0)
    drawn = draw_patches(torch.zeros(2000, 10, 3), 4)
    assert (drawn.diff(dim=1) > 0).all()
    shares = drawn.flatten().bincount(minlength=10) / 2000
    torch.testing.assert_close(shares, torch.full((10,), 0.4), rtol=0, atol=0.05)


def test_a_patch_that_is_left_keeps_its_position() -> None:
    torch.manual_seed(0)
    vision = VisionTransformer(VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2))
    vision.blocks = torch.nn.ModuleList()
    image = torch.randn(1, 3, 32, 32)
    whole, left = vision(image)[0], vision(image, drop=0.5)[0]
    assert len(left) == 1 + 8
    torch.testing.assert_close(left[0], whole[0])
    places = [int((whole - token).abs().sum(dim=1).argmin()) for token in left[1:]]
    assert places == sorted(set(places))
    torch.testing.assert_close(left[1:], whole[places])


def test_with_a_window_a_patch_sees_its_neighbours_and_the_class_token_all() -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2, "window": 1}
    vision = VisionTransformer(VisionConfig.model_validate(sizes)).eval()
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 24:, 24:] += 1.0  # the last patch
    with torch.no_grad():
        moved = (vision(images) - vision(changed)).abs().amax(dim=(0, 2)) > 1e-6
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, 2:] = True
    assert moved[0] and torch.equal(moved[1:].view(4, 4), expected)


def test_the_neighbours_of_patches_that_are_left() -> None:
    left = torch.tensor([[0, 1, 5], [2, 3, 4]])
    every = neighbours(2, 3, 1, None, torch.device("cpu"))[0, 0]
    masks = neighbours(2, 3, 1, left, torch.device("cpu"))
    assert masks.shape == (2, 1, 4, 4)
    for own, mask in zip(left, masks[:, 0], strict=True):
        tokens = torch.cat([torch.zeros(1, dtype=torch.long), own + 1])
        assert torch.equal(mask, every[tokens][:, tokens])
