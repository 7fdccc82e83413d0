"""What is ours in the encoders: the convolution stem, its position table, pooling by maximum and mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tercet.config import ModelConfig, TextConfig, VisionConfig
from tercet.config_io import load_config
from tercet.errors import TercetError
from tercet.export import ImageKVGraph
from tercet.model.hub import load_model, save_model
from tercet.model.tercet import Tercet
from tercet.model.text import TextEncoder
from tercet.model.vision import VisionTransformer, sine_positions
from tercet.model.weights import write_published

SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}


def build(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(VisionConfig.model_validate({**SIZES, **changes}))


@pytest.mark.parametrize("patch_size", [2, 8, 16])
def test_one_token_a_patch_for_images_of_any_shape(patch_size: int) -> None:
    vision = build(stem="convolution", patch_size=patch_size)
    tokens = vision(torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8))
    assert tokens.shape == (2, 1 + (48 // patch_size) * (80 // patch_size), 32)


@pytest.mark.parametrize(("row", "column"), [(2, 5), (5, 2)])
def test_tokens_of_the_stem_run_row_by_row(row: int, column: int) -> None:
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    build(stem="convolution").patch_embed(image)[0, row * 8 + column].square().sum().backward()
    assert image.grad is not None
    weights = image.grad.square().sum((0, 1))
    across, down = ((weights.sum(axis) * torch.arange(64)).sum() / weights.sum() for axis in (0, 1))
    assert abs(down - (8 * row + 3.5)) < 5 and abs(across - (8 * column + 3.5)) < 5


def test_sines_tell_row_and_column() -> None:
    table = sine_positions(6, 32)[0]
    assert not table[0].any() and abs(table[1:].pow(2).mean().sqrt() - 0.2) < 1e-6
    rows, columns = table[1:].unflatten(0, (6, 6)).split(16, dim=2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    for along in (rows[:, 0], columns[0]):
        apart = torch.cdist(along, along)
        assert apart[~torch.eye(6, dtype=torch.bool)].min() > 0.1
    assert torch.equal(build(stem="convolution").position_embed, sine_positions(4, 32))


def test_the_maximum_joins_the_class_token_alone() -> None:
    plain, pooled = build(), build(pool="maximum")
    for vision in (plain, pooled):
        vision.norm.register_forward_hook(lambda _, inputs, __: inputs[0])
    image = torch.randn(2, 3, 32, 32)
    before, after = plain(image), pooled(image)
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(after[:, 0], before[:, 0] + before[:, 1:].amax(1))


@pytest.mark.parametrize("window", [None, 1])
def test_fusion_reads_patches_alone_where_they_see_their_neighbours_alone(window: int | None) -> None:
    torch.manual_seed(0)
    model = Tercet(ModelConfig.model_validate({"size": "tiny", "vision": {"window": window}})).eval()
    text, mask = torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool)
    image_embeds = torch.randn(2, 1 + 64, 128)
    other = image_embeds.clone()
    other[:, 0] = 3.0
    with torch.no_grad():
        one, two = (model.match_logits(text, mask, model.project_kv(embeds)) for embeds in (image_embeds, other))
        stacked = ImageKVGraph(model)(image_embeds)
    assert torch.equal(one, two) == (window is not None)
    for layer, (key, value) in enumerate(model.project_kv(image_embeds).keys_values):
        assert torch.equal(stacked[:, layer, 0], key) and torch.equal(stacked[:, layer, 1], value)


def test_patches_are_left_out_behind_the_stem() -> None:
    vision = build(stem="convolution")
    assert vision(torch.randn(1, 3, 32, 32), drop=0.5).shape == (1, 1 + 8, 32)


def test_a_model_with_both_is_saved_and_loaded_but_has_no_published_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tercet(ModelConfig.model_validate({"size": "tiny", "vision": {"stem": "convolution", "pool": "maximum"}}))
    save_model(model, tmp_path / "model")
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model").vision(image), model.eval().vision(image))
    with pytest.raises(TercetError, match=r"model\.vision\.stem convolution"):
        write_published(model, tmp_path / "model.pth")


def test_the_mean_over_the_tokens_takes_the_place_of_the_class_token_and_no_padding_counts() -> None:
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


def test_a_text_pooled_by_the_mean_has_no_published_form(tmp_path: Path) -> None:
    model = Tercet(ModelConfig.model_validate({"size": "tiny", "text": {"pool": "mean"}}))
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").text.pool == "mean"
    with pytest.raises(TercetError, match=r"model\.text\.pool mean"):
        write_published(model, tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"patch_size": 12, "image_size": 48}, "patch_size 12 is not a power of 2, which stem convolution needs"),
        ({"width": 30, "heads": 2}, "width 30 is not a multiple of 4, which stem convolution needs"),
    ],
)
def test_sizes_that_the_stem_cannot_have(keys: dict[str, int], told: str) -> None:
    with pytest.raises(TercetError, match=told):
        load_config(
            "demo", {f"model.vision.{key}": value for key, value in keys.items()} | {"model.vision.stem": "convolution"}
        )
