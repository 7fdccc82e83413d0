"""Readers of compositional probes, as published: SugarCrepe, ARO (Visual Genome relation, attribution) and Winoground.

Each row becomes a `Probe`: one or two images with as many or more texts, of which text i is true of image i alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tercet.data.references import is_coordinate
from tercet.data.rows import parse_json, parse_line
from tercet.data.storage import read_text
from tercet.errors import TercetError

Benchmark = Literal["sugarcrepe", "aro", "winoground"]
Crop = tuple[float, float, float, float]


@dataclass(frozen=True)
class Probe:
    """One row of a probe.

    Attributes:
        images: file names as the row gives them; one, or two for Winoground.
        texts: text i is true of image i; any further texts are false.
        kind: what the row tests, for accuracies by kind: the file's name, a relation, a tag.
        where: names the row in messages.
        crop: (left, top, right, bottom) in pixels, the part of the image that the row is about; None: all of it.
    """

    images: tuple[str, ...]
    texts: tuple[str, ...]
    kind: str
    where: str
    crop: Crop | None = None


def read_probes(file: str) -> tuple[Benchmark, list[Probe]]:
    """The rows of a probe's file, whose keys tell which probe it is.

    Raises:
        TercetError: missing, not JSON, of an unknown form, or with a row that lacks something; names file and row.
    """
    rows = list(_rows(file))
    if not rows:
        raise TercetError(f"{file}: no rows")
    where, first = rows[0]
    keys = set(first) if isinstance(first, dict) else set()
    if {"caption", "negative_caption"} <= keys:
        return "sugarcrepe", [_sugarcrepe(where, row, Path(file).stem) for where, row in rows]
    if {"true_caption", "false_caption"} <= keys:
        return "aro", [_aro(where, row) for where, row in rows]
    if {"image_0", "image_1", "caption_0", "caption_1"} <= keys:
        return "winoground", [_winoground(where, row) for where, row in rows]
    raise TercetError(
        f"{where}: has none of the forms of SugarCrepe (caption, negative_caption), ARO (true_caption, false_caption) "
        f"and Winoground (image_0, caption_0, ...); its keys are {', '.join(sorted(keys)) or 'none'}"
    )


def _rows(file: str) -> Iterator[tuple[str, Any]]:
    text = read_text(file)
    if file.endswith((".jsonl", ".ndjson")):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{file} line {number}", parse_line(line, f"{file} line {number}")
        return
    content = parse_json(text, file)
    if isinstance(content, dict):
        # SugarCrepe numbers its rows by the keys of an object.
        yield from ((f"{file} row {key!r}", row) for key, row in content.items())
    elif isinstance(content, list):
        yield from ((f"{file} row {number}", row) for number, row in enumerate(content, 1))
    else:
        raise TercetError(f"{file}: {type(content).__name__}, not a list or object of rows")


def _sugarcrepe(where: str, row: Any, kind: str) -> Probe:
    texts = (_text(where, row, "caption"), _text(where, row, "negative_caption"))
    return Probe((_text(where, row, "filename"),), texts, kind, where)


def _aro(where: str, row: Any) -> Probe:
    texts = (_text(where, row, "true_caption"), _text(where, row, "false_caption"))
    if "relation_name" in row:
        kind = _text(where, row, "relation_name")
    else:
        attributes = row.get("attributes")
        if not isinstance(attributes, list) or not all(isinstance(word, str) for word in attributes):
            raise TercetError(f"{where}: neither 'relation_name' nor a list of 'attributes'")
        kind = "_".join(attributes)
    crop = None
    if "bbox_x" in row:
        left, top, width, height = (_number(where, row, f"bbox_{side}") for side in "xywh")
        if width <= 0 or height <= 0 or left < 0 or top < 0:
            raise TercetError(f"{where}: the box {[left, top, width, height]} (x, y, w, h) holds no part of an image")
        crop = (left, top, left + width, top + height)
    return Probe((_text(where, row, "image_path"),), texts, kind, where, crop)


def _winoground(where: str, row: Any) -> Probe:
    images = (_text(where, row, "image_0"), _text(where, row, "image_1"))
    texts = (_text(where, row, "caption_0"), _text(where, row, "caption_1"))
    kind = row.get("collapsed_tag") or "all"
    return Probe(images, texts, str(kind), where)


def _text(where: str, row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise TercetError(f"{where}: {key!r} is no text; the row has {there}")
    return value


def _number(where: str, row: Any, key: str) -> float:
    value = row.get(key)
    if not is_coordinate(value):
        raise TercetError(f"{where}: {key!r} is {str(value)[:60]!r}, not a number of pixels")
    return float(value)
