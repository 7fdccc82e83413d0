from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from safetensors.numpy import load_file

from tercet.data import augment
from tercet.data.augment import Pixels

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
    "Identity": lambda image: augment.RAND_AUGMENT[0](image, 0.7, np.random.default_rng(0), "tercet"),
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
    for operation in augment.RAND_AUGMENT:
        assert operation(image, 0.7, rng, "published").shape == image.shape
    for _ in range(20):
        assert augment.augment_fully(image, rng).shape == image.shape


def test_the_same_state_gives_the_same_image(photo: Pixels) -> None:
    def draw(seed: int) -> list[Pixels]:
        rng = np.random.default_rng(seed)
        return [augment.augment_fully(photo, rng) for _ in range(20)]

    assert all((first == second).all() for first, second in zip(draw(3), draw(3), strict=True))
    assert len({image.tobytes() for image in draw(3)}) > 15


def test_nothing_writes_into_its_input(photo: Pixels) -> None:
    image = photo.copy()
    image.flags.writeable = False
    rng = np.random.default_rng(0)
    for _ in range(60):
        augment.augment_fully(image, rng, "published")
    assert (image == photo).all()


def test_choices_have_the_published_chances(photo: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[float]] = {}

    def spy(name: str) -> None:
        real = getattr(augment, name)

        def record(image: Pixels, *rest: float) -> Pixels:
            calls.setdefault(name, []).append(rest[0] if rest and isinstance(rest[0], float) else 0.0)
            return real(image, *rest)

        monkeypatch.setattr(augment, name, record)

    for name in ("jitter_colour", "to_grey", "blur", "flip_horizontally"):
        spy(name)
    monkeypatch.setattr(augment, "rand_augment", lambda image, rng, compat: image)
    monkeypatch.setattr(augment, "adjust_saturation", lambda image, factor: image)  # it makes a grey of its own
    small, rng, draws = photo[:4, :4], np.random.default_rng(5), 3000
    for _ in range(draws):
        augment.augment_fully(small, rng)
    shares = {name: len(values) / draws for name, values in calls.items()}
    expected = {"jitter_colour": 0.8, "to_grey": 0.2, "blur": 0.5, "flip_horizontally": 0.5}
    assert shares == pytest.approx(expected, abs=0.035)  # 3.5 standard deviations and more
    sigmas = np.array(calls["blur"])
    assert 0.1 <= sigmas.min() < 0.15 and 1.95 < sigmas.max() <= 2.0
    assert sigmas.mean() == pytest.approx(1.05, abs=0.06)


def test_rand_augment_has_the_published_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def make(index: int) -> Callable[..., Pixels]:
        return lambda image, share, rng, compat: (drawn.append(index), image)[1]

    monkeypatch.setattr(augment, "RAND_AUGMENT", tuple(make(index) for index in range(10)))
    image, rng = np.zeros((2, 2, 3), np.uint8), np.random.default_rng(2)
    for _ in range(5000):
        augment.rand_augment(image, rng)
    counts = np.bincount(drawn, minlength=10)
    assert counts.sum() / 5000 == pytest.approx(1.0, abs=0.04)  # two operations, each with chance one half
    assert counts / 5000 == pytest.approx(np.full(10, 0.1), abs=0.02)


@pytest.mark.parametrize("index", range(5, 10))
def test_warps_go_both_ways_equally_often(index: int, photo: Pixels) -> None:
    rng = np.random.default_rng(1)
    results = [augment.RAND_AUGMENT[index](photo, 0.7, rng, "tercet").tobytes() for _ in range(400)]
    forward = list(WARPS.values())[(index - 5) * 2 + 1](photo).tobytes()
    assert len(set(results)) == 2
    assert results.count(forward) / 400 == pytest.approx(0.5, abs=0.09)


def test_flipping_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, photo: Pixels) -> None:
    monkeypatch.setattr(cv2, "flip", lambda *_: pytest.fail("flipped"))
    rng = np.random.default_rng(0)
    for _ in range(20):
        augment.augment_fully(photo, rng, flip=False)


def test_jitter_keeps_within_its_strength() -> None:
    grey = np.full((2, 2, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    values = np.array([augment.jitter_colour(grey, rng)[0, 0, 0] for _ in range(500)])
    assert 58 <= values.min() < 65 and 135 < values.max() <= 141
