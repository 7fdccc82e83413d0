from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from safetensors.numpy import load_file

from tercet.data import augment
from tercet.data.augment import Pixels
from tercet.data.changes import draw_full

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tensors(parity_dir: Path) -> Tensors:
    return load_file(parity_dir / "image_ops.safetensors")


@pytest.fixture(scope="module")
def photo(tensors: Tensors) -> Pixels:
    return tensors["in.image_hwc_u8"]


@pytest.fixture(scope="module")
def photographs(data_dir: Path) -> list[Pixels]:
    files = sorted((data_dir / "flickr8k" / "originals").glob("*.jpg"))[:6]
    return [np.array(Image.open(file).convert("RGB").resize((112, 112))) for file in files]


def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first.astype(np.int64) - second.astype(np.int64))


EXACT: dict[str, Callable[[Pixels], Pixels]] = {
    "Identity": lambda image: augment.apply_changes(image, []),
    "Equalize": augment.equalize,
    "Brightness": lambda image: augment.adjust_brightness(image, 1.36),
    "AutoContrast": lambda image: augment.autocontrast(image, "published"),
    "Sharpness": lambda image: augment.sharpen(image, 1.36, "published"),
}
WARPS: dict[str, Callable[[Pixels], Pixels]] = {
    "ShearX_neg": lambda image: augment.shear_x(image, -0.21),
    "ShearX_pos": lambda image: augment.shear_x(image, 0.21),
    "ShearY_neg": lambda image: augment.shear_y(image, -0.21),
    "ShearY_pos": lambda image: augment.shear_y(image, 0.21),
    "TranslateX_neg": lambda image: augment.translate_x(image, -7),
    "TranslateX_pos": lambda image: augment.translate_x(image, 7),
    "TranslateY_neg": lambda image: augment.translate_y(image, -7),
    "TranslateY_pos": lambda image: augment.translate_y(image, 7),
    "Rotate_neg": lambda image: augment.rotate(image, -21),
    "Rotate_pos": lambda image: augment.rotate(image, 21),
}


@pytest.mark.parametrize("name", EXACT)
def test_operations_equal_the_published_ones(name: str, tensors: Tensors, photo: Pixels) -> None:
    assert distance(EXACT[name](photo), tensors[f"out.{name}"]).max() == 0


@pytest.mark.parametrize("name", WARPS)
def test_warps_equal_the_published_ones(name: str, tensors: Tensors, photo: Pixels) -> None:
    # One grey level: other versions of OpenCV than the 5.0 of the fixtures may round some pixels the other way.
    assert distance(WARPS[name](photo), tensors[f"out.{name}"]).max() <= 1


def test_every_published_result_is_tested(tensors: Tensors) -> None:
    results = {key.removeprefix("out.") for key in tensors if key.startswith("out.")}
    assert results == {*EXACT, *WARPS, "AutoContrast_min0", "test_transform_64"}


def test_the_right_mathematics_equals_pillow(tensors: Tensors, photo: Pixels) -> None:
    dark = tensors["in.image_min0_hwc_u8"]
    assert distance(augment.autocontrast(photo), tensors["pil.AutoContrast"]).max() == 0
    assert distance(augment.autocontrast(dark), tensors["pil.AutoContrast_min0"]).max() == 0
    assert distance(augment.autocontrast(dark, "published"), tensors["out.AutoContrast_min0"]).max() == 0
    assert distance(augment.sharpen(photo, 1.36), tensors["pil.Sharpness"]).max() == 0


def test_the_two_kinds_differ_where_the_published_code_was_wrong(photo: Pixels) -> None:
    assert (augment.autocontrast(photo, "published")[..., 0] == 255).all()
    assert distance(augment.sharpen(photo, 1.36, "published"), augment.sharpen(photo, 1.36)).max() > 100


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.17, 1.4])
def test_jitter_equals_pillows_formulae(factor: float, photographs: list[Pixels]) -> None:
    for image in photographs:
        theirs = Image.fromarray(image)
        brightness = ImageEnhance.Brightness(theirs).enhance(factor)
        contrast = ImageEnhance.Contrast(theirs).enhance(factor)
        saturation = ImageEnhance.Color(theirs).enhance(factor)
        assert distance(augment.adjust_brightness(image, factor), np.asarray(brightness)).max() == 0
        # One level: the grey that both are blended with may round to its neighbour.
        assert distance(augment.adjust_contrast(image, factor), np.asarray(contrast)).max() <= 1
        assert distance(augment.adjust_saturation(image, factor), np.asarray(saturation)).max() <= 1
        assert distance(augment.to_grey(image), np.asarray(theirs.convert("L"))[..., None]).max() <= 1


def pillow_hue(image: Pixels, steps: int) -> Pixels:
    """Hue turned by `steps` of 255 in 8 bits, as the published transform does it."""
    hue, saturation, value = Image.fromarray(image).convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.array(steps).astype(np.uint8))
    return np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


@pytest.mark.parametrize("steps", [-25, -9, 0, 4, 25])
def test_hue_is_as_close_to_pillows_as_its_eight_bits_allow(steps: int, photographs: list[Pixels]) -> None:
    for image in photographs:
        difference = distance(augment.adjust_hue(image, steps / 255), pillow_hue(image, steps))
        # Pillow cuts the hue to 255 steps twice and turns by steps of 256; a step is up to 6 levels of one channel.
        assert difference.max() <= 9
        assert difference.mean() < 0.6


def test_hue_turns_the_colour_circle() -> None:
    red, green, blue = np.eye(3, dtype=np.uint8)[:, None, None, :] * np.uint8(255)
    assert (augment.adjust_hue(red, 1 / 3) == green).all()
    assert (augment.adjust_hue(red, -1 / 3) == blue).all()
    assert (augment.adjust_hue(blue, 1 / 3) == red).all()
    assert (augment.adjust_hue(green, 0.5) == [255, 0, 255]).all()


@settings(deadline=None)
@given(arrays(np.uint8, (5, 4, 3)), st.integers(-3, 3))
def test_whole_turns_of_the_hue_change_nothing(image: Pixels, turns: int) -> None:
    assert distance(augment.adjust_hue(image, float(turns)), image).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.5, 2.0])
def test_blur_equals_pillows(sigma: float, photographs: list[Pixels]) -> None:
    for image in photographs:
        theirs = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
        difference = distance(augment.blur(image, sigma), theirs)
        # Pillow rounds to bytes and repeats the edge after each of its six passes, we once: up to half a level a pass.
        assert difference[6:-6, 6:-6].max() <= 3
        assert difference.max() <= 20
        assert difference.mean() < 0.8


def test_blur_has_the_variance_of_its_name() -> None:
    spot = np.zeros((41, 41, 3), np.uint8)
    spot[20, 20] = 255
    for sigma in (1.0, 2.0):
        profile = augment.blur(spot, sigma)[..., 0].astype(float).sum(axis=0)
        variance = (profile * (np.arange(41) - 20) ** 2).sum() / profile.sum()
        assert variance == pytest.approx(sigma**2, rel=0.15)


@settings(deadline=None)
@given(arrays(np.uint8, (7, 9, 3)))
def test_any_image_equals_pillow(image: Pixels) -> None:
    theirs = Image.fromarray(image)
    assert distance(augment.equalize(image), np.asarray(ImageOps.equalize(theirs))).max() == 0
    assert distance(augment.autocontrast(image), np.asarray(ImageOps.autocontrast(theirs))).max() == 0
    # One level: where the smoothed value lies on a half.
    sharper = ImageEnhance.Sharpness(theirs).enhance(1.36)
    assert distance(augment.sharpen(image, 1.36), np.asarray(sharper)).max() <= 1
    assert (augment.flip_horizontally(image) == image[:, ::-1]).all()


@pytest.mark.parametrize("height,width", [(1, 1), (1, 30), (2, 2), (30, 1)])
def test_every_operation_takes_the_smallest_images(height: int, width: int) -> None:
    image = np.full((height, width, 3), 77, np.uint8)
    rng = np.random.default_rng(0)
    for operation in augment.OPERATIONS.values():
        for compat in ("tercet", "published"):
            assert operation(image, 0.7, compat).shape == image.shape
    for _ in range(20):
        assert augment.apply_changes(image, draw_full(rng)).shape == image.shape


def test_the_same_state_gives_the_same_image(photo: Pixels) -> None:
    def draw(seed: int) -> list[Pixels]:
        rng = np.random.default_rng(seed)
        return [augment.apply_changes(photo, draw_full(rng)) for _ in range(20)]

    assert all((first == second).all() for first, second in zip(draw(3), draw(3), strict=True))
    assert len({image.tobytes() for image in draw(3)}) > 15


def test_nothing_writes_into_its_input(photo: Pixels) -> None:
    image = photo.copy()
    image.flags.writeable = False
    rng = np.random.default_rng(0)
    for _ in range(60):
        augment.apply_changes(image, draw_full(rng), "published")
    for name, operation in augment.OPERATIONS.items():
        operation(image, 1.0, "tercet")
        assert (image == photo).all(), name


@pytest.mark.parametrize("pixels", [-7.0, -1.0, 0.0, 3.0, 200.0])
def test_whole_shifts_equal_the_warp(pixels: float, photo: Pixels) -> None:
    for shift, matrix in (
        (augment.translate_x, [[1, 0, -pixels], [0, 1, 0]]),
        (augment.translate_y, [[1, 0, 0], [0, 1, -pixels]]),
    ):
        assert (shift(photo, pixels) == augment._warp(photo, matrix)).all()
        assert distance(shift(photo, pixels), shift(photo, pixels + 1e-4)).max() <= 1
