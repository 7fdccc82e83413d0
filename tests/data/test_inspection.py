"""Inspection: counts, broken images, duplicates that are and that look the same, and the contact sheet."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scene_files import scene_file
from tercet.cli import main
from tercet.data.inspection import LINES, TILE, _font, _lines, alike, fingerprint


def photograph(seed: int, side: int = 96) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def test_a_folder_with_everything_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = photograph(0)
    files = {
        "a.jpg": encoded(first),
        "copy.jpg": encoded(first),
        "smaller.jpg": encoded(cv2.resize(first, (60, 60), interpolation=cv2.INTER_AREA), quality=60),
        "brighter.png": encoded(cv2.convertScaleAbs(first, alpha=0.9, beta=12), "PNG"),
        "other.jpg": encoded(photograph(1)),
        "third.jpg": encoded(photograph(2, 200)),
        "flat.png": encoded(np.full((50, 80, 3), 90, np.uint8), "PNG"),
        "flatter.png": encoded(np.full((51, 80, 3), 90, np.uint8), "PNG"),
        "cut.jpg": encoded(photograph(3))[:-30],
        "page.jpg": b"<html>404</html>",
    }
    for number, (name, data) in enumerate(files.items()):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text("the same words" if number < 3 else "word " * (number + 30))
    (tmp_path / "alone.jpg").write_bytes(files["other.jpg"])
    sheet = tmp_path / "out" / "sheet.png"
    arguments = ["data", "inspect", str(tmp_path), "--data.workers", "1"]
    assert main([*arguments, "--sheet", str(sheet), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["pairs"], found["broken_images"], found["rejected_rows"]) == (10, 10, 2, 1)
    assert (found["duplicate_images"], found["near_duplicate_images"], found["repeated_captions"]) == (1, 2, 2 + 6)
    assert [Path(name).name for name in found["duplicates"][0]] == ["a.jpg", "copy.jpg"]
    assert {Path(name).name for name in found["near_duplicates"][0]} == {"a.jpg", "smaller.jpg", "brighter.png"}
    assert found["captions_cut"] == 7 and found["caption_words"]["least"] == 3
    assert found["width"] == {"least": 60, "median": 96.0, "p95": pytest.approx(163.6), "greatest": 200, "mean": 100.5}
    assert sum("a web page or XML text" in line for line in found["broken"]) == 1
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width > 1000
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "near duplicate images  2" in text and "broken: " in text and "rejected: " in text
    assert "\nduplicates: a.jpg, copy.jpg\n" in text


@pytest.mark.parametrize("caption", ["WWWW MMMM WWWW " * 9, "one-unbroken-" * 20, "iiii llll " * 30, ""])
def test_captions_stay_under_their_picture(caption: str) -> None:
    font = _font()
    lines = _lines(caption, font)
    assert len(lines) <= LINES and all(font.getlength(line) <= TILE for line in lines)


def test_scenes_are_all_different(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", scene_file("test"), "--json", "--data.workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["broken_images"], found["duplicate_images"]) == (40, 0, 0)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=5))
def test_fingerprints_within_three_bits_are_found(across: int, down: int, flipped: set[int]) -> None:
    other = across
    for bit in flipped:
        other ^= 1 << bit
    stranger = (across ^ (2**64 - 1), down)
    found = alike(np.array([(across, down), stranger, (other, down)], np.uint64), np.array([10, 11, 12]))
    if len(flipped) <= 3:
        assert found == [[10, 12]]
    assert all(11 not in group for group in found)


def test_a_fingerprint_is_of_the_picture_not_its_size(jpeg: Callable[..., bytes]) -> None:
    image = photograph(5, 180)
    for size in (64, 96, 300):
        one, other = fingerprint(image), fingerprint(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
        assert sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True)) <= 4
