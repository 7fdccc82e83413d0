"""The official references of RefCOCO, RefCOCO+ and RefCOCOg, as JSON or as the pickle that they are released as.

A pickle can run any program when it is opened.  These hold nothing but plain values, so they are read by an unpickler
that knows nothing else and refuses the rest.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NoReturn

from tercet.data.rows import parse_json
from tercet.data.storage import read_bytes, read_text
from tercet.errors import TercetError

FARTHEST = 1_000_000
Box = tuple[float, float, float, float]
# The release adds the annotation's place among those of its image to the file's name.
_NUMBERED = re.compile(r"_\d+(\.\w+)$")


@dataclass(frozen=True)
class References:
    """References by their ref_id.

    Attributes:
        file: where they were read.
        sentences: the expressions of each.
        splits: 'train', 'val', 'testA', 'testB', 'test'.
        image_ids: COCO's number of each image.
        files: file name of each image.
        boxes: edges (left, top, right, bottom) of what each means, in pixels; empty without COCO's instances.
        sizes: (width, height) of each image in pixels; empty without COCO's instances.
    """

    file: str
    sentences: dict[Hashable, list[str]] = field(default_factory=dict)
    splits: dict[Hashable, str] = field(default_factory=dict)
    image_ids: dict[Hashable, Hashable] = field(default_factory=dict)
    files: dict[Hashable, str] = field(default_factory=dict)
    boxes: dict[Hashable, Box] = field(default_factory=dict)
    sizes: dict[Hashable, tuple[float, float]] = field(default_factory=dict)


def read_references(file: str, instances: str | None) -> References:
    """Read the references and, from COCO's `instances.json`, their boxes and the sizes of their images.

    Raises:
        TercetError: a file is missing, cannot be parsed, holds more than plain values, or lacks something.
    """
    pickled = PurePosixPath(file).suffix.lower() in (".p", ".pkl", ".pickle")
    content = unpickle_plain(file) if pickled else parse_json(read_text(file), file)
    if not isinstance(content, list):
        raise TercetError(f"{file}: {type(content).__name__}, not a list of references")
    references = References(file)
    annotations: dict[Hashable, Hashable] = {}
    for number, row in enumerate(content, 1):
        where = f"{file} row {number}"
        ref_id = _name(row, "ref_id", where)
        sentences = _value(row, "sentences", where)
        if not isinstance(sentences, list) or not sentences:
            raise TercetError(f"{where}: no list of 'sentences'")
        said = [sentence.get("sent") if isinstance(sentence, dict) else None for sentence in sentences]
        texts = [text for text in said if isinstance(text, str)]
        if len(texts) < len(said):
            raise TercetError(f"{where}: a sentence without its text, 'sent'")
        references.sentences[ref_id] = texts
        references.splits[ref_id] = str(_name(row, "split", where))
        references.image_ids[ref_id] = _name(row, "image_id", where)
        references.files[ref_id] = _NUMBERED.sub(r"\1", str(_name(row, "file_name", where)))
        annotations[ref_id] = _name(row, "ann_id", where)
    if instances is not None:
        _add_boxes(references, annotations, instances)
    return references


def unpickle_plain(file: str) -> Any:
    """The content of a pickle of plain values: lists, dicts, strings, numbers.

    Raises:
        TercetError: missing, damaged, or with anything else in it.
    """
    try:
        return _PlainUnpickler(io.BytesIO(read_bytes(file)), encoding="utf-8", errors="replace").load()
    except TercetError:
        raise
    except _NotPlainError as error:
        raise TercetError(
            f"{file}: a pickle that asks for {error}, which could run any program; it is not opened. "
            "If you trust it, convert it to JSON yourself"
        ) from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise TercetError(f"{file}: not a pickle that can be read ({error}); was it cut short?") from error


class _NotPlainError(Exception):
    """What a pickle asks for beside plain values."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise _NotPlainError(f"{module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _NotPlainError("an object outside of it")


def _add_boxes(references: References, annotations: dict[Hashable, Hashable], file: str) -> None:
    content = parse_json(read_text(file), file)
    if not isinstance(content, dict):
        raise TercetError(f"{file}: {type(content).__name__}, not COCO's object of images and annotations")
    boxes: dict[Hashable, Any] = {
        _name(row, "id", where): _value(row, "bbox", where) for where, row in _listed(content, "annotations", file)
    }
    sizes: dict[Hashable, tuple[Any, Any, Any]] = {
        _name(row, "id", where): (_number(row, "width", where), _number(row, "height", where), row.get("file_name"))
        for where, row in _listed(content, "images", file)
    }
    for ref_id, annotation in annotations.items():
        image_id = references.image_ids[ref_id]
        if annotation not in boxes or image_id not in sizes:
            what = f"annotation {annotation}" if annotation not in boxes else f"image {image_id}"
            raise TercetError(f"{references.file} ref_id {ref_id}: {file} has no {what}; give the file of its split")
        box = boxes[annotation]
        if not isinstance(box, list) or len(box) != 4 or not all(is_coordinate(side) for side in box):
            raise TercetError(f"{file} annotation {annotation}: 'bbox' is {str(box)[:60]!r}, not [x, y, width, height]")
        left, top, wide, high = box
        references.boxes[ref_id] = (left, top, left + wide, top + high)
        width, height, name = sizes[image_id]
        references.sizes[ref_id] = (width, height)
        if isinstance(name, str) and name:
            references.files[ref_id] = name


def is_coordinate(value: object) -> bool:
    """Whether a value is a number that a place in an image can have: finite, and within a million pixels."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -FARTHEST < value < FARTHEST


def _listed(content: dict[str, Any], key: str, file: str) -> Iterator[tuple[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list):
        raise TercetError(f"{file}: no list of {key!r}; is it COCO's instances file?")
    for number, row in enumerate(rows, 1):
        yield f"{file} {key} {number}", row


def _name(row: Any, key: str, where: str) -> int | str:
    """What names something in another list: a number or a text."""
    value = _value(row, key, where)
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and abs(value) > 1 << 63):
        raise TercetError(f"{where}: {key!r} is {type(value).__name__}, not a number or a text")
    return value


def _number(row: Any, key: str, where: str) -> int | float:
    value = _value(row, key, where)
    if not is_coordinate(value):
        raise TercetError(f"{where}: {key!r} is {str(value)[:60]!r}, not a number of pixels")
    return value


def _value(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, dict) or row.get(key) is None:
        there = ", ".join(key for key in row if isinstance(key, str)) if isinstance(row, dict) else type(row).__name__
        raise TercetError(f"{where}: no {key!r}; there is {there}")
    return row[key]
