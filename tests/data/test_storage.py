"""What a foreign file may name as an image: files alone, which are read to an end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tercet.data import storage
from tercet.data.storage import read_image
from tercet.errors import TercetError


def test_devices_pipes_and_folders_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to: opening it would wait
    for name in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(OSError, match="not a file: "):
            read_image(name)
    with pytest.raises(OSError, match="null character"):
        read_image("a\0b")


def test_a_file_that_no_image_is_as_large_as_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LARGEST_IMAGE", 1 << 20)
    for name, size in (("fits.jpg", 1 << 20), ("larger.jpg", 1 << 40)):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
    assert len(read_image(str(tmp_path / "fits.jpg"))) == 1 << 20
    with pytest.raises(TercetError, match="larger than 0 GiB, which is no image"):
        read_image(str(tmp_path / "larger.jpg"))
