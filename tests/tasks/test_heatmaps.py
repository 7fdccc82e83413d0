"""Heatmaps by any grouping of images and texts, against their definition."""

from __future__ import annotations

import copy

import pytest
import torch

from tercet.config import ModelConfig
from tercet.errors import TercetError
from tercet.model.layers import AttentionTap, attention_weights
from tercet.model.tercet import Tercet
from tercet.model.text import TextLayer
from tercet.tasks.heatmaps import (
    answer_heatmaps,
    average_words,
    blur,
    contrast_heatmaps,
    enlarge,
    match_heatmaps,
    to_grid,
)

IMAGES, TEXTS, TOKENS = 2, 3, 5


@pytest.fixture(scope="module", params=[None, 1])
def model(request: pytest.FixtureRequest) -> Tercet:
    torch.manual_seed(0)
    vision = {"image_size": 32, "width": 32, "depth": 3, "heads": 2, "window": request.param}
    text = {"width": 32, "mlp_width": 64, "depth": 5, "fusion_layer": 2, "heads": 2, "vocabulary_size": 40}
    text |= {"cls_id": 2, "sep_id": 3, "mask_id": 4}
    sizes = {"size": "tiny", "vision": vision, "text": text, "embed_dim": 16}
    made = Tercet(ModelConfig.model_validate(sizes)).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    input_ids = torch.randint(6, 40, (IMAGES * TEXTS, TOKENS), generator=generator)
    lengths = torch.tensor([5, 3, 4, 2, 5, 5])
    return images, input_ids, torch.arange(TOKENS)[None] < lengths[:, None]


def test_texts_of_one_image_share_only_its_keys_and_values(model: Tercet, batch: tuple) -> None:
    images, input_ids, mask = batch
    with torch.no_grad():
        image_embeds, text_embeds = model.encode_image(images), model.encode_text(input_ids, mask)
        text_feats = model.project_text(text_embeds[:, 0])
    together, _ = match_heatmaps(model, image_embeds, text_embeds, mask)
    alone, _ = match_heatmaps(model, image_embeds.repeat_interleave(TEXTS, 0), text_embeds, mask)
    torch.testing.assert_close(together, alone)
    assert together.shape == (IMAGES * TEXTS, TOKENS, 16)
    assert not together[~mask].any()

    together = contrast_heatmaps(model, images, text_feats)
    alone = contrast_heatmaps(model, images.repeat_interleave(TEXTS, 0), text_feats)
    torch.testing.assert_close(together, alone)
    assert together.shape == (IMAGES * TEXTS, 16)


def test_padding_does_not_change_a_map(model: Tercet, batch: tuple) -> None:
    images, input_ids, mask = batch
    with torch.no_grad():
        image_embeds = model.encode_image(images[:1])
        padded = model.encode_text(input_ids[3:4], mask[3:4])
        short = model.encode_text(input_ids[3:4, :2], mask[3:4, :2])
    first = average_words(match_heatmaps(model, image_embeds, padded, mask[3:4])[0], mask[3:4])
    second = average_words(match_heatmaps(model, image_embeds, short, mask[3:4, :2])[0], mask[3:4, :2])
    torch.testing.assert_close(first, second)


def test_without_gradients_and_with_frozen_parameters(model: Tercet, batch: tuple) -> None:
    images, input_ids, mask = batch

    def maps() -> tuple[torch.Tensor, torch.Tensor]:
        image_embeds = model.encode_image(images[:1])
        text_embeds = model.encode_text(input_ids[:1], mask[:1])
        feats = model.project_text(text_embeds[:, 0])
        matching, _ = match_heatmaps(model, image_embeds, text_embeds, mask[:1])
        return matching, contrast_heatmaps(model, images[:1], feats)

    expected = maps()
    try:
        model.requires_grad_(False)
        with torch.inference_mode():
            found = maps()
    finally:
        model.requires_grad_(True)
    for first, second in zip(found, expected, strict=True):
        torch.testing.assert_close(first, second)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(getattr(module, "tap", None) is None for module in model.modules())


def test_heat_of_an_answer_comes_from_every_word_of_its_question(model: Tercet, batch: tuple) -> None:
    images, input_ids, mask = batch
    with torch.no_grad():
        image_embeds, text_embeds = model.encode_image(images), model.encode_text(input_ids, mask)
    with pytest.raises(TercetError, match="no head for answer; fine-tune it first"):
        answer_heatmaps(model, image_embeds, text_embeds, mask)
    answering = copy.deepcopy(model)
    answering.add_heads(["answer"])
    answering.eval()
    together, logits = answer_heatmaps(answering, image_embeds, text_embeds, mask)
    alone, _ = answer_heatmaps(answering, image_embeds.repeat_interleave(TEXTS, 0), text_embeds, mask)
    torch.testing.assert_close(together, alone)
    assert together.shape == (IMAGES * TEXTS, TOKENS, 16)
    assert not together[~mask].any()
    # The decoder reads every word, where a match is read from [CLS] alone.
    assert (together[mask].amax(dim=1) > 0).all()
    last, _ = match_heatmaps(answering, image_embeds, text_embeds, mask, layer=4)
    assert not last[:, 1:].any()
    expected = answering.match_logits(text_embeds, mask, answering.project_kv(image_embeds))
    torch.testing.assert_close(logits, expected.detach())
    other, _ = answer_heatmaps(answering, image_embeds, text_embeds, mask, layer=2)
    assert not torch.allclose(other, together)


def test_heat_of_an_answer_is_attention_times_its_positive_gradient(model: Tercet, batch: tuple) -> None:
    """Against the definition: each weight of the layer is changed and the answer's likelihood computed again."""
    images, input_ids, mask = batch
    answering = copy.deepcopy(model)
    answering.add_heads(["answer"])
    answering.double().eval()
    assert answering.answer_decoder is not None
    ids, own, layer = input_ids[3:4, :2], mask[3:4, :2], 4
    with torch.no_grad():
        image_embeds = answering.encode_image(answering.vision.normalise(images[:1]).double())
        text_embeds = answering.encode_text(ids, own)
    found, _ = answer_heatmaps(answering, image_embeds, text_embeds, own, layer)

    chosen = answering.fusion.layers[layer - 2]
    assert isinstance(chosen, TextLayer)
    attention = chosen.cross_attention
    kept: list[torch.Tensor] = []
    nudge: list[tuple[tuple[int, ...], float]] = []

    def nudged(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        weights = attention_weights(query, key, mask)
        if attention.tap is not None:
            kept.append(weights.detach().clone())
            for index, amount in nudge:
                weights = weights.clone()
                weights[index] += amount
        return weights

    @torch.no_grad()
    def likelihood() -> float:
        attention.tap = AttentionTap()
        fused = answering.fuse(text_embeds, own, answering.project_kv(image_embeds))
        attention.tap = None
        decoder = answering.answer_decoder
        assert decoder is not None
        start = torch.full((1, 1), answering.config.text.cls_id)
        logits = decoder.logits(decoder(start, decoder.project_kv(fused, own))[:, 0])
        return logits.log_softmax(dim=-1).max().item()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tercet.model.layers.attention_weights", nudged)
        likelihood()
        weights = kept[0]
        heads, tokens = weights.shape[1:3]
        patches = found.shape[2]
        for token, spot in ((0, 3), (1, 7), (1, 12)):
            expected = 0.0
            for head in range(heads):
                index = (0, head, token, weights.shape[3] - patches + spot)
                values = []
                for amount in (1e-5, -1e-5):
                    nudge[:] = [(index, amount)]
                    values.append(likelihood())
                slope = (values[0] - values[1]) / 2e-5
                expected += weights[index].item() * max(slope, 0.0) / heads
            assert tokens == 2
            assert found[0, token, spot].item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_missing_layers(model: Tercet, batch: tuple) -> None:
    images, input_ids, mask = batch
    with torch.no_grad():
        text_embeds = model.encode_text(input_ids, mask)
    with pytest.raises(TercetError, match="layer 1 has no cross-attention; the fusion layers are 2 to 4"):
        match_heatmaps(model, model.encode_image(images), text_embeds, mask, layer=1)
    with pytest.raises(TercetError, match="no ViT block 3; the blocks are 0 to 2"):
        contrast_heatmaps(model, images, model.project_text(text_embeds[:, 0]), layer=3)


def test_grids_of_oblong_images() -> None:
    maps = torch.arange(12.0)[None]
    assert to_grid(maps, 48, 64).shape == (1, 3, 4)
    assert to_grid(maps, 48, 64)[0, 1, 0] == 4
    assert enlarge(to_grid(maps, 48, 64), 30, 40).shape == (1, 30, 40)


def test_blur_spreads_a_patch_to_its_neighbours() -> None:
    maps = torch.zeros(2, 4, 5)
    maps[0, 0, 1], maps[1, 2, 2] = 4.0, 1.0
    assert torch.equal(blur(maps, 0.0), maps)
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    torch.testing.assert_close(blur(maps, 0.5)[1, 1:4, 1:4], line[:, None] * line)
    torch.testing.assert_close(blur(maps, 0.5)[0, 0, :3], torch.tensor([0.5, 1.0, 0.5]))
    assert blur(maps, 0.5)[1].sum() == pytest.approx(1.0)
