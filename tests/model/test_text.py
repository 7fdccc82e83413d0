"""Text pooling, and keys and values of images that pairs share, however the pairs are grouped."""

from __future__ import annotations

import pytest
import torch

from tercet.config import ModelConfig, TextConfig
from tercet.model.tercet import Tercet
from tercet.model.text import JoinedKV, TextEncoder, _select_images

SIZES = {
    "size": "tiny",
    "vision": {"width": 96, "heads": 4},
    "text": {"width": 64, "mlp_width": 128, "heads": 4, "vocabulary_size": 200, "dropout": 0.0},
}


def test_grouped_selected_and_joined_pairs_give_what_each_pair_gives_alone() -> None:
    torch.manual_seed(0)
    model = Tercet(ModelConfig.model_validate(SIZES)).double()
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


@pytest.mark.parametrize("window", [None, 1])
def test_with_a_window_fusion_attends_only_to_patches(window: int | None) -> None:
    torch.manual_seed(0)
    model = Tercet(ModelConfig.model_validate({"size": "tiny", "vision": {"window": window}})).eval()
    text, mask = torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool)
    image_embeds = torch.randn(2, 1 + 64, 128)
    other = image_embeds.clone()
    other[:, 0] = 3.0
    with torch.no_grad():
        one, two = (model.match_logits(text, mask, model.project_kv(embeds)) for embeds in (image_embeds, other))
    assert torch.equal(one, two) == (window is not None)


def test_the_mean_over_the_tokens_replaces_the_class_token_and_no_padding_counts() -> None:
    sizes = {"width": 32, "mlp_width": 64, "depth": 2, "fusion_layer": 1, "heads": 2, "vocabulary_size": 60}
    plain, pooled = (
        TextEncoder(TextConfig.model_validate({**sizes, "pool": pool})).eval() for pool in ("class", "mean")
    )
    pooled.load_state_dict(plain.state_dict())
    ids, mask = torch.randint(5, 60, (2, 7)), torch.arange(7) < torch.tensor([[7], [4]])
    before, after = plain(ids, mask), pooled(ids, mask)
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=0)
    for row, length in enumerate((7, 4)):
        torch.testing.assert_close(after[row, 0], before[row, :length].mean(0))
    torch.testing.assert_close(pooled(ids[1:, :4], mask[1:, :4])[0, 0], after[1, 0])
