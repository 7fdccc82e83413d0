"""Files that several tests read: synthetic scenes, written once into a temporary folder, and small images and rows."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tercet.data.scene_files import DEMO, write_pairs, write_task
from tercet.data.scenes import Scene

COUNT = 40  # scenes of every split
FOLDER = "TERCET_TEST_SCENES"


def scene_folder(count: int = COUNT) -> Path:
    """The folder that `scene_file` writes `count` scenes of every split into; processes share their parent's."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="tercet-scenes-")
        atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
    return Path(os.environ[FOLDER], str(count))


@functools.cache
def scene_file(name: str, count: int = COUNT) -> str:
    """Path of some scenes, with images and annotations.

    Args:
        name: 'train', 'validation', 'test' or 'shapes' for a shard of pairs; for annotations of a task 'vqa-first',
            'vqa-referred', 'vqa', 'entailment', 'nlvr-first', 'nlvr' or 'grounding', and 'vqa-test' and the like.
        count: how many scenes.
    """
    folder = scene_folder(count)
    if name in DEMO:
        write_pairs(folder, name, count)
        return str(folder / f"{name}-000000.tar")
    file = folder / f"{name}.jsonl"
    if not file.exists():
        write_task(folder, name.partition("-")[0], count)
    return str(file)


def png_of(scene: Scene) -> bytes:
    """A scene's picture, to the last bit."""
    done, data = cv2.imencode(".png", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR))
    assert done
    return data.tobytes()


def write_image(path: Path, shade: int = 90) -> None:
    """A picture of one grey, 30 pixels wide and 20 high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((20, 30, 3), shade, np.uint8))


def write_rows(path: Path, rows: Any, lines: bool = False) -> str:
    """Rows as JSON, or as JSON lines; returns the path."""
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text, "utf-8")
    return str(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
