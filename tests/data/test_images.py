from __future__ import annotations

import io
import itertools
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from scene_files import png_header
from tercet.data.augment import Pixels
from tercet.data.images import BrokenImage, EncodedImage, ViewTransform, decode, resize, resize_fast


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def paint(height: int = 48, width: int = 64) -> Pixels:
    """A picture without any symmetry, so that every turn of it is another picture."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([255 * columns // width, 255 * rows // height, (rows * columns) % 256], axis=2).astype(np.uint8)


PAINTED = Image.fromarray(paint())
TRUNCATABLE = {
    "baseline": encode(PAINTED, "JPEG"),
    "progressive": encode(PAINTED, "JPEG", progressive=True),
    "png": encode(PAINTED, "PNG"),
    "gif": encode(PAINTED, "GIF"),
    "webp": encode(PAINTED, "WEBP"),
    "bmp": encode(PAINTED, "BMP"),
    "tiff": encode(PAINTED, "TIFF"),
    "ppm": encode(PAINTED, "PPM"),
}


@pytest.fixture(scope="module")
def photographs(data_dir: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((data_dir / "flickr8k" / "originals").glob("*.jpg"))[:8]]


def test_photographs_decode_to_pillows_pixels(photographs: list[bytes]) -> None:
    assert len(photographs) == 8
    for data in photographs:
        pixels = decode(data, "photo")
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
        assert (pixels == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "ICO"])
def test_formats_without_loss_give_the_painted_pixels(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(64, 48)]}}.get(kind, {})
    assert (decode(encode(PAINTED, kind, **options), "x") == paint()).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PAINTED, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = decode(data, "x")
    assert pixels.shape == ((64, 48, 3) if orientation >= 5 else (48, 64, 3))
    assert pixels.flags.c_contiguous
    assert (pixels == expected).all()


def test_damaged_exif_leaves_the_picture_usable() -> None:
    plain = encode(PAINTED, "JPEG")
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0junk"):
        marker = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (decode(plain[:2] + marker + plain[2:], "x") == decode(plain, "x")).all()


def test_grey_and_cmyk_jpegs_become_rgb() -> None:
    grey = PAINTED.convert("L")
    pixels = decode(encode(grey, "JPEG", quality=95), "x")
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()
    assert np.abs(pixels[..., 0].astype(int) - np.asarray(grey)).mean() < 3
    smooth = Image.fromarray(np.stack([paint()[..., 0], paint()[..., 1], paint()[..., 0]], axis=2))
    cmyk = decode(encode(smooth.convert("CMYK"), "JPEG", quality=95), "x")
    assert np.abs(cmyk.astype(int) - np.asarray(smooth)).mean() < 4


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encode(Image.fromarray(values), kind), "x")
        assert pixels.min() == 0 and pixels.max() == 255
        assert np.abs(pixels[..., 1] - values / 257).max() <= 0.5


@pytest.mark.parametrize(("samples", "reason"), [(np.float32, "floating point"), (np.int32, "more than 16 bits")])
def test_samples_of_no_agreed_range_are_refused(samples: type, reason: str) -> None:
    image = Image.fromarray(np.full((4, 4), 1e6, samples))
    with pytest.raises(BrokenImage, match=reason):
        decode(encode(image, "TIFF"), "x")


def test_transparency_is_laid_on_white() -> None:
    rgba = np.dstack([paint(), np.full((48, 64), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    rgba[10:20, :, 3] = 128
    pixels = decode(encode(Image.fromarray(rgba), "PNG"), "x")
    assert (pixels[:10] == 255).all() and (pixels[20:] == paint()[20:]).all()
    half = (paint()[10:20].astype(float) * 128 + 255 * 127) / 255
    assert np.abs(pixels[10:20] - half).max() <= 1
    grey = decode(encode(Image.fromarray(rgba).convert("LA"), "PNG"), "x")
    assert (grey[:10] == 255).all() and (grey[20:, :, 0] == np.asarray(PAINTED.convert("L"))[20:]).all()


def test_palettes_with_and_without_transparency() -> None:
    palette = PAINTED.quantize(16)
    assert (decode(encode(palette, "PNG"), "x") == np.asarray(palette.convert("RGB"))).all()
    hidden = int(np.asarray(palette)[0, 0])
    pixels = decode(encode(palette, "PNG", transparency=hidden), "x")
    where = np.asarray(palette) == hidden
    assert (pixels[where] == 255).all()
    assert (pixels[~where] == np.asarray(palette.convert("RGB"))[~where]).all()


def test_colour_keys_and_bitmaps() -> None:
    key = decode(encode(PAINTED, "PNG", transparency=(0, 0, 0)), "x")
    assert (key[0, 0] == 255).all() and (key[5:, 5:] == paint()[5:, 5:]).all()
    bits = decode(encode(PAINTED.convert("1"), "PNG"), "x")
    assert set(np.unique(bits)) == {0, 255}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data, "x") == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", TRUNCATABLE)
def test_files_cut_short_are_refused(kind: str) -> None:
    data = TRUNCATABLE[kind]
    whole = decode(data, "whole")
    for length in [*range(1, len(data), len(data) // 40), *range(len(data) - 30, len(data))]:
        try:
            pixels = decode(data[:length], "shard-3.tar#42")
        except BrokenImage as error:
            assert str(error).startswith("shard-3.tar#42: ")
        else:
            # Only an end mark or a checksum was cut off: every pixel was there.
            assert length > len(data) - 30 and (pixels == whole).all()


def test_photographs_cut_anywhere_are_refused(photographs: list[bytes]) -> None:
    data = photographs[0]
    for length in (*range(1, 700, 37), *range(700, len(data) - 200, len(data) // 23), len(data) - 40):
        for rest in (b"", b"\0" * 64):
            with pytest.raises(BrokenImage):
                decode(data[:length] + rest, "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\xef\xbb\xbf  <html>", "web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image of a known format"),
        (b"PK\x03\x04 something else", "not an image of a known format"),
        (bytes(1000), "not an image of a known format"),
    ],
)
def test_what_is_no_image_says_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(data, "http://host/a.jpg")
    message = str(caught.value)
    assert message.startswith("http://host/a.jpg: ") and "\n" not in message


def test_too_many_pixels_are_refused_before_decoding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BrokenImage, match="10000 x 9000 pixels are more than pixel_limit 89478485"):
            decode(png_header(10_000, 9_000), "bomb")
        with pytest.raises(BrokenImage, match="ceiling"):
            decode(png_header(60_000, 60_000), "bomb")
    with pytest.raises(BrokenImage, match="64 x 48 pixels are more than pixel_limit 3071"):
        decode(TRUNCATABLE["baseline"], "x", pixel_limit=48 * 64 - 1)
    assert decode(TRUNCATABLE["baseline"], "x", pixel_limit=48 * 64).shape == (48, 64, 3)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(sorted(TRUNCATABLE)), st.integers(0, 600))
def test_hostile_bytes_raise_nothing_else(noise: bytes, kind: str, position: int) -> None:
    whole = TRUNCATABLE[kind]
    for data in (noise, whole[:position] + noise + whole[position + len(noise) :]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = decode(data, "x", pixel_limit=10**6)
        except BrokenImage as error:
            assert "\n" not in str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_broken_image_comes_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BrokenImage("row 7", "the image file is empty")))
    assert isinstance(error, BrokenImage)
    assert (error.name, error.reason, str(error)) == (
        "row 7",
        "the image file is empty",
        "row 7: the image file is empty",
    )


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_jpeg_decodes_smaller_where_asked(factor: int) -> None:
    whole = Image.fromarray(paint(376, 500))
    for image in (whole, whole.convert("L"), whole.convert("CMYK")):
        assert EncodedImage(encode(image, "JPEG"), "x").pixels(factor).shape == (
            -(-376 // factor),
            -(-500 // factor),
            3,
        )
    assert EncodedImage(encode(whole, "PNG"), "x").pixels(factor).shape == (376, 500, 3)


def test_resize_equals_the_published_test_transform(parity_dir: Path) -> None:
    tensors = load_file(parity_dir / "image_ops.safetensors")
    pixels = resize(tensors["in.image_hwc_u8"], 64)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    deviation = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    normalised = (pixels.astype(np.float32) / 255 - mean) / deviation
    assert np.abs(normalised.transpose(2, 0, 1) - tensors["out.test_transform_64"]).max() < 1e-6


def test_resize_to_its_own_size_is_a_copy() -> None:
    image = paint(32, 32)
    result = resize(image, 32)
    result[:] = 0
    assert (image == paint(32, 32)).all()


@pytest.mark.parametrize("augment", ["full", "light", "whole", "none"])
@pytest.mark.parametrize("compat", ["tercet", "published"])
def test_views_follow_from_the_state_of_the_generator(augment: Any, compat: Any) -> None:
    image = paint(144, 192)
    transform = ViewTransform(112, augment, compat=compat)
    first, second = transform(image, np.random.default_rng(4))
    again = transform(image, np.random.default_rng(4))
    alone = transform(image, np.random.default_rng(4), 1)
    other = transform(image, np.random.default_rng(5))
    assert first.shape == second.shape == (112, 112, 3) and first.dtype == np.uint8
    assert (first == again[0]).all() and (second == again[1]).all() and (first == alone[0]).all() and len(alone) == 1
    assert (first == second).all() == (augment == "none")
    assert (first == other[0]).all() == (augment == "none")
    assert (image == paint(144, 192)).all()


def test_without_augmentation_a_view_is_the_evaluation_transform() -> None:
    image = paint(100, 70)
    assert (ViewTransform(64, "none")(image, np.random.default_rng(0), 1)[0] == resize(image, 64)).all()


def test_light_views_are_crops_some_of_them_flipped() -> None:
    left_to_right = np.repeat(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], 3, axis=2).repeat(150, axis=0)

    def share_flipped(flip: bool) -> float:
        rng = np.random.default_rng(0)
        views = [ViewTransform(32, "light")(left_to_right, rng, 1, flip)[0].astype(int) for _ in range(200)]
        assert len({view[0, 0, 0] for view in views}) > 20
        return float(np.mean([view[0, 0, 0] > view[0, -1, 0] for view in views]))

    assert share_flipped(flip=True) == pytest.approx(0.5, abs=0.12)
    assert share_flipped(flip=False) == 0


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 96), st.integers(0, 2**32 - 1))
def test_the_fast_resize_is_within_two_levels_of_pillows(height: int, width: int, size: int, seed: int) -> None:
    # Where no weight drives a sum out of 0 to 255 between the two passes, which the two libraries clip differently.
    image = np.random.default_rng(seed).integers(80, 176, (height, width, 3), np.uint8)
    assert np.abs(resize_fast(image, size).astype(int) - resize(image, size)).max() <= 2


def test_the_fast_resize_of_photographs_is_within_one_level(photographs: list[bytes]) -> None:
    for image in map(decode, photographs, itertools.repeat("photo")):
        for part in (image, image[10:130, 7:200]):
            difference = np.abs(resize_fast(part, 96).astype(int) - resize(part, 96))
            assert difference.max() <= 1
            assert difference.mean() < 0.05


def test_the_published_kind_resizes_as_pillow_does(photographs: list[bytes]) -> None:
    image = decode(photographs[0], "photo")
    transform = ViewTransform(64, "light", compat="published")
    crop, _ = transform.sample(image.shape[0], image.shape[1], np.random.default_rng(1), flip=False)
    assert crop is not None
    top, left, tall, wide = crop
    cut = Image.fromarray(image).crop((left, top, left + wide, top + tall)).resize((64, 64), Image.Resampling.BICUBIC)
    assert (transform(image, np.random.default_rng(1), 1, flip=False)[0] == np.asarray(cut)).all()


@pytest.mark.parametrize(("side", "reduction"), [(512, 8), (511, 4), (256, 4), (255, 2), (128, 2), (127, 1)])
def test_a_jpeg_is_decoded_at_the_size_that_the_smallest_crop_allows(
    side: int, reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    pixels = EncodedImage.pixels
    monkeypatch.setattr(EncodedImage, "pixels", lambda self, by=1: asked.append(by) or pixels(self, by))
    crops = iter([(0, 0, side, 512), (0, 0, 512, 512)])
    monkeypatch.setattr("tercet.data.images.sample_crop", lambda *_: next(crops))
    encoded = EncodedImage(encode(Image.fromarray(paint(512, 512)), "JPEG"), "x")
    ViewTransform(64)(encoded, np.random.default_rng(0))
    assert asked == [reduction]


def test_decoding_at_a_part_of_the_size_hardly_shows(photographs: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    size, ratios = 96, []
    for number, data in enumerate(photographs):
        crop = (2 * number, 6 * number, 2 * size + 30 + 2 * number, 3 * size - 2 * number)
        monkeypatch.setattr("tercet.data.images.sample_crop", lambda *_, crop=crop: crop)
        transform, rng = ViewTransform(size, "light"), np.random.default_rng(0)
        reduced = transform(EncodedImage(data, "x"), rng, 1, flip=False)[0]
        wanted = transform(decode(data, "x"), rng, 1, flip=False)[0].astype(float)
        assert (reduced != wanted).any()
        ratios.append(np.mean((reduced - wanted) ** 2) / wanted.var())
    # A hundredth of the picture's own variance is 20 dB; what differs is the outline of edges between two pixels.
    assert np.median(ratios) < 0.01
    assert max(ratios) < 0.03
