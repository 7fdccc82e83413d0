"""Linear maps by either library, and how the layers are initialised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import ModelConfig, TextConfig, VisionConfig
from tercet.model import layers
from tercet.model.layers import Linear, init_std, is_intel, linear
from tercet.model.tercet import Tercet
from tercet.model.text import TextEncoder
from tercet.model.vision import VisionTransformer


@pytest.fixture(params=["Intel's processor", "another"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(layers, "MIN_ONEDNN_WORK", 1)
    monkeypatch.setattr(layers, "is_intel", lambda: request.param != "another")
    return request.param


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4), (0, 4)])
def test_values_and_gradients_of_products_are_those_of_pytorch(processor: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(*shape, 24, requires_grad=True)
    # Rows of a matrix, as self-attention takes the keys and values out of its own.
    weight, bias = torch.randn(50, 24, requires_grad=True), torch.randn(40, requires_grad=True)
    ours, expected = (product(hidden, weight[10:], bias) for product in (linear, F.linear))
    by_onednn = processor == "another" and hidden.numel() > 0
    assert type(ours.grad_fn).__name__.startswith("_OneDnn") == by_onednn
    torch.testing.assert_close(ours, expected)
    gradient = torch.randn_like(expected)
    for own, other in zip(
        torch.autograd.grad(ours, [hidden, weight, bias], gradient),
        torch.autograd.grad(expected, [hidden, weight, bias], gradient),
        strict=True,
    ):
        torch.testing.assert_close(own, other)
    torch.testing.assert_close(linear(hidden, weight), F.linear(hidden, weight))


def test_frozen_parameters_take_no_gradient(processor: str) -> None:
    layer = Linear(8, 8)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_other_precisions_use_pytorch(processor: str) -> None:
    layer, hidden = Linear(8, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(hidden).dtype == torch.bfloat16
    assert layer.double()(hidden.double()).dtype == torch.float64


def test_a_compiled_product_is_one_graph_that_asks_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MIN_ONEDNN_WORK", 1)
    is_intel.cache_clear()
    hidden, weight, bias = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden, weight, bias), F.linear(hidden, weight, bias))
    assert is_intel.cache_info().currsize == 0


def stds(module: nn.Module) -> list[float]:
    return [part.weight.std().item() for part in module.modules() if isinstance(part, nn.Linear)]


def test_matrices_start_as_published_at_the_published_width() -> None:
    torch.manual_seed(0)
    vision = VisionTransformer(VisionConfig(depth=1, image_size=32))
    text = TextEncoder(TextConfig(vocabulary_size=100, fusion_layer=1, depth=2))
    for module in (vision.blocks, text.layers):
        assert stds(module) == pytest.approx([0.02] * 4, rel=0.01)
    assert text.word_embed.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_narrow_models_start_with_products_of_the_same_size() -> None:
    torch.manual_seed(0)
    model = Tercet(ModelConfig.model_validate({"size": "tiny"}))
    for module in (model.vision.blocks, model.text.layers):
        assert stds(module) == pytest.approx([0.02 * 6**0.5] * len(stds(module)), rel=0.02)

    def product(width: int) -> Tensor:
        return torch.randn(4000, width) @ (torch.randn(width, 128) * init_std(width))

    assert product(128).std().item() == pytest.approx(product(768).std().item(), rel=0.05)
