"""The lean memory gives what keys and values give, with fewer FLOPs where few tokens read an image."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tercet.config import ModelConfig
from tercet.model.attention import AttentionTap
from tercet.model.memory import ImageMemory, LeanMemory, _TakeImages, take_images
from tercet.model.projection import pays_to_project
from tercet.model.tercet import Tercet

SIZES = ModelConfig.model_validate(
    {
        "size": "tiny",
        "vision": {"width": 96, "heads": 4},
        "text": {"width": 64, "mlp_width": 128, "heads": 4, "vocabulary_size": 200, "dropout": 0.0},
    }
)


@pytest.fixture(scope="module")
def model() -> Tercet:
    torch.manual_seed(0)
    model = Tercet(SIZES).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def inputs(images: int, group: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    width, image_width = SIZES.text.width, SIZES.vision.width
    image_embeds = torch.randn(images, 65, image_width, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(images * group, tokens, width, dtype=torch.float64, requires_grad=True)
    return image_embeds, texts, torch.ones(images * group, tokens, dtype=torch.bool)


@pytest.mark.parametrize("readers", [(0, 0), (10_000, 0)], ids=["no layer projects", "the last does not"])
@pytest.mark.parametrize("group", [1, 3])
def test_values_and_gradients_are_those_of_keys_and_values(model: Tercet, readers: tuple[int, int], group: int) -> None:
    image_embeds, texts, mask = inputs(2, group, 5)
    index = torch.tensor([1, 0])
    results = []
    for memory in (model.remember(image_embeds), model.remember(image_embeds, readers)):
        fused = model.fuse(texts, mask, memory) + model.fuse(texts, mask, memory.select(index))
        followed = [image_embeds, texts, *model.fusion.parameters()]
        results.append((fused, *torch.autograd.grad(fused.square().sum(), followed)))
    assert isinstance(model.remember(image_embeds, readers), LeanMemory)
    for plain, lean in zip(*results, strict=True):
        torch.testing.assert_close(lean, plain)


def test_the_tap_sees_the_same_weights(model: Tercet) -> None:
    image_embeds, texts, mask = inputs(2, 3, 5)
    layer = model.fusion.layers[-1].cross_attention
    seen = []
    for memory in (model.remember(image_embeds), model.remember(image_embeds, (0, 0)).detach()):
        layer.tap = AttentionTap()
        model.fuse(texts, mask, memory)
        seen.append(layer.tap.weights)
    layer.tap = None
    torch.testing.assert_close(seen[1], seen[0])


def test_dropped_weights_keep_the_mean_of_the_bias(model: Tercet) -> None:
    image_embeds, texts, _ = inputs(2, 1, 5)
    layer = model.fusion.layers[-1].cross_attention
    memory = model.remember(image_embeds, (0, 0))
    query = layer.query(texts).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    torch.manual_seed(0)
    expected = memory.attend(1, query, 0.0, None)
    mean = torch.stack([memory.attend(1, query, 0.3, None).detach() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected.detach(), rtol=0, atol=0.03)


@pytest.mark.parametrize("readers", [1, 10, 20, 25, 30, 200])
def test_the_cheaper_way_is_chosen(model: Tercet, readers: int) -> None:
    image_embeds, texts, _ = (tensor.detach() for tensor in inputs(1, 1, readers))
    layer = model.fusion.layers[-1].cross_attention
    query = layer.query(texts).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    flops = []
    for project in (True, False):
        with FlopCounterMode(display=False) as counter:
            memory = model.remember(image_embeds, (10_000, 10_000 if project else 0))
            memory.attend(1, query, 0.1, None)
        flops.append(counter.get_total_flops())
    assert pays_to_project(readers, 65, SIZES.text.width, SIZES.vision.width, SIZES.text.heads) == (
        flops[0] <= flops[1]
    )
    assert type(model.remember(image_embeds, (10_000, 10_000))) is ImageMemory


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
def test_taken_images_on_a_gpu() -> None:
    torch.testing.assert_close(*gradients_of_taking("cuda"))
