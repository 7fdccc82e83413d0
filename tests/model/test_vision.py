"""Options of the vision transformer: convolution stem, pooling, windows, and dropped patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tercet.config import ModelConfig, VisionConfig
from tercet.config_io import load_config
from tercet.errors import TercetError
from tercet.model.hub import load_model, save_model
from tercet.model.tercet import Tercet
from tercet.model.vision import VisionTransformer, draw_patches, neighbours, sine_positions
from tercet.model.weights import write_published

SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}


def build(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(VisionConfig.model_validate({**SIZES, **changes}))


@pytest.mark.parametrize("patch_size", [2, 8, 16])
def test_the_stem_gives_one_token_a_patch_for_images_of_any_shape(patch_size: int) -> None:
    vision = build(stem="convolution", patch_size=patch_size)
    images = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8)
    patches = (48 // patch_size) * (80 // patch_size)
    assert vision(images).shape == (2, 1 + patches, 32)
    assert vision(images, drop=0.5).shape == (2, 1 + patches // 2 + patches % 2, 32)


@pytest.mark.parametrize(("row", "column"), [(2, 5), (5, 2)])
def test_tokens_of_the_stem_run_row_by_row(row: int, column: int) -> None:
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    build(stem="convolution").patch_embed(image)[0, row * 8 + column].square().sum().backward()
    assert image.grad is not None
    weights = image.grad.square().sum((0, 1))
    across, down = ((weights.sum(axis) * torch.arange(64)).sum() / weights.sum() for axis in (0, 1))
    assert abs(down - (8 * row + 3.5)) < 5 and abs(across - (8 * column + 3.5)) < 5


def test_sines_encode_row_and_column() -> None:
    table = sine_positions(6, 32)[0]
    assert not table[0].any() and abs(table[1:].pow(2).mean().sqrt() - 0.2) < 1e-6
    rows, columns = table[1:].unflatten(0, (6, 6)).split(16, dim=2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    for along in (rows[:, 0], columns[0]):
        assert torch.cdist(along, along)[~torch.eye(6, dtype=torch.bool)].min() > 0.1
    assert torch.equal(build(stem="convolution").position_embed, sine_positions(4, 32))


def test_the_maximum_joins_the_class_token_alone() -> None:
    plain, pooled = build(), build(pool="maximum")
    for vision in (plain, pooled):
        vision.norm.register_forward_hook(lambda _, inputs, __: inputs[0])
    image = torch.randn(2, 3, 32, 32)
    before, after = plain(image), pooled(image)
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(after[:, 0], before[:, 0] + before[:, 1:].amax(1))


def test_patches_are_sampled_without_repeats_in_order_and_equally_often() -> None:
    torch.manual_seed(0)
    drawn = draw_patches(torch.zeros(2000, 10, 3), 4)
    assert (drawn.diff(dim=1) > 0).all()
    shares = drawn.flatten().bincount(minlength=10) / 2000
    torch.testing.assert_close(shares, torch.full((10,), 0.4), rtol=0, atol=0.05)


def test_a_patch_that_remains_keeps_its_position() -> None:
    vision = build()
    vision.blocks = torch.nn.ModuleList()
    image = torch.randn(1, 3, 32, 32)
    whole, remaining = vision(image)[0], vision(image, drop=0.5)[0]
    assert len(remaining) == 1 + 8
    torch.testing.assert_close(remaining[0], whole[0])
    positions = [int((whole - token).abs().sum(dim=1).argmin()) for token in remaining[1:]]
    assert positions == sorted(set(positions))
    torch.testing.assert_close(remaining[1:], whole[positions])


def test_with_a_window_a_patch_attends_to_its_neighbours_and_the_class_token_to_all() -> None:
    vision = build(window=1).eval()
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 24:, 24:] += 1.0  # the last patch
    with torch.no_grad():
        moved = (vision(images) - vision(changed)).abs().amax(dim=(0, 2)) > 1e-6
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, 2:] = True
    assert moved[0] and torch.equal(moved[1:].view(4, 4), expected)


def test_the_neighbours_of_patches_that_remain() -> None:
    remaining = torch.tensor([[0, 1, 5], [2, 3, 4]])
    every = neighbours(2, 3, 1, None, torch.device("cpu"))[0, 0]
    masks = neighbours(2, 3, 1, remaining, torch.device("cpu"))
    assert masks.shape == (2, 1, 4, 4)
    for own, mask in zip(remaining, masks[:, 0], strict=True):
        tokens = torch.cat([torch.zeros(1, dtype=torch.long), own + 1])
        assert torch.equal(mask, every[tokens][:, tokens])


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"vision": {"stem": "convolution", "pool": "maximum"}}, r"model\.vision\.stem convolution"),
        ({"text": {"pool": "mean"}}, r"model\.text\.pool mean"),
    ],
)
def test_own_options_are_saved_and_loaded_but_have_no_published_form(
    tmp_path: Path, sizes: dict[str, object], named: str
) -> None:
    torch.manual_seed(0)
    model = Tercet(ModelConfig.model_validate({"size": "tiny", **sizes})).eval()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    text = torch.arange(5, 10)[None], torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(loaded.vision(image), model.vision(image))
        assert torch.equal(loaded.text(*text), model.text(*text))
    with pytest.raises(TercetError, match=named):
        write_published(model, tmp_path / "model.pth")


@pytest.mark.parametrize(("key", "sizes"), [("patch_size 12", (12, 48, 32)), ("width 30", (8, 32, 30))])
def test_sizes_that_the_stem_cannot_have(key: str, sizes: tuple[int, int, int]) -> None:
    patch_size, image_size, width = sizes
    keys = {"patch_size": patch_size, "image_size": image_size, "width": width, "heads": 2, "stem": "convolution"}
    with pytest.raises(TercetError, match=f"{key} is not a .*, which stem convolution needs"):
        load_config("demo", {f"model.vision.{name}": value for name, value in keys.items()})
