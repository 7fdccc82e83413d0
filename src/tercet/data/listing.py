"""Images alone, wherever they lie: folders, tar shards, tables, annotation files, drawn scenes; captions where given.

`find_images` lists them without reading them; `read_image` reads one by what the listing says of it, in any process.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet.config import DataConfig
from tercet.data.annotations import IMAGE_SUFFIXES
from tercet.data.rows import Problems
from tercet.data.shards import IMAGE_SUFFIXES as MEMBER_SUFFIXES
from tercet.data.shards import Sample, shard_samples
from tercet.data.sources import (
    TABLE_SUFFIXES,
    JoinedSource,
    PairSource,
    Source,
    expand_braces,
    find_files,
    open_sources,
    scene_split,
)
from tercet.data.storage import FileImages, is_url, local_copy, missing, read_bytes, read_range
from tercet.errors import TercetError

SCENES = re.compile(r"scenes:(\w+)#(\d+)")
GLOB_MARKS = re.compile(r"[*?\[]")
_SCENES_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image that was found, not yet read.

    Attributes:
        uri: its path, URL, `SHARD.tar#KEY`, `TABLE.parquet#ROW` or `scenes:SPLIT#NUMBER`.
        caption: the first that is given with it.
        size: bytes; 0 where that is not known before reading.
        modified: microseconds since 1970 at which its file was last changed; 0 where that is not known.
        offset: of its first byte in its file; None when the file is the image.
    """

    uri: str
    caption: str | None = None
    size: int = 0
    modified: int = 0
    offset: int | None = None


def find_images(specs: Sequence[str], problems: Problems) -> Iterator[ListedImage]:
    """The images that specifications name, in order; one that two of them name comes twice.

    A specification is a folder (with the folders in it), an image, a tar shard, a Parquet or Arrow table, a glob or
    braces of these, a URL of one, or whatever `open_sources` reads.

    Args:
        specs: the specifications.
        problems: takes what was left out, such as the end of a shard that was cut short.

    Raises:
        TercetError: a specification names nothing, or names no image.
    """
    for spec in specs:
        found = 0
        for image in _list(spec, problems):
            found += 1
            yield image
        if not found:
            looked_for = ", ".join(sorted(IMAGE_SUFFIXES))
            raise TercetError(f"{spec}: no image found; looked for {looked_for}, tar shards and tables")


def read_image(uri: str, size: int = 0, offset: int | None = None) -> bytes:
    """The bytes of a listed image.

    Raises:
        TercetError: it is not there any more, or its file has become shorter.
    """
    scene = SCENES.fullmatch(uri)
    if scene:
        return _read_scene(scene[1], int(scene[2]))
    if offset is None:
        return read_bytes(uri)
    file = uri.rpartition("#")[0]
    path = _image_column(file) if _suffix(file) in TABLE_SUFFIXES else local_copy(file)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise TercetError(f"cannot read {uri}: {error.strerror}") from error
    try:
        data = read_range(handle, offset, size)
    finally:
        os.close(handle)
    if len(data) < size:
        raise TercetError(f"{file} is shorter than when it was indexed; index it again")
    return data


def lies_under(spec: str) -> re.Pattern[str]:
    """What the URIs of the images that `spec` names, or once named, look like."""
    if spec.startswith("scenes"):
        return re.compile(re.escape(spec if ":" in spec else "scenes:") + ".*")
    file = spec if is_url(spec) or Path(spec).exists() else spec.rpartition("#")[0] or spec
    patterns = []
    for name in expand_braces(file):
        name = name if is_url(name) else os.path.abspath(name)  # noqa: PTH100 - links stay as they are
        end = "/.*" if not is_url(name) and Path(name).is_dir() else "(#.*)?"
        patterns.append(_glob_pattern(name) + end)
    return re.compile("|".join(patterns))


def _list(spec: str, problems: Problems) -> Iterator[ListedImage]:
    if spec == "scenes" or spec.startswith("scenes:"):
        yield from _list_source(_scenes(scene_split(spec, "train")), problems)
        return
    files, suffix = find_files(spec)
    for file in files:
        if suffix not in (None, "all") and _suffix(file) in {".tar", *TABLE_SUFFIXES}:
            raise TercetError(
                f"{spec}: an index takes shards and tables whole, not split {suffix!r}; name the files of that split"
            )
        if not is_url(file):
            file = os.path.abspath(file)  # noqa: PTH100 - links stay as they are
        if not is_url(file) and Path(file).is_dir():
            yield from _list_folder(file)
        elif _suffix(file) in IMAGE_SUFFIXES:
            yield _listed_file(file)
        elif _suffix(file) == ".tar":
            yield from _list_shard(file, problems)
        elif _suffix(file) in TABLE_SUFFIXES:
            yield from _list_table(file, problems)
        else:
            named = file if suffix is None else f"{file}#{suffix}"
            yield from _list_source(open_sources([named], DataConfig(), "train"), problems)


def _list_folder(folder: str) -> Iterator[ListedImage]:
    if not Path(folder).is_dir():
        raise TercetError(missing(folder))
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        present = set(files)
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - called for every file of large folders
            if suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield _listed_file(f"{parent}/{name}", f"{parent}/{stem}.txt" if f"{stem}.txt" in present else None)


def _listed_file(path: str, beside: str | None = None) -> ListedImage:
    caption = None
    if beside is not None:
        caption = _first_line(Path(beside).read_bytes())
    if is_url(path):
        return ListedImage(path, caption)
    try:
        state = Path(path).stat()
    except OSError:  # a link to nowhere; reading it will say so
        return ListedImage(path, caption)
    return ListedImage(path, caption, state.st_size, state.st_mtime_ns // 1000)


def _list_shard(file: str, problems: Problems) -> Iterator[ListedImage]:
    path = local_copy(file)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise TercetError(missing(file) if isinstance(error, FileNotFoundError) else f"cannot read {file}") from error
    try:
        modified = os.fstat(handle).st_mtime_ns // 1000
        samples, cut = shard_samples(handle, path, problems)
        for key, sample in samples.items():
            image = next((sample.parts[suffix] for suffix in MEMBER_SUFFIXES if suffix in sample.parts), None)
            if image is not None:
                yield ListedImage(f"{file}#{key}", _member_caption(handle, sample), image[1], modified, image[0])
        if cut:
            problems.add(f"{file}: {cut}; what followed is lost")
    finally:
        os.close(handle)


def _member_caption(handle: int, sample: Sample) -> str | None:
    """The caption of a sample of a shard; a broken .json or .txt counts as none, since the image needs none."""
    if "json" in sample.parts:
        try:
            value = json.loads(read_range(handle, *sample.parts["json"]))
        except (ValueError, RecursionError):
            value = None
        caption = value.get("caption") if isinstance(value, dict) else None
        caption = caption[0] if isinstance(caption, list) and caption else caption
        if isinstance(caption, str):
            return caption
    return _first_line(read_range(handle, *sample.parts["txt"])) if "txt" in sample.parts else None


def _list_table(file: str, problems: Problems) -> Iterator[ListedImage]:
    from tercet.data.tables import table_images

    try:
        modified = 0 if is_url(file) else Path(file).stat().st_mtime_ns // 1000
    except OSError as error:
        raise TercetError(missing(file)) from error
    for row, image in enumerate(table_images(file, DataConfig())):
        if image is None:
            problems.add(f"{file} row {row + 1}: no image")
        elif isinstance(image.place, str):
            listed = _listed_file(image.place)
            yield ListedImage(listed.uri, image.caption, listed.size, listed.modified)
        else:
            yield ListedImage(f"{file}#{row}", image.caption, image.place[1], modified, image.place[0])


def _list_source(source: Source, problems: Problems) -> Iterator[ListedImage]:
    """Images of a source of pairs that is none of the above: annotation files and scenes."""
    from tercet.data.scenes import SceneSource

    if isinstance(source, JoinedSource):
        for part in source.parts:
            yield from _list_source(part, problems)
        return
    problems.extend(source.problems)
    if isinstance(source, SceneSource):
        for index in range(source.image_count):
            yield ListedImage(f"scenes:{source.split}#{index}", source.captions(index)[0])
        return
    assert isinstance(source, PairSource) and isinstance(source.images, FileImages)
    for index in range(source.image_count):
        listed = _listed_file(source.images.location(index))
        yield ListedImage(listed.uri, source.captions(index)[0], listed.size, listed.modified)


def _first_line(data: bytes) -> str | None:
    lines = data.decode("utf-8-sig", "replace").splitlines()
    return next((line.strip() for line in lines if line.strip()), None)


def _read_scene(split: str, index: int) -> bytes:
    source = _scenes(split)
    if index >= source.image_count:
        raise TercetError(f"no scene {index} in split {split!r}; it has {source.image_count}")
    return source.image(index)


def _scenes(split: str) -> Source:
    # Readers ask from several threads; a cache alone would let each of them lay out the scenes.
    with _SCENES_LOCK:
        return _open_scenes(split)


@functools.cache
def _open_scenes(split: str) -> Source:
    return open_sources([f"scenes:{split}"], DataConfig(), split)


@functools.lru_cache(maxsize=64)
def _image_column(file: str) -> str:
    """The file that holds the image column of a table as byte ranges."""
    from tercet.data.tables import places_file

    return places_file(file, DataConfig())


def _glob_pattern(name: str) -> str:
    """A regular expression of the names that a glob matches; `*` and `?` stay within a folder, `**` does not."""
    if not GLOB_MARKS.search(name):
        return re.escape(name)
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", name)
    kinds = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        kinds.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part)) for part in parts
    )


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()  # noqa: PTH122 - also of URLs
