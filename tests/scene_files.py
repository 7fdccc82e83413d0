"""Some synthetic scenes as files, written once into a temporary folder: quick data for the tests."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import cv2

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
