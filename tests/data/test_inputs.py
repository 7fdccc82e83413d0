"""Images and texts in the forms that callers have them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tercet.data.inputs import list_images, list_texts, to_batch, to_pixels
from tercet.errors import TercetError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def png(image: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    channels_first = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        png(),
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS.astype(np.float64) / 255,
        channels_first,
        channels_first.float() / 255,
        channels_first.to(torch.bfloat16).mul(0).add(channels_first.float()).div(255).clamp(0, 1),
    ]
    for form in forms:
        assert np.array_equal(to_pixels(form), PIXELS), type(form)
    assert to_batch([PIXELS, PIXELS], 4).shape == (2, 3, 4, 4)


def test_grey_and_transparent_arrays() -> None:
    grey = PIXELS[:, :, 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(to_pixels(grey), expected)
    assert np.array_equal(to_pixels(grey[..., None]), expected)
    assert np.array_equal(to_pixels(torch.from_numpy(grey)[None]), expected)
    clear = np.concatenate([PIXELS, np.zeros((6, 8, 1), np.uint8)], axis=2)
    assert (to_pixels(clear) == 255).all()


def test_a_camera_held_sideways() -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    assert np.array_equal(to_pixels(opened), np.rot90(PIXELS, -1))
    assert np.array_equal(to_pixels(opened), to_pixels(buffer.getvalue()))


def test_one_or_several() -> None:
    assert list_images("a.png") == (["a.png"], True)
    assert list_images(png())[1] is True
    assert list_images(["a.png"]) == (["a.png"], False)
    assert list_images(path for path in ("a.png", "b.png")) == (["a.png", "b.png"], False)
    images, single = list_images(np.stack([PIXELS, PIXELS]))
    assert (len(images), single) == (2, False)
    assert len(list_images(torch.zeros(3, 3, 6, 8))[0]) == 3
    assert list_texts("a dog") == (["a dog"], True)
    assert list_texts(("a", "b")) == (["a", "b"], False)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), "floats outside 0 to 1"),
        (PIXELS.astype(np.int64), "holds int64 values"),
        (np.zeros((3, 6, 8), np.uint8), r"array of shape \[3, 6, 8\]"),
        (torch.zeros(6, 8, 3), r"tensor of shape \[6, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"array of shape \[0, 8, 3\]"),
        (b"", "empty"),
        (b"<html>", "a web page"),
        (7, "is int; give a path"),
        ("no/such/file.png", "no file no/such/file.png"),
    ],
)
def test_what_is_no_image(image: object, message: str) -> None:
    with pytest.raises(TercetError, match=message):
        to_pixels(image)  # pyright: ignore[reportArgumentType]


def test_nothing_given() -> None:
    with pytest.raises(TercetError, match="no image given"):
        list_images([])
    with pytest.raises(TercetError, match="no text given"):
        list_texts([])
    with pytest.raises(TercetError, match="text 2 is int"):
        list_texts(["a", 2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TercetError, match="5 axes"):
        list_images(np.zeros((1, 1, 2, 2, 3)))
