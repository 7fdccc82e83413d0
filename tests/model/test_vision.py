"""Patches that are left out at random."""

from __future__ import annotations

import torch

from tercet.config_model import VisionConfig
from tercet.model.vision import VisionTransformer, draw_patches


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
