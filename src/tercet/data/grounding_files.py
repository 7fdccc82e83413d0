"""Referring expressions and phrases with the boxes that they mean, in the forms that they are published in.

* ALBEF's RefCOCO+: a list of `{"image", "text", "ref_id"}`; the boxes of ref_ids are in `data.references`.
* The official references: `refs(unc).p` or the same as JSON, with COCO's `instances.json` in `data.instances`.
* Phrases of Flickr30k Entities: a list of `{"image", "phrase", "boxes_xyxy", "orig_size", "types"}`.
* One's own: `{"image", "text", "boxes": [[left, top, right, bottom], ...], "size": [width, height]}`; without
  `size`, boxes are in pixels of the image as it is.
* Drawn scenes.

A target is `{"boxes", "size", "kinds", "split", "ref_id", "candidates"}`: edges (left, top, right, bottom) in pixels of
an image of `size` (None: the image's own), and of `candidates` those of a detector, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tercet.config import DataConfig
from tercet.data.builders import SampleBuilder, is_empty
from tercet.data.drawn import drawn_table, open_samples
from tercet.data.readers import TABLE_SUFFIXES, find_files, open_sources
from tercet.data.references import Box, References, is_coordinate, read_references
from tercet.data.rows import SplitFilter, choose_layout, image_root, parse_json, read_objects, text_of
from tercet.data.scene_expressions import expressions
from tercet.data.scenes import SceneSource
from tercet.data.storage import read_text
from tercet.data.table import SampleTable
from tercet.errors import TercetError

TEXT_KEYS = ("text", "phrase", "expression", "caption")
REACH = 1.0  # pixels that a box may reach over the image's edge: annotators' tools round that way
_TRIED = 16


def open_expressions(specs: Sequence[str], data: DataConfig, split: str) -> Any:
    """Expressions: to train on, images with their expressions as captions; to evaluate, samples with boxes.

    Args:
        specs: files of any of the forms above, or `scenes`.
        data: where images, references and detections lie.
        split: 'train', 'validation' or 'test'.

    Raises:
        TercetError: a file is missing or cannot be parsed, a row is wrong, or a box lies outside its image.
    """
    training = split == "train"

    def read(file: str, suffix: str | None, data: DataConfig) -> SampleTable:
        return read_expressions(file, suffix, data, need_boxes=not training)

    return open_samples(specs, data, split, read, draw_expressions)


def draw_expressions(count: int, split: str) -> SampleTable:
    """The phrases that each refer to one object of `count` drawn scenes; candidates are the boxes of all objects."""
    scenes = SceneSource(count, split, distinct=split != "train")
    collector = SampleBuilder()
    for index in range(count):
        scene = scenes.scene(index)
        for phrase in expressions(scene):
            target = _target([phrase.box], (scene.size, scene.size), [phrase.kind], candidates=scene.boxes)
            collector.add(f"{scenes.key(index)} expression {len(collector)}", [index], phrase.text, target)
    return collector.finish_over(drawn_table(scenes))


def read_expressions(file: str, suffix: str | None, data: DataConfig, need_boxes: bool) -> SampleTable:
    """The expressions of one file.

    Args:
        file: of any form above.
        suffix: the split to take.
        data: where images, references and detections lie.
        need_boxes: refuse rows without boxes.

    Raises:
        TercetError: as `open_expressions`.
    """
    detections = None if data.detections is None else Detections(data.detections)
    if _holds_references(file):
        return _read_official(file, suffix, data, detections, need_boxes)
    references = None
    if data.references is not None:
        references = read_references(data.references, data.instances)
    images = ImageFinder(file, data)
    collector = SampleBuilder()
    for where, row in read_objects(file, suffix):
        image, text = text_of(row, where, data.image_column), text_of(row, where, *TEXT_KEYS)
        _check_text(text, where, data)
        place = images.find(image, where, collector)
        if place is None:
            continue
        ref_id = row.get("ref_id")
        if references is not None and ref_id is not None and not _has_boxes(row):
            target, name = _target_of(references, ref_id, where)
        else:
            target, name = _target_of_row(row, where), image
        if need_boxes and not target["boxes"]:
            raise TercetError(
                f"{where}: no boxes; give 'boxes' in the row, or for its ref_id --data.references and --data.instances"
            )
        if detections is not None and need_boxes:
            target["candidates"] = detections.of(name, where)
        collector.add(where, [place], text, target)
    return images.finish(collector)


def _read_official(
    file: str, suffix: str | None, data: DataConfig, detections: Detections | None, need_boxes: bool
) -> SampleTable:
    references = read_references(file, data.instances)
    if need_boxes and not references.boxes:
        raise TercetError(f"{file}: the boxes of these references are in COCO's instances.json; set data.instances")
    chosen = SplitFilter(suffix)
    chosen_ids = [ref_id for ref_id, split in references.splits.items() if chosen.accepts(split)]
    chosen.check(file)
    names = [references.files[ref_id] for ref_id in chosen_ids]
    root = image_root(file, data)
    tried = names[:: max(1, len(names) // _TRIED)]
    layouts = ("", "train2014/")
    folder = layouts[choose_layout(root, [[f"{inside}{name}" for name in tried] for inside in layouts])]
    images = ImageFinder(file, data)
    collector = SampleBuilder()
    for ref_id, name in zip(chosen_ids, names, strict=True):
        where = f"{file} ref_id {ref_id}"
        place = images.find(f"{folder}{name}", where, collector)
        if place is None:
            continue
        target, image = _target_of(references, ref_id, where) if references.boxes else (_target([], None), name)
        if detections is not None and need_boxes:
            target["candidates"] = detections.of(image, where)
        for number, sentence in enumerate(references.sentences[ref_id], 1):
            _check_text(sentence, f"{where} sentence {number}", data)
            collector.add(f"{where} sentence {number}", [place], sentence, target)
    return images.finish(collector)


class ImageFinder:
    """Finds images by name: files below a folder, or members of the shards or tables that `data.image_root` names."""

    def __init__(self, file: str, data: DataConfig) -> None:
        self.file, self.data = file, data
        self.source = _open_archive(data)
        self._places: dict[str, int] = {}
        if self.source is not None:
            keys = (self.source.key(index) for index in range(self.source.image_count))
            self._places = {_stem(key): index for index, key in enumerate(keys)}

    def find(self, name: str, where: str, collector: SampleBuilder) -> str | int | None:
        """What `SampleBuilder.add` takes for the image; None, and a problem noted, where an archive lacks it."""
        if self.source is None:
            return name
        place = self._places.get(PurePosixPath(name).stem, self._places.get(PurePosixPath(name).name))
        if place is None:
            collector.rejected.add(f"{where}: no image {name} in {self.data.image_root}")
        return place

    def finish(self, collector: SampleBuilder) -> SampleTable:
        """The samples, over these images.

        Raises:
            TercetError: there are none, or none of a few images is there.
        """
        if self.source is None:
            return collector.finish(self.file, image_root(self.file, self.data))
        if not len(collector):
            raise TercetError(
                f"{self.file}: none of its images is in {self.data.image_root}; the first: {collector.rejected[0]}"
            )
        return collector.finish_over(self.source)


class Detections:
    """A detector's boxes by image: JSON of `{image: [[x, y, width, height, ...], ...]}`."""

    def __init__(self, file: str) -> None:
        content = parse_json(read_text(file), file)
        if not isinstance(content, dict):
            raise TercetError(f"{file}: {type(content).__name__}, not an object of images with their boxes")
        self.file = file
        self._boxes: dict[str, Any] = content

    def of(self, image: object, where: str) -> list[Box]:
        """The boxes of an image, by COCO's number or by file name, as edges.

        Raises:
            TercetError: it has none, or one of them holds no pixel.
        """
        found = self._boxes
        name = str(image)
        keys = (name, PurePosixPath(name).name, PurePosixPath(name).stem)
        key = next((key for key in keys if key in found), None)
        if key is None or not isinstance(found[key], list) or not found[key]:
            raise TercetError(f"{where}: no boxes of image {name} in {self.file}")
        return [_edges(box, f"{self.file} image {key} box {number}") for number, box in enumerate(found[key], 1)]


def check_boxes(boxes: Sequence[Box], width: float, height: float, where: str) -> None:
    """Refuse boxes that are empty or reach outside an image of `width` x `height` pixels.

    Raises:
        TercetError: names file and row.
    """
    for left, top, right, bottom in boxes:
        if not (left < right and top < bottom):
            raise TercetError(f"{where}: the box ({left:g}, {top:g}, {right:g}, {bottom:g}) holds no pixel")
        if left < -REACH or top < -REACH or right > width + REACH or bottom > height + REACH:
            raise TercetError(
                f"{where}: the box ({left:g}, {top:g}, {right:g}, {bottom:g}) reaches outside its image "
                f"of {width:g}x{height:g} pixels; boxes are (left, top, right, bottom)"
            )


def _check_text(text: str, where: str, data: DataConfig) -> None:
    if is_empty(text, data.max_words):
        raise TercetError(f"{where}: the expression {text!r} is empty after cleaning; take the row out")


def _target(
    boxes: Sequence[Box],
    size: tuple[float, float] | None,
    kinds: Sequence[str] = (),
    split: str | None = None,
    ref_id: object = None,
    candidates: Sequence[Box] | None = None,
) -> dict[str, Any]:
    return {
        "boxes": [list(box) for box in boxes],
        "size": None if size is None else list(size),
        "kinds": list(kinds),
        "split": split,
        "ref_id": ref_id,
        "candidates": None if candidates is None else [list(box) for box in candidates],
    }


def _target_of(references: References, ref_id: Any, where: str) -> tuple[dict[str, Any], object]:
    """Target of a reference, and COCO's number of its image."""
    if isinstance(ref_id, list | dict) or ref_id not in references.boxes:
        raise TercetError(f"{where}: ref_id {ref_id!r} has no box in {references.file}; give the references of its set")
    box, size = references.boxes[ref_id], references.sizes[ref_id]
    check_boxes([box], *size, where)
    image_id = references.image_ids[ref_id]
    return _target([box], size, split=references.splits[ref_id], ref_id=ref_id), image_id


def _target_of_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    boxes = row.get("boxes_xyxy", row.get("boxes", []))
    size = row.get("orig_size", row.get("size"))
    kinds = row.get("types", row.get("kinds", []))
    if not isinstance(boxes, list) or not all(_is_numbers(box, 4) for box in boxes):
        raise TercetError(f"{where}: 'boxes' is {str(boxes)[:60]!r}, not a list of [left, top, right, bottom]")
    if size is not None and not (_is_numbers(size, 2) and min(size) > 0):
        raise TercetError(f"{where}: the size {str(size)[:60]!r} is not [width, height] in pixels")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise TercetError(f"{where}: 'types' is {str(kinds)[:60]!r}, not a list of texts")
    found: list[Box] = [(box[0], box[1], box[2], box[3]) for box in boxes]
    if size is not None:
        check_boxes(found, size[0], size[1], where)
    split, ref_id = row.get("split"), row.get("ref_id")
    if not isinstance(split, str | None) or not isinstance(ref_id, int | str | None):
        raise TercetError(f"{where}: 'split' must be a text and 'ref_id' a number or a text")
    return _target(found, None if size is None else (size[0], size[1]), kinds, split, ref_id)


def _has_boxes(row: dict[str, Any]) -> bool:
    return "boxes" in row or "boxes_xyxy" in row


def _is_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(is_coordinate, value))


def _edges(box: object, where: str) -> Box:
    if not isinstance(box, list) or len(box) < 4 or not _is_numbers(box[:4], 4) or min(box[2:4]) <= 0:
        raise TercetError(f"{where}: {str(box)[:60]!r} is no box [x, y, width, height, ...]")
    left, top, width, height = box[:4]
    return left, top, left + width, top + height


def _holds_references(file: str) -> bool:
    """Whether a file is the official references: a pickle, or JSON whose first row has sentences."""
    if PurePosixPath(file).suffix.lower() in (".p", ".pkl", ".pickle"):
        return True
    _, first = next(read_objects(file), (None, {}))
    return "sentences" in first and "ann_id" in first


def _open_archive(data: DataConfig) -> SampleTable | None:
    """The shards or tables that `data.image_root` names; None where it is a folder of files."""
    if data.image_root is None or (Path(data.image_root).is_dir() and not _holds_archives(data.image_root)):
        return None
    suffixes = {PurePosixPath(file).suffix.lower() for file in find_files(data.image_root)[0]}
    return open_sources([data.image_root], data, "test") if suffixes & {".tar", *TABLE_SUFFIXES} else None


def _holds_archives(folder: str) -> bool:
    return any(PurePosixPath(file).suffix.lower() in {".tar", *TABLE_SUFFIXES} for file in find_files(folder)[0])


def _stem(key: str) -> str:
    """The name of an image in a source's key: `shard.tar#NAME`, or a path."""
    name = key.rpartition("#")[2] if "#" in key else key
    return PurePosixPath(name).name
