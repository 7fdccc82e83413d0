"""Referring expressions with the boxes that they mean, in the forms that they are published in.

* ALBEF's RefCOCO+: a list of `{"image", "text", "ref_id"}`; the boxes of ref_ids are in `data.references`.
* The official references: `refs(unc).p` or the same as JSON, with COCO's `instances.json` in `data.instances`.
* Phrases of Flickr30k Entities: a list of `{"image", "phrase", "boxes_xyxy", "orig_size", "types"}`.
* One's own: `{"image", "text", "boxes": [[left, top, right, bottom], ...], "size": [width, height]}`; without
  `size`, boxes are in pixels of the image as it is.

A target is `{"boxes", "size", "kinds", "split", "ref_id", "candidates"}`: edges (left, top, right, bottom) in pixels of
an image of `size` (None: the image's own), and of `candidates` those of a detector, or None.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

from tercet.config import DataConfig
from tercet.data.builders import is_empty
from tercet.data.readers import open_samples, suffix_of
from tercet.data.rows import (
    SplitFilter,
    are_texts,
    choose_layout,
    get_field,
    is_coordinate,
    is_id,
    parse_json,
    read_objects,
    text_of,
)
from tercet.data.storage import read_bytes, read_text
from tercet.data.table import SampleTable
from tercet.data.task_readers import PROBED_ROWS, TaskBuilder
from tercet.errors import TercetError

Box = tuple[float, float, float, float]
Row = dict[str, Any]

TEXT_KEYS = ("text", "phrase", "expression", "caption")
TOLERANCE = 1.0  # pixels that a box may reach over the image's edge: annotators' tools round that way
PICKLES = (".p", ".pkl", ".pickle")
# The release adds the annotation's number among those of its image to the file's name.
_NUMBERED = re.compile(r"_\d+(\.\w+)$")


def open_expressions(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """Expressions about images, one a sample; training reads them as captions, without any box.

    Args:
        specs: files of any of the forms above.
        data: where images, references and detections lie.
        split: 'train', 'validation' or 'test'.

    Raises:
        TercetError: a file is missing or cannot be parsed, a row is wrong, or a box lies outside its image.
    """
    need_boxes = split != "train"
    return open_samples(specs, data, lambda file, suffix, data: read_expressions(file, suffix, data, need_boxes))


def read_expressions(file: str, suffix: str | None, data: DataConfig, need_boxes: bool) -> SampleTable:
    """The expressions of one file; `suffix` names the split to take, and `need_boxes` rejects rows without boxes."""
    detections = Detections(data.detections) if need_boxes and data.detections is not None else None
    if _is_official(file):
        return _read_official(file, suffix, data, detections, need_boxes)
    references = None if data.references is None else read_references(data.references, data.instances)
    builder = TaskBuilder(file, data)
    for where, row in read_objects(file, suffix):
        image, text = text_of(row, where, data.image_column), _checked(text_of(row, where, *TEXT_KEYS), where, data)
        ref_id = row.get("ref_id")
        if references is not None and ref_id is not None and "boxes" not in row and "boxes_xyxy" not in row:
            reference = references.get(ref_id) if is_id(ref_id) else None
            if reference is None or reference.box is None:
                raise TercetError(
                    f"{where}: ref_id {ref_id!r} has no box in {data.references}; give the references of its set"
                )
            target, name = reference.target(where), reference.image_id
        else:
            target, name = _target_of_row(row, where), image
        if need_boxes and not target["boxes"]:
            raise TercetError(
                f"{where}: no boxes; give 'boxes' in the row, or for its ref_id --data.references and --data.instances"
            )
        if detections is not None:
            target["candidates"] = detections.of(name, where)
        builder.add(where, [image], text, target)
    return builder.finish()


def _read_official(
    file: str, suffix: str | None, data: DataConfig, detections: Detections | None, need_boxes: bool
) -> SampleTable:
    if need_boxes and data.instances is None:
        raise TercetError(f"{file}: the boxes of these references are in COCO's instances.json; set data.instances")
    split = SplitFilter(suffix)
    references = read_references(file, data.instances)
    chosen = [reference for reference in references.values() if split.accepts(reference.split)]
    split.check(file)
    builder = TaskBuilder(file, data)
    probed = [reference.image for reference in chosen[:: max(1, len(chosen) // PROBED_ROWS)]]
    folder = choose_layout(builder.root, ("", "train2014/"), lambda way: [way + name for name in probed])
    for reference in chosen:
        target = reference.target(reference.where)
        if detections is not None:
            target["candidates"] = detections.of(reference.image_id, reference.where)
        for number, sentence in enumerate(reference.sentences, 1):
            where = f"{reference.where} sentence {number}"
            builder.add(where, [folder + reference.image], _checked(sentence, where, data), target)
    return builder.finish()


@dataclass
class Reference:
    """What one object of RefCOCO, RefCOCO+ or RefCOCOg is referred to by.

    Attributes:
        where: file and ref_id, for messages.
        sentences: its expressions.
        split: 'train', 'val', 'testA', 'testB', 'test'.
        image: the image's file name.
        image_id, annotation_id: COCO's numbers.
        box: edges (left, top, right, bottom) of what they mean, in pixels; None without COCO's instances.
        size: (width, height) of the image in pixels; None without COCO's instances.
    """

    where: str
    ref_id: int | str
    sentences: list[str]
    split: str
    image: str
    image_id: int | str
    annotation_id: int | str
    box: Box | None = None
    size: tuple[float, float] | None = None

    def target(self, where: str) -> Row:
        """The target of a sample; `where` names it where the box is wrong."""
        if self.box is None or self.size is None:
            return _target([], None)
        check_boxes([self.box], *self.size, where)
        return _target([self.box], self.size, split=self.split, ref_id=self.ref_id)


def read_references(file: str, instances: str | None) -> dict[int | str, Reference]:
    """The references by ref_id and, from COCO's `instances.json`, their boxes and the sizes of their images.

    Raises:
        TercetError: a file is missing, cannot be parsed, holds more than plain values, or lacks something.
    """
    content = unpickle_plain(file) if suffix_of(file) in PICKLES else parse_json(read_text(file), file)
    if not isinstance(content, list):
        raise TercetError(f"{file}: {type(content).__name__}, not a list of references")
    references: dict[int | str, Reference] = {}
    for number, row in enumerate(content, 1):
        where = f"{file} row {number}"
        ref_id, split, image_id, name, annotation_id = (
            get_field(row, where, key, is_id, "a number or a text")
            for key in ("ref_id", "split", "image_id", "file_name", "ann_id")
        )
        sentences = get_field(row, where, "sentences", _are_sentences, "a list of objects with a text 'sent'")
        texts = [sentence["sent"] for sentence in sentences]
        image = _NUMBERED.sub(r"\1", str(name))
        where = f"{file} ref_id {ref_id}"
        references[ref_id] = Reference(where, ref_id, texts, str(split), image, image_id, annotation_id)
    if instances is not None:
        _add_boxes(references, instances)
    return references


def _add_boxes(references: dict[int | str, Reference], file: str) -> None:
    content = parse_json(read_text(file), file)
    boxes = {
        get_field(row, where, "id", is_id, "a number or a text"): get_field(
            row, where, "bbox", lambda box: _are_numbers(box, 4), "[x, y, width, height]"
        )
        for where, row in read_list(content, "annotations", file)
    }
    images = {
        get_field(row, where, "id", is_id, "a number or a text"): (
            get_field(row, where, "width", is_coordinate, "a number of pixels"),
            get_field(row, where, "height", is_coordinate, "a number of pixels"),
            row.get("file_name"),
        )
        for where, row in read_list(content, "images", file)
    }
    for reference in references.values():
        if reference.annotation_id not in boxes or reference.image_id not in images:
            annotated = reference.annotation_id in boxes
            what = f"image {reference.image_id}" if annotated else f"annotation {reference.annotation_id}"
            raise TercetError(f"{reference.where}: {file} has no {what}; give the file of its split")
        left, top, wide, high = boxes[reference.annotation_id]
        width, height, name = images[reference.image_id]
        reference.box, reference.size = (left, top, left + wide, top + high), (width, height)
        if isinstance(name, str) and name:
            reference.image = name


def read_list(content: object, key: str, file: str) -> list[tuple[str, Any]]:
    """The rows under a key of COCO's instances, each with its file and number."""
    rows = get_field(content, file, key, lambda value: isinstance(value, list), "a list; is it COCO's instances file?")
    return [(f"{file} {key} {number}", row) for number, row in enumerate(rows, 1)]


def unpickle_plain(file: str) -> Any:
    """The content of a pickle of plain values: lists, dicts, strings, numbers.

    A pickle can run any program when it is opened, so this unpickler knows nothing else and rejects the rest.

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


class Detections:
    """A detector's boxes by image: JSON of `{image: [[x, y, width, height, ...], ...]}`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._boxes = parse_json(read_text(file), file)
        if not isinstance(self._boxes, dict):
            raise TercetError(f"{file}: {type(self._boxes).__name__}, not an object of images with their boxes")

    def of(self, image: object, where: str) -> list[Box]:
        """The boxes of an image, by COCO's number or by file name, as edges.

        Raises:
            TercetError: it has none, or one of them holds no pixel.
        """
        name = PurePosixPath(str(image))
        key = next((key for key in (str(name), name.name, name.stem) if key in self._boxes), None)
        if key is None or not isinstance(self._boxes[key], list) or not self._boxes[key]:
            raise TercetError(f"{where}: no boxes of image {name} in {self.file}")
        edges: list[Box] = []
        for number, box in enumerate(self._boxes[key], 1):
            if not isinstance(box, list) or not _are_numbers(box[:4], 4) or min(box[2:4]) <= 0:
                where = f"{self.file} image {key} box {number}"
                raise TercetError(f"{where}: {str(box)[:60]!r} is no box [x, y, width, height, ...]")
            left, top, width, height = box[:4]
            edges.append((left, top, left + width, top + height))
        return edges


def check_boxes(boxes: Sequence[Box], width: float, height: float, where: str) -> None:
    """Reject boxes that are empty or reach outside an image of `width` x `height` pixels.

    Raises:
        TercetError: names file and row.
    """
    for box in boxes:
        left, top, right, bottom = box
        shown = f"the box ({left:g}, {top:g}, {right:g}, {bottom:g})"
        if not (left < right and top < bottom):
            raise TercetError(f"{where}: {shown} holds no pixel")
        if min(left, top) < -TOLERANCE or right > width + TOLERANCE or bottom > height + TOLERANCE:
            raise TercetError(
                f"{where}: {shown} reaches outside its image of {width:g}x{height:g} pixels; "
                "boxes are (left, top, right, bottom)"
            )


def _target(
    boxes: Sequence[Sequence[float]],
    size: Sequence[float] | None,
    kinds: Sequence[str] = (),
    split: str | None = None,
    ref_id: object = None,
) -> Row:
    return {
        "boxes": [list(box) for box in boxes],
        "size": None if size is None else list(size),
        "kinds": list(kinds),
        "split": split,
        "ref_id": ref_id,
        "candidates": None,
    }


def _target_of_row(row: Row, where: str) -> Row:
    def optional(keys: tuple[str, str], is_valid: Any, expected: str) -> Any:
        key = next((key for key in keys if row.get(key) is not None), None)
        return None if key is None else get_field(row, where, key, is_valid, expected)

    boxes = optional(("boxes_xyxy", "boxes"), _are_boxes, "a list of [left, top, right, bottom]") or []
    size = optional(("orig_size", "size"), lambda value: _are_numbers(value, 2) and min(value) > 0, "[width, height]")
    kinds = optional(("types", "kinds"), are_texts, "a list of texts") or []
    if size is not None:
        check_boxes(boxes, size[0], size[1], where)
    split, ref_id = row.get("split"), row.get("ref_id")
    if not isinstance(split, str | None) or not isinstance(ref_id, int | str | None):
        raise TercetError(f"{where}: 'split' must be a text and 'ref_id' a number or a text")
    return _target(boxes, size, kinds, split, ref_id)


def _checked(text: str, where: str, data: DataConfig) -> str:
    if is_empty(text, data.max_words):
        raise TercetError(f"{where}: the expression {text!r} is empty after cleaning; remove the row")
    return text


def _is_official(file: str) -> bool:
    """Whether a file is the official references: a pickle, or JSON whose first row has sentences."""
    if suffix_of(file) in PICKLES:
        return True
    _, first = next(read_objects(file), (None, {}))
    return "sentences" in first and "ann_id" in first


def _are_sentences(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(sentence, dict) and isinstance(sentence.get("sent"), str) for sentence in value)


def _are_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(is_coordinate, value))


def _are_boxes(value: object) -> bool:
    return isinstance(value, list) and all(_are_numbers(box, 4) for box in value)
