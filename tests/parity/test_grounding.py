"""Grounding equals the published: attention and its gradient, the maps of both modes, and the choice of boxes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import load_fixture, load_student
from torch import Tensor

from tercet.tasks.grounding import HIT, Box, choose_box, overlap
from tercet.tasks.heatmaps import (
    average_words,
    contrast_attention,
    contrast_heatmaps,
    default_layer,
    enlarge,
    fusion_attention,
    match_heatmaps,
    to_grid,
)

CLOSE = 1e-5


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5, and within 1e-5 of the largest value: the maps are far smaller than 1."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= CLOSE * min(1.0, expected.abs().max().item()), difference


@pytest.mark.parametrize("layer", [2, 3])
def test_maps_of_matching(parity_dir: Path, layer: int) -> None:
    fixture = load_fixture(parity_dir, "grounding")
    inputs, out = fixture.part("in."), fixture.part("out.")
    model = load_student(fixture).eval()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        image_embeds = model.encode_image(inputs["image"])
        text_embeds = model.encode_text(inputs["input_ids"], mask)

    weights, gradient, _ = fusion_attention(model, image_embeds, text_embeds, mask, layer)
    assert_near(weights, out[f"attention_itm_block{layer}"])
    assert_near(gradient, out[f"attention_grad_itm_block{layer}"])

    words, _ = match_heatmaps(model, image_embeds, text_embeds, mask, layer)
    published = to_grid(average_words(words, mask, published=True), 96, 96)
    assert_near(published, out[f"gradcam_itm_block{layer}"])

    # Only the scale of ours differs, which the published code lets depend on the longest text of the batch.
    scale = mask.shape[1] / mask.sum(dim=1)
    assert_near(to_grid(average_words(words, mask), 96, 96), out[f"gradcam_itm_block{layer}"] * scale[:, None, None])


@pytest.mark.parametrize("layer", [1, 2])
def test_maps_of_contrast(parity_dir: Path, layer: int) -> None:
    fixture = load_fixture(parity_dir, "grounding")
    inputs, out = fixture.part("in."), fixture.part("out.")
    model = load_student(fixture).eval()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        text_feats = model.project_text(model.encode_text(inputs["input_ids"], mask)[:, 0])

    weights, gradient = contrast_attention(model, inputs["image"], text_feats, layer)
    assert_near(weights, out[f"attention_itc_block{layer}"])
    assert_near(gradient[:, 0], out[f"attention_grad_itc_block{layer}"])
    maps = contrast_heatmaps(model, inputs["image"], text_feats, layer)
    assert_near(to_grid(maps, 96, 96), out[f"gradcam_itc_block{layer}"])


def test_choice_of_boxes(parity_dir: Path) -> None:
    fixture = load_fixture(parity_dir, "grounding")
    about = fixture.about["box_selection"]
    masks = fixture.part("in.")["box_masks"]
    hits: dict[str, list[bool]] = {}
    for index, expected in enumerate(about["expected"]):
        height, width = about["sizes_h_w"][index]
        candidates = [to_edges(box) for box in about["detections_xywh_score"][str(index)]]
        chosen, score = choose_box(enlarge(masks[index : index + 1], height, width)[0], candidates)
        right = to_edges(about["reference_boxes_xywh"][index])

        assert candidates[chosen] == to_edges(expected["chosen_box"])
        assert score == pytest.approx(expected["score"], rel=1e-5)
        assert overlap(candidates[chosen], right, published=True) == pytest.approx(expected["iou"], abs=1e-9)
        hits.setdefault(about["splits"][index], []).append(overlap(candidates[chosen], right) >= HIT)
    assert {f"{split}_d": sum(found) / len(found) for split, found in hits.items()} == about["accuracy"]


def test_published_layers(parity_dir: Path) -> None:
    model = load_student(load_fixture(parity_dir, "grounding"))
    sizes = {"vision": {"depth": 12}, "text": {"depth": 12, "fusion_layer": 6}}
    model.config = model.config.model_copy(
        update={name: getattr(model.config, name).model_copy(update=keys) for name, keys in sizes.items()}
    )
    assert (default_layer(model, "itm"), default_layer(model, "itc")) == (8, 8)


def to_edges(box: list[float]) -> Box:
    left, top, width, height = box[:4]
    return left, top, left + width, top + height
