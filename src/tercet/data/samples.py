"""Samples of the downstream tasks: one or more images, a text, and what is to be learned of them.

`open_samples` reads what the specifications name, by the reader of the task's own formats or from drawn scenes.  A
mistake in a row of an annotated task is an error and not a row left out: annotations are few and dear, and a wrong
label is a wrong number in the end.  Images are read when they are asked for; broken ones are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tercet.config import DataConfig
from tercet.data.images import decode
from tercet.data.json_rows import image_root
from tercet.data.packed import PackedStrings, StringPacker, encode
from tercet.data.rows import Problems
from tercet.data.sources import HELD_OUT_SCENES, find_files, scene_split
from tercet.data.storage import FileImages
from tercet.errors import TercetError


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Attributes:
        images: indices of its images in its source; equally many for all samples of a source.
        text: the sentence or question as it was written.
        target: what the task learns or is measured by: plain values, as JSON has them.
        key: names the sample in messages: file and row.
    """

    images: tuple[int, ...]
    text: str
    target: Any
    key: str


class SampleSource(Protocol):
    """Samples over a set of images.  Instances are read from several processes, and pickle."""

    @property
    def image_count(self) -> int:
        """How many images there are."""
        ...

    @property
    def sample_count(self) -> int:
        """How many samples there are."""
        ...

    @property
    def images_per_sample(self) -> int:
        """How many images every sample has."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """Messages of the rows that were left out, each naming its file and row."""
        ...

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        ...

    def image(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        ...

    def pixels(self, index: int, pixel_limit: int) -> np.ndarray:
        """Image `index` decoded: uint8 [height, width, 3].  Raises OSError or TercetError when it cannot be read."""
        ...

    def key(self, index: int) -> str:
        """What names image `index` in messages."""
        ...


class Drawings(Protocol):
    """Images that are drawn when they are asked for, such as scenes."""

    @property
    def image_count(self) -> int:
        """How many images there are."""
        ...

    def array(self, index: int) -> np.ndarray:
        """Image `index`: uint8 [height, width, 3]."""
        ...

    def image(self, index: int) -> bytes:
        """The encoded image."""
        ...

    def key(self, index: int) -> str:
        """What names image `index` in messages."""
        ...


class SampleTable:
    """Samples held compactly, over images that lie in files or are drawn.

    Args:
        images: the images.
        rows: int64 [samples, images_per_sample]; which images a sample has.
        texts: [samples].
        targets: JSON of each target [samples].
        keys: [samples].
        problems: why rows were left out.
    """

    def __init__(
        self,
        images: FileImages | Drawings,
        rows: np.ndarray,
        texts: PackedStrings,
        targets: PackedStrings,
        keys: PackedStrings,
        problems: Sequence[str] = (),
    ) -> None:
        self.problems = problems
        self._images = images
        self._rows = rows
        self._texts = texts
        self._targets = targets
        self._keys = keys

    @property
    def image_count(self) -> int:
        """How many images there are."""
        return len(self._images.names) if isinstance(self._images, FileImages) else self._images.image_count

    @property
    def sample_count(self) -> int:
        """How many samples there are."""
        return len(self._rows)

    @property
    def images_per_sample(self) -> int:
        """How many images every sample has."""
        return self._rows.shape[1]

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        images = tuple(self._rows[index].tolist())
        return Sample(images, self._texts[index], json.loads(self._targets.raw(index)), self._keys[index])

    def image(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        return self._images.read(index) if isinstance(self._images, FileImages) else self._images.image(index)

    def pixels(self, index: int, pixel_limit: int) -> np.ndarray:
        """Image `index` decoded: uint8 [height, width, 3].  Raises OSError or TercetError when it cannot be read."""
        if not isinstance(self._images, FileImages):  # drawn: no need to encode it first
            return self._images.array(index)
        return decode(self._images.read(index), self.key(index), pixel_limit)

    def key(self, index: int) -> str:
        """What names image `index` in messages: its path."""
        return self._images.names[index] if isinstance(self._images, FileImages) else self._images.key(index)


class JoinedSamples:
    """Several sources of samples one after the other, seen as one."""

    def __init__(self, parts: Sequence[SampleSource]) -> None:
        """Join `parts`.

        Raises:
            TercetError: there are none.
        """
        if not parts:
            raise TercetError("no data given; name an annotation file of the task, or 'scenes'")
        self.parts = list(parts)
        self.problems = Problems()
        for part in parts:
            self.problems.extend(part.problems)
        self._first_image = _starts([part.image_count for part in parts])
        self._first_sample = _starts([part.sample_count for part in parts])

    @property
    def image_count(self) -> int:
        """How many images there are."""
        return int(self._first_image[-1])

    @property
    def sample_count(self) -> int:
        """How many samples there are."""
        return int(self._first_sample[-1])

    @property
    def images_per_sample(self) -> int:
        """How many images every sample has."""
        return self.parts[0].images_per_sample

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        part, local = _find(self._first_sample, index)
        found, first = self.parts[part].sample(local), int(self._first_image[part])
        return Sample(tuple(first + image for image in found.images), found.text, found.target, found.key)

    def image(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        part, local = _find(self._first_image, index)
        return self.parts[part].image(local)

    def pixels(self, index: int, pixel_limit: int) -> np.ndarray:
        """Image `index` decoded: uint8 [height, width, 3].  Raises OSError or TercetError when it cannot be read."""
        part, local = _find(self._first_image, index)
        return self.parts[part].pixels(local, pixel_limit)

    def key(self, index: int) -> str:
        """What names image `index` in messages."""
        part, local = _find(self._first_image, index)
        return self.parts[part].key(local)


class SampleCollector:
    """Takes samples one by one and packs them; images that several samples name are held once."""

    def __init__(self, problems: Problems | None = None) -> None:
        self.problems = Problems() if problems is None else problems
        self._rows: list[list[int]] = []
        self._texts = StringPacker()
        self._targets = StringPacker()
        self._keys = StringPacker()
        self._names = StringPacker()
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: str, images: Sequence[str | int], text: str, target: object) -> None:
        """Take one sample.

        Args:
            key: names it in messages: file and row.
            images: names of its images in files, or their numbers among drawn ones.
            text: its sentence or question.
            target: plain values, as JSON has them.
        """
        self._rows.append([image if isinstance(image, int) else self._place(image) for image in images])
        self._texts.add(text)
        self._targets.add(json.dumps(target))
        self._keys.add(key)

    def finish(self, file: str, data: DataConfig) -> SampleTable:
        """The samples, over images below `data.image_root` or else the folder of `file`.

        Raises:
            TercetError: there are none, or none of a few images is there.
        """
        if not self._rows:
            why = f"; {len(self.problems)} left out, the first: {self.problems[0]}" if self.problems else ""
            raise TercetError(f"{file}: no samples in it{why}")
        images = FileImages(image_root(file, data), self._names.pack())
        images.require_some(file)
        return self._table(images)

    def finish_drawn(self, drawings: Drawings) -> SampleTable:
        """The samples, over images that are drawn."""
        return self._table(drawings)

    def _place(self, name: str) -> int:
        place = self._places.setdefault(name, len(self._places))
        if place == len(self._names):
            self._names.add(encode(name))
        return place

    def _table(self, images: FileImages | Drawings) -> SampleTable:
        rows = np.array(self._rows, np.int64)
        return SampleTable(images, rows, self._texts.pack(), self._targets.pack(), self._keys.pack(), self.problems)


ReadFile = Callable[[str, str | None, DataConfig], SampleSource]
DrawSamples = Callable[[int, str], SampleSource]


def open_samples(
    specs: Sequence[str],
    data: DataConfig,
    split: str,
    read: ReadFile,
    draw: DrawSamples | None = None,
    selections: Mapping[str, DrawSamples] | None = None,
) -> SampleSource:
    """Open what the specifications name, one after the other, as one source.

    A specification is a file, a glob or braces of files, or `scenes`; after '#' it may name a split.

    Args:
        specs: the specifications.
        data: where images lie; how many scenes are drawn for training.
        split: 'train', 'validation' or 'test': which scenes `scenes` draws.
        read: reads one file: (file, the split after '#', data) to samples.
        draw: makes samples of drawn scenes: (scenes, split) to samples; None where scenes have none.
        selections: by the word after `scenes:`, what else makes samples of the scenes of `split`.

    Raises:
        TercetError: a file is missing or cannot be parsed, a row is wrong, or there is no sample.
    """
    parts: list[SampleSource] = []
    for spec in [specs] if isinstance(specs, str) else specs:
        if spec == "scenes" or spec.startswith("scenes:"):
            if draw is None:
                raise TercetError(f"{spec}: drawn scenes have no samples of this task; name an annotation file")
            name = spec.partition(":")[2]
            selected = (selections or {}).get(name)
            wanted = split if selected else scene_split(spec, split)
            parts.append((selected or draw)(data.scenes if wanted == "train" else HELD_OUT_SCENES, wanted))
            continue
        files, suffix = find_files(spec)
        parts += [read(file, suffix, data) for file in files]
    return parts[0] if len(parts) == 1 else JoinedSamples(parts)


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _find(starts: np.ndarray, index: int) -> tuple[int, int]:
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, int(index - starts[part])
