"""Readers of annotation files that name images by path, and of folders with sidecar captions.

Each reader turns its format into rows; `read_pairs` checks them and makes the source.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tercet.config import DataConfig
from tercet.data.json_rows import image_root
from tercet.data.json_text import JSON_ERRORS, broken_json, line_fault, list_items, skip_space
from tercet.data.packed import StringPacker, encode
from tercet.data.rows import PairCollector, Pairs, Problems, SplitFilter, described, require_pairs
from tercet.data.storage import FileImages, is_url, missing, read_text
from tercet.errors import TercetError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ANNOTATION_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt"})


@dataclass(slots=True)
class Row:
    """One row of an annotation file, not yet checked; `fault` says why it has no image name."""

    where: str
    image: str
    captions: object
    image_id: object = None
    split: object = None
    fault: str | None = None


def read_pairs(file: str, suffix: str | None, data: DataConfig, problems: Problems) -> tuple[Pairs, FileImages]:
    """The pairs that an annotation file or a folder holds, and where their images lie.

    Args:
        file: path or URL of a .json, .jsonl, .csv, .tsv or token .txt file, or a folder.
        suffix: the split after '#' in the specification; for a token file, the list of names beside it.

    Raises:
        TercetError: the file cannot be read or parsed, or gives no pair.
    """
    names, folder = None, Path(file).is_dir() if not is_url(file) else False
    if file.endswith(".txt") and suffix and suffix.endswith(".txt"):
        names = {line.strip() for line in read_text(str(Path(file).parent / suffix)).splitlines()}
        suffix = None
    chosen = SplitFilter(suffix)
    collector = PairCollector(problems, data.max_words)
    paths = StringPacker()
    for row in _folder_rows(Path(file), problems) if folder else _file_rows(file, data):
        if row.fault is not None:
            problems.add(row.fault)
        elif (
            (names is None or row.image in names)
            and chosen.accepts(row.split)
            and collector.add(row.where, row.image, row.captions, row.image_id)
        ):
            paths.add(encode(row.image))
    chosen.check(file)
    if not len(collector):
        require_pairs(collector, file, _folder_wants(file) if folder else _rows_want(data))
    pairs = collector.finish()
    images = FileImages(file if folder else image_root(file, data), paths.pack().take(pairs.rows))
    images.require_some(file)
    return pairs, images


def _rows_want(data: DataConfig) -> str:
    return f"rows with {data.image_column!r} and {data.caption_column!r}"


def _folder_wants(folder: str) -> str:
    """What a folder should hold, and where below it shards lie, which are read from their own folder alone."""
    shard = next(Path(folder).rglob("*.tar"), None)
    shards = f" (shards lie in {shard.parent}: name that folder)" if shard else ""
    return f"images with a .txt file of the same name beside them{shards}"


def _file_rows(file: str, data: DataConfig) -> Iterator[Row]:
    suffix = PurePosixPath(file).suffix.lower()
    if suffix == ".json":
        return _json_rows(file, data)
    if suffix in (".jsonl", ".ndjson"):
        return _json_line_rows(file, read_text(file), data)
    if suffix in (".csv", ".tsv"):
        return _table_rows(file, "," if suffix == ".csv" else "\t", data)
    return _token_rows(file)


def _json_rows(file: str, data: DataConfig) -> Iterator[Row]:
    """A list of objects, one at a time so that only the text and one row are in memory; or an object with `images`."""
    text = read_text(file)
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
        return Row(where, "", None, fault=described(value, data.image_column, where))
    if data.caption_column not in value:
        return Row(where, "", None, fault=described(value, data.caption_column, where))
    return Row(where, image, value[data.caption_column], value.get("image_id"), value.get("split"))


def _json_line_rows(file: str, text: str, data: DataConfig) -> Iterator[Row]:
    # Split at newlines alone: str.splitlines would cut a caption at U+2028, which JSON allows inside a string.
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        where = f"{file} line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except JSON_ERRORS as error:
            yield Row(where, "", None, fault=f"{where}: {line_fault(line, error)}")
            continue
        yield _object_row(value, where, data)


def _karpathy_rows(file: str, images: list[Any]) -> Iterator[Row]:
    """Karpathy's split files: {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}."""
    for number, image in enumerate(images, 1):
        where = f"{file} image {number}"
        name = image.get("filename") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            yield Row(where, "", None, fault=described(image, "filename", where))
            continue
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            yield Row(where, "", None, fault=f"{where}: no list of 'sentences'")
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
            yield Row(where, "", None, fault=described(annotation, "caption", where))
        else:
            captions.setdefault(_hashable(annotation.get("image_id")), []).append(annotation["caption"])
    for number, image in enumerate(images, 1):
        where = f"{file} image {number}"
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            yield Row(where, "", None, fault=described(image, "file_name", where))
        else:
            yield Row(where, name, captions.get(_hashable(image.get("id")), []), image.get("id"))


def _hashable(value: object) -> object:
    """An image's number or name; a list or an object, which is neither, as its text."""
    return repr(value) if isinstance(value, list | dict) else value


def _table_rows(file: str, delimiter: str, data: DataConfig) -> Iterator[Row]:
    """CSV and TSV with a line of column names; `image_id` and `split` are read when they are there."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(read_text(file), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise TercetError(f"{file}: empty; its first line must name the columns")
        for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
            if column not in header:
                there = ", ".join(header)
                raise TercetError(f"{file}: no column {column!r}; set data.{key} to one of those there: {there}")
        image, caption = header.index(data.image_column), header.index(data.caption_column)
        others = [header.index(name) if name in header else None for name in ("image_id", "split")]
        for cells in reader:
            where = f"{file} line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                yield Row(
                    where, "", None, fault=f"{where}: {len(cells)} cells where the header names {len(header)} columns"
                )
            elif not cells[image]:
                yield Row(where, "", None, fault=f"{where}: {data.image_column!r} is empty")
            else:
                image_id, split = (None if index is None else cells[index] or None for index in others)
                yield Row(where, cells[image], cells[caption], image_id, split)
    except csv.Error as error:
        raise TercetError(f"{file} line {reader.line_num}: {error}; a quote may be left open") from error


def _token_rows(file: str) -> Iterator[Row]:
    """The token file of Flickr8k and Flickr30k: lines of `NAME.jpg#0<TAB>caption`."""
    for number, line in enumerate(io.StringIO(read_text(file), newline="\n"), 1):
        where = f"{file} line {number}"
        name, tab, caption = line.rstrip("\r\n").partition("\t")
        if not tab:
            if line.strip():
                yield Row(where, "", None, fault=f"{where}: not an image name, a tab and a caption")
            continue
        yield Row(where, name.rsplit("#", 1)[0], caption)


def _folder_rows(folder: Path, problems: Problems) -> Iterator[Row]:
    """Images below `folder` in the order of their names, each with the lines of the .txt beside it."""
    if not folder.is_dir():
        raise TercetError(missing(str(folder)))
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        present = set(files)
        for name in sorted(files):
            path = Path(parent, name)
            where, beside = str(path), path.with_suffix(".txt")
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if beside.name not in present:
                yield Row(where, "", None, fault=f"{where}: no caption; looked for {beside.name} beside it")
                continue
            try:
                lines = [line for line in read_text(str(beside)).splitlines() if line.strip()]
            except TercetError as error:
                problems.add(str(error))
                continue
            if lines:
                yield Row(where, str(path.relative_to(folder)), lines)
            else:
                yield Row(where, "", None, fault=f"{where}: {beside.name} holds no caption")
