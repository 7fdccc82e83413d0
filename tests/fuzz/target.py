"""What a reader of foreign files is tried on, and the small files that several of them read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PIXEL_LIMIT = 1_000_000


@dataclass(frozen=True)
class Target:
    """A reader and what it reads.

    Attributes:
        file: name of the file that is mutated.
        seeds: valid contents of it.
        read: reads everything that the folder holds, to the last row and pixel.
        beside: the other files of the folder.
        names: what an error must name; default the file.
    """

    file: str
    seeds: Sequence[bytes]
    read: Callable[[Path], object]
    beside: dict[str, bytes] = field(default_factory=dict)
    names: str | None = None

    def put(self, folder: Path) -> Path:
        """Write what lies beside the file, and return its path."""
        for name, content in self.beside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def picture_bytes(kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """A small picture of 12 x 10 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    image = Image.fromarray(noise).convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (10, 12)).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


JPEG = picture_bytes()
BESIDE = {"1.jpg": JPEG, "2.jpg": JPEG}


def as_json(value: object) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(value).encode()


def as_lines(values: Sequence[object]) -> bytes:
    """A JSON value on each line."""
    return b"".join(as_json(value) + b"\n" for value in values)
