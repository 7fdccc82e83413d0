"""The annotation files of the classification tasks and of compositional probes.

Visual entailment (SNLI-VE, ALBEF), statements about two images (NLVR2, ALBEF), labelled images, and the probes
SugarCrepe, ARO and Winoground.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tercet.config import DataConfig
from tercet.data.builders import PairBuilder
from tercet.data.readers import IMAGE_SUFFIXES, open_samples, open_sources
from tercet.data.rows import (
    Rejected,
    are_texts,
    choose_layout,
    get_field,
    is_coordinate,
    is_text,
    lines_of,
    parse_json,
    parse_line,
    read_objects,
    text_of,
)
from tercet.data.storage import is_url, read_text
from tercet.data.table import SampleTable, concatenate
from tercet.data.task_readers import PROBED_ROWS, TaskBuilder
from tercet.errors import TercetError

Row = dict[str, Any]
Benchmark = Literal["sugarcrepe", "aro", "winoground"]
Crop = tuple[float, float, float, float]

LABELS: tuple[str, ...] = ("contradiction", "neutral", "entailment")  # in the order of the published classes
UNDECIDED = "-"  # what SNLI writes where its annotators did not agree
TRUTHS = {"true": 1, "false": 0}
FLICKR_FOLDERS = ("", "flickr30k-images/", "flickr30k_images/", "images/")
NLVR_LAYOUTS = (
    "{name}",
    "{split}/{name}",
    "{split}/{directory}/{name}",
    "images/{split}/{name}",
    "images/{split}/{directory}/{name}",
    "{directory}/{name}",
)


def open_entailments(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """Hypotheses about images; targets are `{"label": 0, 1 or 2, "id": ...}`, an index into `LABELS`.

    SNLI-VE's rows have `gold_label`, `sentence2` and `Flickr30K_ID` (or `image`); those without a gold label are
    rejected.  ALBEF's have `label`, `sentence` and `image`.

    Raises:
        TercetError: a key is missing or a label is none of the three; names file and row.
    """
    return open_samples(specs, data, read_entailments)


def read_entailments(file: str, suffix: str | None, data: DataConfig) -> SampleTable:
    """The hypotheses of one file; `suffix` names the split to take."""
    rows = read_objects(file, suffix)
    first = list(itertools.islice(rows, PROBED_ROWS))
    builder = TaskBuilder(file, data)
    names = [_flickr_image(row, where) for where, row in first]
    folder = choose_layout(builder.root, FLICKR_FOLDERS, lambda way: [way + name for name in names])
    for where, row in itertools.chain(first, rows):
        label = text_of(row, where, "gold_label", "label")
        if label == UNDECIDED:
            builder.rejected.add(f"{where}: its annotators did not agree on a label")
            continue
        if label not in LABELS:
            raise TercetError(f"{where}: the label {label!r} is none of {', '.join(LABELS)}")
        target = {"label": LABELS.index(label), "id": row.get("pairID")}
        builder.add(where, [folder + _flickr_image(row, where)], text_of(row, where, "sentence2", "sentence"), target)
    return builder.finish()


def _flickr_image(row: Row, where: str) -> str:
    if "image" in row:
        return text_of(row, where, "image")
    name = str(get_field(row, where, "Flickr30K_ID", lambda value: value is not None, "a name"))
    return name if name.endswith(".jpg") else f"{name}.jpg"


def open_statements(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """Statements about two images; targets are `{"label": 0 or 1, "group": ..., "id": ...}`.

    NLVR2's rows have `label`, `sentence` and `identifier`, such as `dev-850-2-0`, which names the images
    `dev-850-2-img0.png` and `dev-850-2-img1.png`; they lie beside each other or in the folders of the official
    download.  ALBEF's have `label`, `sentence` and `images`, a list of two.

    `group` is the same for all pairs of one sentence, which consistency is counted over.

    Raises:
        TercetError: a key is missing, a label is neither true nor false, or an image of the pair is not named; names
            file and row.
    """
    return open_samples(specs, data, read_statements)


def read_statements(file: str, suffix: str | None, data: DataConfig) -> SampleTable:
    """The statements of one file; `suffix` names the split to take."""
    rows = read_objects(file, suffix)
    first = list(itertools.islice(rows, PROBED_ROWS))
    builder = TaskBuilder(file, data)
    official = [(where, row) for where, row in first if "images" not in row]
    layout = choose_layout(builder.root, NLVR_LAYOUTS, lambda way: [_nlvr_images(*row, way)[0] for row in official])
    for where, row in itertools.chain(first, rows):
        sentence = text_of(row, where, "sentence")
        if "images" in row:
            images = get_field(row, where, "images", _are_two_names, "a list of two file names")
        else:
            images = _nlvr_images(where, row, layout)
        # "True" in the official files, true in those that JSON tools wrote.
        label = get_field(row, where, "label", lambda value: str(value).lower() in TRUTHS, "True or False")
        identifier = row.get("identifier")
        group = _without_pair(identifier) if isinstance(identifier, str) else sentence
        target = {"label": TRUTHS[str(label).lower()], "group": group, "id": identifier}
        builder.add(where, images, sentence, target)
    return builder.finish()


def _are_two_names(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_text, value))


def _nlvr_images(where: str, row: Row, layout: str) -> list[str]:
    parts = text_of(row, where, "identifier").split("-")
    if len(parts) != 4:
        raise TercetError(f"{where}: the identifier {row['identifier']!r} is not SPLIT-SET-PAIR-SENTENCE")
    split, group, pair, _ = parts
    directory = row.get("directory", group)
    names = [f"{split}-{group}-{pair}-img{side}.png" for side in (0, 1)]
    return [layout.format(name=name, split=split, directory=directory) for name in names]


def _without_pair(identifier: str) -> str:
    """What the pairs of one sentence share: the identifier without the number of the pair."""
    parts = identifier.split("-")
    return "-".join([*parts[:-2], parts[-1]]) if len(parts) == 4 else identifier


def open_labelled(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """Labelled images as images with one caption, the label.

    Args:
        specs: folders with a folder for each class, whose name with spaces for underscores is the label; or any source
            of pairs, whose `data.caption_column` holds the label.
        data: names of columns, root of image paths.
        split: 'train', 'validation' or 'test'.

    Raises:
        TercetError: a file is missing or cannot be parsed, or gives no labelled image.
    """
    specs = [specs] if isinstance(specs, str) else specs
    return concatenate(
        [
            _read_class_folders(Path(spec), data) if _has_class_folders(spec) else open_sources([spec], data, split)
            for spec in specs
        ]
    )


def labels_of(source: SampleTable) -> list[str]:
    """The label of each image.

    Raises:
        TercetError: an image has several.
    """
    labels = []
    for index in range(source.image_count):
        captions = source.captions(index)
        if len(set(captions)) > 1:
            raise TercetError(
                f"{source.key(index)}: {len(captions)} labels, such as {captions[0]!r} and {captions[1]!r}; an image "
                "has one here (data.caption_column names the column that holds it)"
            )
        labels.append(captions[0])
    return labels


def _read_class_folders(folder: Path, data: DataConfig) -> SampleTable:
    builder = PairBuilder(Rejected(), data.max_words)
    for part in sorted(part for part in folder.iterdir() if part.is_dir()):
        for image in sorted(image for image in part.rglob("*") if image.suffix.lower() in IMAGE_SUFFIXES):
            builder.add(str(image), str(image.relative_to(folder)), part.name.replace("_", " "))
    return builder.finish().in_files(str(folder), str(folder), builder.rejected)


def _has_class_folders(spec: str) -> bool:
    """Whether `spec` is a folder of folders of images without captions beside them."""
    folder = Path(spec)
    if is_url(spec) or not folder.is_dir() or any(entry.is_file() for entry in folder.iterdir()):
        return False
    images = (image for image in folder.rglob("*") if image.suffix.lower() in IMAGE_SUFFIXES)
    first = next(images, None)
    return first is not None and not first.with_suffix(".txt").exists()


@dataclass(frozen=True)
class Probe:
    """One row of a compositional probe: images with as many or more texts, of which text i is true of image i alone.

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
    """The rows of SugarCrepe, ARO (Visual Genome relation, attribution) or Winoground, as their keys tell.

    Raises:
        TercetError: missing, not JSON, of an unknown form, or with a row that lacks something; names file and row.
    """
    rows = list(_probe_rows(file))
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


def _probe_rows(file: str) -> Iterator[tuple[str, Any]]:
    text = read_text(file)
    if file.endswith((".jsonl", ".ndjson")):
        yield from ((where, parse_line(line, where)) for where, line in lines_of(file, text))
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
    image, *texts = _texts(where, row, "filename", "caption", "negative_caption")
    return Probe((image,), tuple(texts), kind, where)


def _aro(where: str, row: Any) -> Probe:
    image, *texts = _texts(where, row, "image_path", "true_caption", "false_caption")
    if "relation_name" in row:
        (kind,) = _texts(where, row, "relation_name")
    else:
        words = get_field(row, where, "attributes", are_texts, "a list of texts")
        kind = "_".join(words)
    crop = None
    if "bbox_x" in row:
        box = [get_field(row, where, f"bbox_{side}", is_coordinate, "a number of pixels") for side in "xywh"]
        left, top, width, height = map(float, box)
        if width <= 0 or height <= 0 or left < 0 or top < 0:
            raise TercetError(f"{where}: the box {[left, top, width, height]} (x, y, w, h) holds no part of an image")
        crop = (left, top, left + width, top + height)
    return Probe((image,), tuple(texts), kind, where, crop)


def _winoground(where: str, row: Any) -> Probe:
    first, second, *texts = _texts(where, row, "image_0", "image_1", "caption_0", "caption_1")
    return Probe((first, second), tuple(texts), str(row.get("collapsed_tag") or "all"), where)


def _texts(where: str, row: Any, *keys: str) -> list[str]:
    return [get_field(row, where, key, is_text, "a text") for key in keys]
