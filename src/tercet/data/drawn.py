"""Synthetic scenes as sources, until they are written as files like any other data."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.config import DataConfig
from tercet.data import readers
from tercet.data.table import TEXTS, FilePart, SampleTable, concatenate
from tercet.errors import TercetError

HELD_OUT_SCENES = 500


class DrawnPart(FilePart):
    """Images that are drawn when they are asked for."""

    def __init__(self, drawings: Any, rows: np.ndarray | None = None) -> None:
        count = drawings.image_count if rows is None else len(rows)
        self.drawings, self.rows = drawings, np.arange(count) if rows is None else rows
        texts = [drawings.captions(int(row)) if hasattr(drawings, "captions") else [] for row in self.rows]
        names = pa.array([drawings.key(int(row)).encode() for row in self.rows], pa.large_binary())
        super().__init__(".", pa.RecordBatch.from_arrays([names, pa.array(texts, TEXTS)], ["name", "texts"]))

    def read(self, row: int) -> bytes:
        """The image as PNG."""
        return self.drawings.image(int(self.rows[row]))

    def location(self, row: int) -> str:
        """The scene's name."""
        return self.key(row)

    def select(self, rows: np.ndarray) -> DrawnPart:
        """Some of the scenes."""
        return DrawnPart(self.drawings, self.rows[rows])

    def require_some(self, file: str) -> None:
        """Nothing can be missing."""


def drawn_table(drawings: Any) -> SampleTable:
    """A table of drawn images."""
    return SampleTable([DrawnPart(drawings)])


def open_scenes(spec: str, data: DataConfig, split: str) -> SampleTable:
    """The scenes that `scenes` or `scenes:SPLIT` names."""
    from tercet.data.scenes import FIGURES, SceneSource

    if spec == f"scenes:{FIGURES}":
        return drawn_table(SceneSource(data.scenes, FIGURES))
    wanted = scene_split(spec, split)
    if wanted == "train":
        return drawn_table(SceneSource(data.scenes, wanted))
    return drawn_table(SceneSource(HELD_OUT_SCENES, wanted, distinct=True))


def scene_split(spec: str, split: str) -> str:
    """The split that `scenes` or `scenes:SPLIT` names; `split` where it names none."""
    wanted = spec.partition(":")[2] or split
    splits = ("train", "validation", "test")
    if wanted not in splits:
        near = difflib.get_close_matches(wanted, splits, 1)
        raise TercetError(f"{spec}: no scenes of split {wanted!r}; write scenes:{near[0] if near else 'test'}")
    return wanted


DrawSamples = Callable[[int, str], SampleTable]


def open_samples(
    specs: Sequence[str],
    data: DataConfig,
    split: str,
    read: readers.ReadFile,
    draw: DrawSamples | None = None,
    selections: Mapping[str, DrawSamples] | None = None,
) -> SampleTable:
    """As `readers.open_samples`, and `scenes`."""
    parts: list[SampleTable] = []
    for spec in [specs] if isinstance(specs, str) else specs:
        if spec == "scenes" or spec.startswith("scenes:"):
            if draw is None:
                raise TercetError(f"{spec}: drawn scenes have no samples of this task; name an annotation file")
            selected = (selections or {}).get(spec.partition(":")[2])
            wanted = split if selected else scene_split(spec, split)
            parts.append((selected or draw)(data.scenes if wanted == "train" else HELD_OUT_SCENES, wanted))
        else:
            parts.append(readers.open_samples([spec], data, read))
    return concatenate(parts)


@functools.cache
def _scenes_of(split: str) -> SampleTable:
    return open_scenes(f"scenes:{split}", DataConfig(), split)


def read_scene(split: str, index: int) -> bytes:
    """The PNG of a scene that an index holds."""
    source = _scenes_of(split)
    if index >= source.image_count:
        raise TercetError(f"no scene {index} in split {split!r}; it has {source.image_count}")
    return source.image(index)
