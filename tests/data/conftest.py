"""Small images and files of pairs that the tests of `data` read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest


def make_jpeg(number: int = 0, height: int = 40, width: int = 48) -> bytes:
    """A JPEG whose content follows from `number`."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    done, data = cv2.imencode(".jpg", cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    assert done
    return data.tobytes()


def make_tar(
    path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT
) -> Path:
    """A tar with these members, in this order."""
    items = members if isinstance(members, list) else list(members.items())
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    """`make_jpeg`."""
    return make_jpeg


@pytest.fixture
def tar() -> Callable[..., Path]:
    """`make_tar`."""
    return make_tar


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """A folder with 6 photographs, images/0.jpg to images/5.jpg."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(make_jpeg(number))
    return tmp_path
