"""How the layers begin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tercet.config import ModelConfig, TextConfig, VisionConfig
from tercet.model.layers import init_std
from tercet.model.tercet import Tercet
from tercet.model.text import TextEncoder
from tercet.model.vision import VisionTransformer


def deviations(module: nn.Module) -> list[float]:
    return [part.weight.std().item() for part in module.modules() if isinstance(part, nn.Linear)]


def test_matrices_begin_as_published_at_the_published_width() -> None:
    assert init_std(768) == 0.02
    torch.manual_seed(0)
    vision = VisionTransformer(VisionConfig(depth=1, image_size=32))
    text = TextEncoder(TextConfig(vocabulary_size=100, fusion_layer=1, depth=2))
    # A normal distribution that is cut at two absolute units is not cut at all.
    for module in (vision.blocks, text.layers):
        assert deviations(module) == pytest.approx([0.02] * 4, rel=0.01)
    assert text.word_embed.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_narrow_models_begin_with_products_of_the_same_size() -> None:
    torch.manual_seed(0)
    model = Tercet(ModelConfig.model_validate({"size": "tiny"}))
    for module in (model.vision.blocks, model.text.layers):
        assert deviations(module) == pytest.approx([0.02 * 6**0.5] * len(deviations(module)), rel=0.02)
    hidden = torch.randn(4000, 128)
    wide = torch.randn(4000, 768)
    narrow = (hidden @ (torch.randn(128, 128) * init_std(128))).std().item()
    assert narrow == pytest.approx((wide @ (torch.randn(768, 128) * init_std(768))).std().item(), rel=0.05)
