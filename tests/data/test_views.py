"""Views: what is drawn is made, at a part of the JPEG's size where no crop shows it, on the host and on a device."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tercet.data import augment
from tercet.data.augment import Pixels, apply_changes
from tercet.data.changes import Change, draw_full
from tercet.data.device_augment import OPERATIONS, schedule
from tercet.data.images import EncodedImage, resize
from tercet.data.views import View, ViewStyle, one_view, resize_fast


def paint(height: int = 48, width: int = 64) -> Pixels:
    """A picture without any symmetry."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([255 * columns // width, 255 * rows // height, (rows * columns) % 256], axis=2).astype(np.uint8)


def jpeg_of(image: Pixels, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95, exif=exif)
    return stream.getvalue()


def two_views(image: Pixels, style: ViewStyle, seed: int) -> list[Pixels]:
    """Both views of an image, as the loader has them."""
    height, width = image.shape[:2]
    drawn = style.draw_two(height, width, np.random.default_rng(seed))
    return [style.make(image, view, height, width) for view in drawn]


@pytest.fixture(scope="module")
def photographs(data_dir: Path) -> list[Pixels]:
    files = sorted((data_dir / "flickr8k" / "originals").glob("*.jpg"))[:8]
    return [np.array(Image.open(file).convert("RGB")) for file in files]


@pytest.mark.parametrize("augment", ["full", "light", "none"])
@pytest.mark.parametrize("compat", ["tercet", "published"])
def test_views_follow_from_the_state_of_the_generator(augment: Any, compat: Any) -> None:
    image = paint(144, 192)
    style = ViewStyle(112, augment, compat=compat)
    first = two_views(image, style, 4)
    second = two_views(image, style, 4)
    other = two_views(image, style, 5)
    for view, again in zip(first, second, strict=True):
        assert view.shape == (112, 112, 3) and view.dtype == np.uint8
        assert (view == again).all()
    assert (first[0] == first[1]).all() == (augment == "none")
    assert (first[0] == other[0]).all() == (augment == "none")
    assert (image == paint(144, 192)).all()


def test_no_augmentation_is_the_evaluation_transform() -> None:
    image = paint(100, 70)
    first, second = two_views(image, ViewStyle(64, "none"), 0)
    assert (first == resize(image, 64)).all() and (second == first).all()


def test_light_views_are_crops_some_of_them_flipped() -> None:
    left_to_right = np.repeat(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], 3, axis=2).repeat(150, axis=0)

    def share_flipped(flip: bool) -> float:
        rng = np.random.default_rng(0)
        views = [one_view(left_to_right, 32, rng, "light", flip=flip).astype(int) for _ in range(200)]
        return float(np.mean([view[0, 0, 0] > view[0, -1, 0] for view in views]))

    assert share_flipped(flip=True) == pytest.approx(0.5, abs=0.12)
    assert share_flipped(flip=False) == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 96), st.integers(0, 2**32 - 1))
def test_the_fast_resize_is_within_two_levels_of_pillows(height: int, width: int, size: int, seed: int) -> None:
    # Where no weight drives a sum out of 0 to 255 between the two passes, which the two libraries clip differently.
    image = np.random.default_rng(seed).integers(80, 176, (height, width, 3), np.uint8)
    assert np.abs(resize_fast(image, size).astype(int) - resize(image, size)).max() <= 2


def test_the_fast_resize_of_photographs_is_within_one_level(photographs: list[Pixels]) -> None:
    for image in photographs:
        for part in (image, image[10:130, 7:200]):
            difference = np.abs(resize_fast(part, 96).astype(int) - resize(part, 96))
            assert difference.max() <= 1
            assert difference.mean() < 0.05


def test_the_published_kind_resizes_as_pillow_does(photographs: list[Pixels]) -> None:
    image = photographs[0]
    height, width = image.shape[:2]
    view = ViewStyle(64, "light", compat="published").draw(height, width, np.random.default_rng(1), flip=False)
    assert view.crop is not None
    top, left, tall, wide = view.crop
    cut = Image.fromarray(image).crop((left, top, left + wide, top + tall)).resize((64, 64), Image.Resampling.BICUBIC)
    assert (ViewStyle(64, "light", compat="published").make(image, view, height, width) == np.asarray(cut)).all()


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_jpeg_is_decoded_at_the_part_that_its_crops_allow(orientation: int) -> None:
    image = np.ascontiguousarray(cv2.resize(paint(), (640, 480), interpolation=cv2.INTER_CUBIC))
    encoded = EncodedImage(jpeg_of(image, orientation), "x")
    tall, wide = (480, 640) if orientation == 1 else (640, 480)
    assert (encoded.height, encoded.width) == (tall, wide)
    style = ViewStyle(64)
    for side, reduction in ((480, 4), (256, 4), (255, 2), (128, 2), (127, 1)):
        views = (View((0, 0, side, side), []), View((0, 0, 480, 480), []))
        assert style.decode(encoded, views).shape == (tall // reduction, wide // reduction, 3)
    assert ViewStyle(64, compat="published").decode(encoded, views).shape == (tall, wide, 3)


def test_decoding_at_a_part_of_the_size_hardly_shows(photographs: list[Pixels]) -> None:
    size, style = 96, ViewStyle(96)
    ratios: list[float] = []
    for number, image in enumerate(photographs):
        encoded = EncodedImage(jpeg_of(image), "x")
        height, width = image.shape[:2]
        crop = (2 * number, 6 * number, 2 * size + 30 + 2 * number, 3 * size - 2 * number)
        view = View(crop, [])
        full, reduced = encoded.pixels(), style.decode(encoded, (view, view))
        assert reduced.shape[0] == (height + 1) // 2
        wanted = style.cut(full, view, height, width).astype(float)
        ratios.append(np.mean((style.cut(reduced, view, height, width) - wanted) ** 2) / wanted.var())
    # A hundredth of the picture's own variance is 20 dB; what differs is the outline of edges between two pixels.
    assert np.median(ratios) < 0.01
    assert max(ratios) < 0.03


AMOUNTS: dict[str, tuple[float, ...]] = {
    "brightness": (0.6, 1.0, 1.36),
    "contrast": (0.6, 1.4),
    "saturation": (0.6, 1.4),
    "hue": (-0.1, 0.03, 0.1),
    "grey": (0.0,),
    "blur": (0.1, 0.5, 1.0, 1.3, 2.0),
    "flip": (0.0,),
    "autocontrast": (1.36,),
    "equalize": (1.36,),
    "sharpness": (0.5, 1.36),
    "shear_x": (-0.21, 0.21),
    "shear_y": (-0.21, 0.21),
    "translate_x": (-7.0, 7.0),
    "translate_y": (-7.0, 7.0),
    "rotate": (-21.0, 21.0),
}


def on_device(images: list[Pixels], changes: list[list[Change]], compat: Any = "tercet") -> list[Pixels]:
    batch = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
    return list(schedule(changes, compat).apply(batch).numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("compat", ["tercet", "published"])
def test_an_operation_on_the_device_equals_that_on_the_host(name: str, compat: Any, photographs: list[Pixels]) -> None:
    images = [resize(image, 96) for image in photographs]
    images[0] = np.maximum(images[0], 9)  # no black: where the published AutoContrast went wrong
    images[1] = np.full_like(images[1], 77)
    for amount in AMOUNTS[name]:
        found = on_device(images, [[(name, amount)] for _ in images], compat)
        for image, view in zip(images, found, strict=True):
            expected = augment.OPERATIONS[name](image, amount, compat).astype(int)
            difference = np.abs(view - expected)
            if name == "sharpness" and compat == "published":
                difference = np.minimum(difference, 256 - difference)  # where one of them has just wrapped around
            if name == "blur":
                assert difference[6:-6, 6:-6].max() <= 2
                assert difference.mean() < 0.3
            else:
                assert difference.max() <= 1, (name, amount)


def test_augment_covers_the_same_operations() -> None:
    assert set(OPERATIONS) == set(augment.OPERATIONS) == set(AMOUNTS)


def test_whole_draws_on_the_device_equal_those_on_the_host(photographs: list[Pixels]) -> None:
    rng = np.random.default_rng(0)
    images = [resize(photographs[number % 8], 64) for number in range(64)]
    changes = [draw_full(rng) for _ in images]
    changes[3] = []
    found = on_device(images, changes)
    differences = [
        np.abs(view.astype(int) - apply_changes(image, own)).mean()
        for image, own, view in zip(images, changes, found, strict=True)
    ]
    assert (found[3] == images[3]).all()
    assert np.median(differences) < 0.3
    # A level that one of them rounds up may take the other way in equalising, which spreads few levels widely.
    assert max(differences) < 5


def test_a_schedule_keeps_every_rows_own_order() -> None:
    rng = np.random.default_rng(1)
    changes = [draw_full(rng) for _ in range(40)]
    plan = schedule(changes)
    found: list[list[Change]] = [[] for _ in changes]
    start = 0
    for name, count in zip(plan.names, plan.counts, strict=True):
        part = slice(start, start + count)
        for row, amount in zip(plan.rows[part].tolist(), plan.amounts[part].tolist(), strict=True):
            found[row].append((name, pytest.approx(amount, rel=1e-6)))
        start += count
    assert found == changes
    assert len(plan.names) < 60 < sum(map(len, changes))


@pytest.mark.gpu
def test_a_gpu_gives_what_the_processor_gives(photographs: list[Pixels]) -> None:
    rng = np.random.default_rng(0)
    batch = torch.from_numpy(np.stack([resize(image, 96) for image in photographs]).transpose(0, 3, 1, 2).copy())
    plan = schedule([draw_full(rng) for _ in photographs])
    found = plan.to("cuda").apply(batch.cuda()).cpu()
    difference = (found.int() - plan.apply(batch).int()).abs().float()
    assert difference.mean() < 0.5
