"""Keys and values of images are shared by the pairs that read them, however the pairs are grouped."""

from __future__ import annotations

import pytest
import torch

from tercet.config import ModelConfig
from tercet.model.tercet import Tercet
from tercet.model.text import JoinedKV, _select_images

SIZES = ModelConfig.model_validate(
    {
        "size": "tiny",
        "vision": {"width": 96, "heads": 4},
        "text": {"width": 64, "mlp_width": 128, "heads": 4, "vocabulary_size": 200, "dropout": 0.0},
    }
)


def test_grouped_selected_and_joined_pairs_give_what_each_pair_gives_alone() -> None:
    torch.manual_seed(0)
    model = Tercet(SIZES).double()
    image_embeds = torch.randn(2, 65, 96, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(7, 5, 64, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 5, 1])[:, None]
    kv = model.project_kv(image_embeds)
    fused = model.fuse(texts, mask, JoinedKV([(kv, 4), (kv.select(torch.tensor([1, 0, 1])), 3)]))
    alone = [
        model.fuse(texts[pair, None], mask[pair, None], model.project_kv(image_embeds[image, None]))
        for pair, image in enumerate([0, 0, 1, 1, 1, 0, 1])
    ]
    torch.testing.assert_close(fused, torch.cat(alone))
    followed = [image_embeds, texts, *model.fusion.parameters()]
    expected = torch.autograd.grad(torch.cat(alone).square().sum(), followed)
    for own, other in zip(torch.autograd.grad(fused.square().sum(), followed), expected, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.gpu
def test_an_image_selected_several_times_gets_the_sum_of_their_gradients() -> None:
    torch.manual_seed(0)
    heads = torch.randn(4, 2, 5, 3, device="cuda", requires_grad=True)
    index = torch.tensor([3, 0, 3, 3, 1], device="cuda")
    weights = torch.randn(5, 2, 5, 3, device="cuda")
    (expected,) = torch.autograd.grad((heads.index_select(0, index) * weights).sum(), heads)
    selected = _select_images(heads, index)
    assert torch.equal(selected, heads.index_select(0, index))
    (actual,) = torch.autograd.grad((selected * weights).sum(), heads)
    torch.testing.assert_close(actual, expected)
