"""Image-caption pairs wherever they lie: annotation files, folders, tar shards, Parquet and Arrow tables, drawn scenes.

`open_sources` reads the captions and the places of the images once; image bytes are read when they are asked for.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np

from tercet.config import DataConfig
from tercet.data.annotations import ANNOTATION_SUFFIXES, read_pairs
from tercet.data.rows import Pairs, Problems
from tercet.data.shard_source import SEQUENTIAL_BLOCK, open_shards
from tercet.data.storage import FileImages, is_file, is_url, missing
from tercet.errors import TercetError

TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".feather"})
HELD_OUT_SCENES = 500
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_FILES = 1_000_000
LONGEST_NUMBER = 12  # digits
RANGE = re.compile(r"(\d+)\.\.(\d+)")


@runtime_checkable
class Source(Protocol):
    """Images with captions, by index.  Instances are read from several processes, and pickle."""

    @property
    def image_count(self) -> int:
        """How many images there are."""
        ...

    @property
    def caption_counts(self) -> np.ndarray:
        """Integers [images]: captions of each image, at least 1."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """Messages of the rows that were refused, each naming its file and row."""
        ...

    def image(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        ...

    def captions(self, index: int) -> list[str]:
        """The captions of image `index` as they were written."""
        ...

    def key(self, index: int) -> str:
        """What names image `index` in messages."""
        ...


class ImageReader(Protocol):
    """Image bytes by index."""

    def read(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        ...


class PairSource:
    """A source whose captions lie in memory, packed, and whose images `images` reads.

    Attributes:
        images: reads them.
        image_ids: int64 [images]; equal for images that the file gives the same `image_id`.
        block_size: how many neighbouring images are best read about the same time; 1: any order is as good.
    """

    def __init__(self, pairs: Pairs, images: ImageReader, problems: Sequence[str], block_size: int = 1) -> None:
        self._pairs = pairs
        self.images = images
        self.problems = problems
        self.image_ids = pairs.image_ids
        self.block_size = block_size

    @property
    def image_count(self) -> int:
        """How many images there are."""
        return len(self._pairs.keys)

    @property
    def caption_counts(self) -> np.ndarray:
        """int64 [images]: captions of each image."""
        return np.diff(self._pairs.first_caption)

    def image(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        return self.images.read(index)

    def captions(self, index: int) -> list[str]:
        """The captions of image `index` as they were written."""
        first, end = self._pairs.first_caption[index : index + 2]
        return [self._pairs.captions[row] for row in range(first, end)]

    def key(self, index: int) -> str:
        """The image's path, or `shard.tar#KEY`."""
        return self._pairs.keys[index]


class JoinedSource:
    """Several sources one after the other, seen as one."""

    def __init__(self, parts: Sequence[Source]) -> None:
        if not parts:
            raise TercetError("no data given; name a file, a folder, a glob of tar shards, or 'scenes'")
        self.parts = list(parts)
        self._starts = np.concatenate([[0], np.cumsum([part.image_count for part in parts])]).astype(np.int64)
        self.caption_counts = np.concatenate([np.asarray(part.caption_counts, np.int64) for part in parts])
        self.image_ids = np.concatenate(
            [image_ids(part) + start for part, start in zip(parts, self._starts[:-1], strict=True)]
        )
        self.block_size = max(block_size(part) for part in parts)
        self.problems = Problems()
        for part in parts:
            self.problems.extend(part.problems)

    @property
    def image_count(self) -> int:
        """How many images there are."""
        return int(self._starts[-1])

    def image(self, index: int) -> bytes:
        """The encoded image.  Raises OSError or TercetError when it cannot be read."""
        part, local = self.find(index)
        return part.image(local)

    def captions(self, index: int) -> list[str]:
        """The captions of image `index` as they were written."""
        part, local = self.find(index)
        return part.captions(local)

    def key(self, index: int) -> str:
        """What names image `index` in messages."""
        part, local = self.find(index)
        return part.key(local)

    def find(self, index: int) -> tuple[Source, int]:
        """The part that holds image `index`, and its index there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], int(index - self._starts[part])


def image_ids(source: Source) -> np.ndarray:
    """int64 [images]: equal for images that count as the same; each its own where a source tells none."""
    ids = getattr(source, "image_ids", None)
    return np.arange(source.image_count) if ids is None else np.asarray(ids, np.int64)


def image_location(source: Source, index: int) -> str:
    """Where image `index` lies, in a way that holds in any working folder: an absolute path or URL, or its key.

    An annotation file that names it so, and lies anywhere, finds it; those in shards go by `SHARD.tar#KEY`.
    """
    if isinstance(source, JoinedSource):
        source, index = source.find(index)
    images = getattr(source, "images", None)
    if isinstance(images, FileImages):
        location = images.location(index)
        return location if is_url(location) else os.path.abspath(location)  # noqa: PTH100 - links stay as they are
    key = source.key(index)
    file, mark, member = key.partition("#")
    if not mark or is_url(file) or not Path(file).exists():
        return key
    return f"{Path(file).absolute()}#{member}"


def block_size(source: Source) -> int:
    """How many neighbouring images of `source` are best read about the same time."""
    return int(getattr(source, "block_size", 1))


def open_sources(specs: Sequence[str], data: DataConfig, split: str) -> Source:
    """Open what the specifications name, one after the other, as one source.

    A specification is a file, a folder, a glob or braces of files (`shard-{000000..000005}.tar`), a URL that fsspec
    reads, `scenes`, or `scenes:figures` of one figure each.  After '#' it may name a split: `flickr8k.json#test`,
    `coco.json#train+restval`, `x.json#all`.

    Args:
        specs: the specifications.
        data: names of the columns, the root of relative image paths, words that are kept of a caption.
        split: 'train', 'validation' or 'test': which scenes `scenes` draws.

    Raises:
        TercetError: a file is missing or cannot be parsed, or gives no image with a caption.
    """
    if isinstance(specs, str):
        specs = [specs]
    parts = [part for spec in specs for part in _open(spec, data, split)]
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _open(spec: str, data: DataConfig, split: str) -> Iterator[Source]:
    if spec == "scenes" or spec.startswith("scenes:"):
        yield _open_scenes(spec, data, split)
        return
    files, suffix = find_files(spec)
    shards = [file for file in files if _extension(file) == ".tar"]
    if shards:
        yield open_shards(shards, suffix, data, _divide(spec)[0])
    for file in files:
        if file not in shards:
            yield _open_file(file, suffix, data)


def find_files(spec: str) -> tuple[list[str], str | None]:
    """The files that a specification names, and the split after its '#'.

    Raises:
        TercetError: there is none.
    """
    pattern, suffix = _divide(spec)
    return [file for braces in expand_braces(pattern) for file in _matches(braces)], suffix


def _open_file(file: str, suffix: str | None, data: DataConfig) -> Source:
    problems = Problems()
    extension = _extension(file)
    if extension in ANNOTATION_SUFFIXES or (not is_url(file) and Path(file).is_dir()):
        pairs, images = read_pairs(file, suffix, data, problems)
        return PairSource(pairs, images, problems)
    if extension in TABLE_SUFFIXES:
        from tercet.data.tables import read_table

        pairs, images = read_table(file, suffix, data, problems)
        return PairSource(pairs, images, problems, SEQUENTIAL_BLOCK)
    if not is_url(file) and not Path(file).exists():
        raise TercetError(missing(file))
    known = sorted(ANNOTATION_SUFFIXES | TABLE_SUFFIXES | {".tar"})
    raise TercetError(f"{file}: not a kind of file that is known; known are {', '.join(known)}, and folders of images")


def _open_scenes(spec: str, data: DataConfig, split: str) -> Source:
    from tercet.data.scenes import FIGURES, SceneSource

    if spec == f"scenes:{FIGURES}":
        return SceneSource(data.scenes, FIGURES)
    wanted = scene_split(spec, split)
    if wanted == "train":
        return SceneSource(data.scenes, wanted)
    return SceneSource(HELD_OUT_SCENES, wanted, distinct=True)


def scene_split(spec: str, split: str) -> str:
    """The split that `scenes` or `scenes:SPLIT` names; `split` where it names none.

    Raises:
        TercetError: there is no such split.
    """
    wanted = spec.partition(":")[2] or split
    splits = ("train", "validation", "test")
    if wanted not in splits:
        near = difflib.get_close_matches(wanted, splits, 1)
        raise TercetError(f"{spec}: no scenes of split {wanted!r}; write scenes:{near[0] if near else 'test'}")
    return wanted


def _divide(spec: str) -> tuple[str, str | None]:
    """A specification's file and the split after '#', which may also be part of a file's own name."""
    if "#" not in spec or (not is_url(spec) and os.path.exists(spec)):  # noqa: PTH110 - as above
        return spec, None
    file, _, suffix = spec.rpartition("#")
    return (spec, None) if "/" in suffix else (file, suffix)


def expand_braces(pattern: str) -> list[str]:
    """The names that `a-{000..002}.tar` and `{train,test}.json` stand for; zeros in front of a range are kept."""
    expanded = _expand(pattern)
    names = list(itertools.islice(expanded, MOST_FILES + 1))
    if len(names) > MOST_FILES:
        raise TercetError(f"{pattern[:200]}: stands for more than {MOST_FILES:,} files; name fewer")
    return names


def _expand(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    numbers = RANGE.fullmatch(match[1])
    if numbers:
        width = len(numbers[1])
        if max(width, len(numbers[2])) > LONGEST_NUMBER:
            raise TercetError(f"{pattern[:200]}: the range {{{match[1][:60]}}} has too long numbers")
        first, last = int(numbers[1]), int(numbers[2])
        choices = (f"{number:0{width}d}" for number in range(first, last + 1))
        if first > last:
            raise TercetError(f"{pattern}: the range {{{match[1]}}} is empty; write the smaller number first")
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand(pattern[: match.start()] + choice + pattern[match.end() :])


def _matches(pattern: str) -> list[str]:
    """Files that a pattern without braces names, sorted; a folder that holds shards or tables stands for these."""
    if is_url(pattern) or is_file(pattern):
        return [pattern]
    if "\0" in pattern:
        raise TercetError(f"no file is named {pattern}: a name holds no null character")
    folder = Path(pattern)
    if os.path.isdir(pattern):  # noqa: PTH112 - Path.is_dir raises on a name that is too long
        for extensions in ({".tar"}, TABLE_SUFFIXES):
            # img2dataset writes 00000.parquet about the images of a folder 00000: that table holds none itself.
            inside = sorted(
                str(file)
                for file in folder.iterdir()
                if _extension(file.name) in extensions and not file.with_suffix("").is_dir()
            )
            if inside:
                return inside
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if found:
        return found
    if glob.has_magic(pattern):
        raise TercetError(f"no file matches {pattern}")
    raise TercetError(missing(pattern))


def _extension(file: str) -> str:
    return PurePosixPath(file).suffix.lower()
