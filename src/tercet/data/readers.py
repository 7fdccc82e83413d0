"""Pairs of images and captions from any source, as one `SampleTable`.

    annotation files     JSON, JSON lines, COCO's and Karpathy's JSON, CSV, TSV, the token files of Flickr8k and 30k
    folders              images with a .txt of the same name beside them
    tar shards           `shards`
    Parquet and Arrow    `arrow_files`

A specification is a file, a folder, a glob or braces of files (`shard-{000000..000005}.tar`), or a URL that fsspec
reads.  After '#' it may name a split: `flickr8k.json#test`, `coco.json#train+restval`, `x.json#all`.  Only texts and
locations of the images are read here; image bytes are read when they are asked for.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tercet.config import DataConfig
from tercet.data.arrow_files import read_arrow
from tercet.data.builders import PairBuilder, nothing_found
from tercet.data.rows import (
    JSON_ERRORS,
    Rejected,
    SplitFilter,
    broken_json,
    describe_row,
    image_root,
    lines_of,
    list_items,
    parse_line,
    skip_space,
)
from tercet.data.shards import IMAGE_SUFFIXES as MEMBER_SUFFIXES
from tercet.data.shards import open_shards
from tercet.data.storage import is_file, is_url, missing, read_text
from tercet.data.table import SampleTable, concatenate
from tercet.errors import TercetError

IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in MEMBER_SUFFIXES)
UNREADABLE_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".nef", ".psd"})
ANNOTATION_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt"})
TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".feather"})
SYSTEM_FOLDERS = frozenset({"@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"})
SEPARATORS = {".csv": ",\t;|", ".tsv": "\t,;|", ".txt": ",\t;|"}
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_FILES = 1_000_000
LONGEST_NUMBER = 12  # digits


def open_sources(
    specs: Sequence[str], data: DataConfig, split: str = "train", need_captions: bool = True
) -> SampleTable:
    """Open what the specifications name, one after the other, as one table.

    Args:
        specs: the specifications.
        data: names of the columns, the root of relative image paths, words that are kept of a caption.
        split: not used by pairs; every task opens its data by (specs, data, split).
        need_captions: reject images without a caption; else folders, shards and Parquet files give them without texts.

    Raises:
        TercetError: a file is missing or cannot be parsed, or gives no image with a caption.
    """
    specs = [specs] if isinstance(specs, str) else specs
    return concatenate([table for spec in specs for table in _open(spec, data, need_captions)])


ReadFile = Callable[[str, str | None, DataConfig], SampleTable]


def open_samples(specs: Sequence[str], data: DataConfig, read: ReadFile) -> SampleTable:
    """Open the annotation files of a task that the specifications name, one after the other, as one table.

    A mistake in a row of an annotated task is an error and no rejected row: annotations are few, and a wrong label is a
    wrong number in the end.

    Args:
        specs: files, globs or braces of files; after '#' they may name a split.
        data: where images lie.
        read: reads one file: (file, the split after '#', data).

    Raises:
        TercetError: a file is missing or cannot be parsed, a row is wrong, or there is no sample.
    """
    opened = [find_files(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    return concatenate([read(file, suffix, data) for files, suffix in opened for file in files])


def _open(spec: str, data: DataConfig, need_captions: bool) -> Iterator[SampleTable]:
    files, suffix = find_files(spec)
    shards = [file for file in files if suffix_of(file) == ".tar"]
    if shards:
        yield open_shards(shards, suffix, data, _divide(spec)[0], need_captions)
    for file in files:
        extension = suffix_of(file)
        if extension == ".tar":
            continue
        if not is_url(file) and Path(file).is_dir():
            yield _read_rows(file, suffix, data, need_captions)
        elif extension in ANNOTATION_SUFFIXES:
            yield _read_rows(file, suffix, data)
        elif extension in TABLE_SUFFIXES:
            yield read_arrow(file, suffix, data, need_captions)
        elif not is_url(file) and not Path(file).exists():
            raise TercetError(missing(file))
        else:
            known = ", ".join(sorted(ANNOTATION_SUFFIXES | TABLE_SUFFIXES | {".tar"}))
            raise TercetError(f"{file}: not a kind of file that is known; known are {known}, and folders of images")


def find_files(spec: str) -> tuple[list[str], str | None]:
    """The files that a specification names, and the split after its '#'.

    Raises:
        TercetError: there is none.
    """
    pattern, suffix = _divide(spec)
    return [file for name in expand_braces(pattern) for file in _matches(name)], suffix


def _divide(spec: str) -> tuple[str, str | None]:
    """A specification's file and the split after '#', which may also be part of a file's own name."""
    if "#" not in spec or (not is_url(spec) and os.path.exists(spec)):  # noqa: PTH110 - Path.exists raises on long names
        return spec, None
    file, _, suffix = spec.rpartition("#")
    return (spec, None) if "/" in suffix else (file, suffix)


def expand_braces(pattern: str) -> list[str]:
    """The names that `a-{000..002}.tar` and `{train,test}.json` stand for; zeros in front of a range are kept."""
    names = list(itertools.islice(_expand(pattern), MOST_FILES + 1))
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
                if suffix_of(file.name) in extensions and not file.with_suffix("").is_dir()
            )
            if inside:
                return inside
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if found:
        return found
    raise TercetError(f"no file matches {pattern}" if glob.has_magic(pattern) else missing(pattern))


def suffix_of(file: str) -> str:
    """The suffix of a path or URL in small letters."""
    return PurePosixPath(file).suffix.lower()


@dataclass(slots=True)
class Row:
    """One row of an annotation file, not yet checked; `fault` says why it has no image name."""

    where: str
    image: str = ""
    captions: object = None
    image_id: object = None
    split: object = None
    fault: str | None = None


def _read_rows(file: str, suffix: str | None, data: DataConfig, need_captions: bool = True) -> SampleTable:
    """The pairs of an annotation file or a folder."""
    names = None
    if file.endswith(".txt") and suffix and suffix.endswith(".txt"):  # a token file and the list of names to take
        names = {line.strip() for line in read_text(str(Path(file).parent / suffix)).splitlines()}
        suffix = None
    folder = not is_url(file) and Path(file).is_dir()
    chosen = SplitFilter(suffix)
    builder = PairBuilder(Rejected(), data.max_words)
    for row in _folder_rows(Path(file), need_captions) if folder else _file_rows(file, data):
        if row.fault is not None:
            builder.rejected.add(row.fault)
        if row.image and (names is None or row.image in names) and chosen.accepts(row.split):
            if row.captions is None and not need_captions:
                builder.append(row.image, [], row.image_id)
            elif row.fault is None:
                builder.add(row.where, row.image, row.captions, row.image_id)
    chosen.check(file)
    if not len(builder):
        rows = f"rows with {data.image_column!r} and {data.caption_column!r}"
        raise nothing_found(file, _looked_for(file) if folder else rows, builder.rejected, need_captions)
    return builder.finish().in_files(file, file if folder else image_root(file, data), builder.rejected)


def _looked_for(folder: str) -> str:
    """What a folder should hold, and where below it shards lie, which are read from their own folder alone."""
    shard = next(Path(folder).rglob("*.tar"), None)
    shards = f" (shards lie in {shard.parent}: name that folder)" if shard else ""
    return f"images with a .txt file of the same name beside them{shards}"


def _file_rows(file: str, data: DataConfig) -> Iterator[Row]:
    suffix, text = suffix_of(file), read_text(file)
    if suffix == ".json":
        return _json_rows(file, text, data)
    if suffix in (".jsonl", ".ndjson"):
        return _json_line_rows(file, text, data)
    separator = find_separator(text, SEPARATORS[suffix], data)
    if separator is None and suffix == ".txt":
        return _token_rows(file, text)
    return _csv_rows(file, text, separator or SEPARATORS[suffix][0], data)


def _json_rows(file: str, text: str, data: DataConfig) -> Iterator[Row]:
    """A list of objects, one at a time so that only the text and one row are in memory; or an object with `images`."""
    start = skip_space(text, 0)
    if text[start : start + 1] == "[":
        for number, value in enumerate(list_items(file, text, start + 1), 1):
            yield _object_row(value, f"{file} row {number}", data)
        return
    try:
        value = json.loads(text)
    except JSON_ERRORS as error:
        many = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and "\n" in text[start : error.pos]
        if not many:
            raise broken_json(file, text, error) from error
        yield from _json_line_rows(file, text, data)
        return
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise TercetError(f"{file}: neither a list of objects nor an object with a list of 'images'")
    if isinstance(value.get("annotations"), list):
        yield from _coco_rows(file, value["images"], value["annotations"])
    else:
        yield from _karpathy_rows(file, value["images"])


def _object_row(value: Any, where: str, data: DataConfig) -> Row:
    image = value.get(data.image_column) if isinstance(value, dict) else None
    if not isinstance(image, str) or not image:
        return Row(where, fault=describe_row(value, data.image_column, where))
    if data.caption_column not in value:
        return Row(where, fault=describe_row(value, data.caption_column, where))
    return Row(where, image, value[data.caption_column], value.get("image_id"), value.get("split"))


def _json_line_rows(file: str, text: str, data: DataConfig) -> Iterator[Row]:
    for where, line in lines_of(file, text):
        try:
            yield _object_row(parse_line(line, where), where, data)
        except TercetError as error:
            yield Row(where, fault=str(error))


def _karpathy_rows(file: str, images: list[Any]) -> Iterator[Row]:
    """Karpathy's split files: {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}."""
    for number, image in enumerate(images, 1):
        where = f"{file} image {number}"
        name = image.get("filename") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            yield Row(where, fault=describe_row(image, "filename", where))
            continue
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            yield Row(where, fault=f"{where}: no list of 'sentences'")
            continue
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
        path = str(PurePosixPath(str(image["filepath"])) / name) if image.get("filepath") else name
        yield Row(where, path, captions, image.get("cocoid", image.get("imgid")), image.get("split"))


def _coco_rows(file: str, images: list[Any], annotations: list[Any]) -> Iterator[Row]:
    """COCO's caption files: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    captions: dict[object, list[object]] = {}
    for number, annotation in enumerate(annotations, 1):
        if not isinstance(annotation, dict) or "caption" not in annotation:
            where = f"{file} annotation {number}"
            yield Row(where, fault=describe_row(annotation, "caption", where))
        else:
            captions.setdefault(_hashable(annotation.get("image_id")), []).append(annotation["caption"])
    for number, image in enumerate(images, 1):
        where = f"{file} image {number}"
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            yield Row(where, fault=describe_row(image, "file_name", where))
        else:
            yield Row(where, name, captions.get(_hashable(image.get("id")), []), image.get("id"))


def _hashable(value: object) -> object:
    """An image's number or name; a list or an object, which is neither, as its text."""
    return repr(value) if isinstance(value, list | dict) else value


def find_separator(text: str, separators: str, data: DataConfig) -> str | None:
    """The separator by which the first line names the columns of images and captions; None when there is none."""
    header = text[: text.find("\n") if "\n" in text else len(text)]
    wanted = {data.image_column, data.caption_column}
    return next((mark for mark in separators if wanted <= {cell.strip(' "\r') for cell in header.split(mark)}), None)


def _csv_rows(file: str, text: str, separator: str, data: DataConfig) -> Iterator[Row]:
    """Rows under a line of column names; `image_id` and `split` are read when they exist.

    Python's reader, not pyarrow's, which cannot say on which line a row stands once a cell holds a line break.  Quotes
    quote between commas and semicolons; between tabs and bars they are characters, as in Conceptual Captions.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    quoting = csv.QUOTE_MINIMAL if separator in ",;" else csv.QUOTE_NONE
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, skipinitialspace=True, strict=True
    )
    try:
        header = [cell.strip() for cell in next(reader, ())]
        if not header:
            raise TercetError(f"{file}: empty; its first line must name the columns")
        for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
            if column not in header:
                there = ", ".join(max((text.splitlines()[0].split(mark) for mark in ",\t;|"), key=len))
                raise TercetError(f"{file}: no column {column!r}; set data.{key} to one of those there: {there}")
        image, caption = header.index(data.image_column), header.index(data.caption_column)
        others = [header.index(name) if name in header else None for name in ("image_id", "split")]
        for cells in reader:
            where = f"{file} line {reader.line_num}"
            if not cells:
                continue
            if len(cells) > len(header) == caption + 1:  # commas in an unquoted caption, as in Flickr8k's captions.txt
                cells[caption:] = [f"{separator} ".join(cells[caption:])]
            if len(cells) != len(header):
                yield Row(where, fault=f"{where}: {len(cells)} cells where the header names {len(header)} columns")
            elif not cells[image]:
                yield Row(where, fault=f"{where}: {data.image_column!r} is empty")
            else:
                image_id, split = (None if index is None else cells[index] or None for index in others)
                yield Row(where, cells[image], cells[caption], image_id, split)
    except csv.Error as error:
        raise TercetError(f"{file} line {reader.line_num}: {error}; a quote may be left open") from error


def _token_rows(file: str, text: str) -> Iterator[Row]:
    """The token file of Flickr8k and Flickr30k: lines of `NAME.jpg#0<TAB>caption`."""
    for where, line in lines_of(file, text):
        name, tab, caption = line.rstrip("\r\n").partition("\t")
        if tab:
            yield Row(where, name.rsplit("#", 1)[0], caption)
        else:
            yield Row(where, fault=f"{where}: not an image name, a tab and a caption")


def _folder_rows(folder: Path, need_captions: bool) -> Iterator[Row]:
    """Images below `folder` in the order of their names, each with the lines of the .txt beside it.

    Hidden files and folders, and the folders in which systems keep thumbnails and waste, are skipped.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SYSTEM_FOLDERS)
        present = set(files)
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - called for every file of large folders
            where, captions, fault = f"{parent}/{name}", None, None
            if name.startswith("."):
                continue
            if suffix.lower() in UNREADABLE_SUFFIXES:
                yield Row(where, fault=f"{where}: {suffix} images cannot be read; convert it to JPEG or PNG")
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if f"{stem}.txt" in present:
                captions, fault = _captions_beside(parent, stem, where)
            elif need_captions:
                fault = f"{where}: no caption; looked for {stem}.txt beside it"
            image = "" if fault and need_captions else os.path.relpath(where, folder)
            yield Row(where, image, captions, fault=fault)


def _captions_beside(parent: str, stem: str, where: str) -> tuple[list[str] | None, str | None]:
    """The lines of an image's .txt, or what is wrong with it."""
    try:
        lines = [line for line in read_text(f"{parent}/{stem}.txt").splitlines() if line.strip()]
    except TercetError as error:
        return None, str(error)
    return (lines, None) if lines else (None, f"{where}: {stem}.txt holds no caption")
