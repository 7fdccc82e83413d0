"""How the layers begin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tercet.config_model import ModelConfig, TextConfig, VisionConfig
from tercet.model.layers import _TakeImages, take_images, weight_deviation
from tercet.model.tercet import Tercet
from tercet.model.text import TextEncoder
from tercet.model.vision import VisionTransformer


def deviations(module: nn.Module) -> list[float]:
    return [part.weight.std().item() for part in module.modules() if isinstance(part, nn.Linear)]


def test_matrices_begin_as_published_at_the_published_width() -> None:
    assert weight_deviation(768) == 0.02
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
    narrow = (hidden @ (torch.randn(128, 128) * weight_deviation(128))).std().item()
    assert narrow == pytest.approx((wide @ (torch.randn(768, 128) * weight_deviation(768))).std().item(), rel=0.05)


def gradients_of_taking(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    heads = torch.randn(4, 2, 5, 3, device=device, requires_grad=True)
    index = torch.tensor([3, 0, 3, 3, 1], device=device)
    weights = torch.randn(5, 2, 5, 3, device=device)
    (expected,) = torch.autograd.grad((heads.index_select(0, index) * weights).sum(), heads)
    taken = _TakeImages.apply(heads, index) if device == "cpu" else take_images(heads, index)
    assert torch.equal(taken, heads.index_select(0, index))
    (actual,) = torch.autograd.grad((taken * weights).sum(), heads)
    return actual, expected


def test_an_image_that_several_texts_take_gets_the_sum_of_their_gradients() -> None:
    torch.testing.assert_close(*gradients_of_taking("cpu"))


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    torch.testing.assert_close(*gradients_of_taking("cuda"))
