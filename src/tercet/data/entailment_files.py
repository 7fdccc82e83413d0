"""Visual entailment: SNLI-VE's JSON lines, ALBEF's JSON, and what drawn scenes entail."""

from __future__ import annotations

import itertools

from tercet.config import DataConfig
from tercet.data.builders import SampleBuilder
from tercet.data.drawn import drawn_table
from tercet.data.rows import choose_layout, image_root, read_objects, text_of
from tercet.data.scene_tasks import entailments
from tercet.data.scenes import SceneSource
from tercet.data.table import SampleTable
from tercet.errors import TercetError

# In the order of the published classes.
LABELS: tuple[str, ...] = ("contradiction", "neutral", "entailment")
UNDECIDED = "-"  # what SNLI writes where its annotators did not agree
FOLDERS = ("", "flickr30k-images/", "flickr30k_images/", "images/")
PROBES = 16


def read_entailments(file: str, suffix: str | None, data: DataConfig) -> SampleTable:
    """The hypotheses of a file; targets are `{"label": 0, 1 or 2, "id": ...}`.

    SNLI-VE's rows have `gold_label`, `sentence2` and `Flickr30K_ID` (or `image`); those without a gold label are left
    out and counted.  ALBEF's have `label`, `sentence` and `image`.

    Raises:
        TercetError: a key is missing or a label is none of the three; names file and row.
    """
    rows = read_objects(file, suffix)
    first = list(itertools.islice(rows, PROBES))
    root = image_root(file, data)
    names = [_image_of(row, where) for where, row in first]
    layout = choose_layout(root, [[folder + name for name in names] for folder in FOLDERS])
    collector = SampleBuilder()
    for where, row in itertools.chain(first, rows):
        label = text_of(row, where, "gold_label", "label")
        if label == UNDECIDED:
            collector.rejected.add(f"{where}: its annotators did not agree on a label")
            continue
        if label not in LABELS:
            raise TercetError(f"{where}: the label {label!r} is none of {', '.join(LABELS)}")
        target = {"label": LABELS.index(label), "id": row.get("pairID")}
        sentence = text_of(row, where, "sentence2", "sentence")
        collector.add(where, [FOLDERS[layout] + _image_of(row, where)], sentence, target)
    return collector.finish(file, image_root(file, data))


def draw_entailments(count: int, split: str) -> SampleTable:
    """What `count` drawn scenes entail, contradict and leave open."""
    scenes = SceneSource(count, split)
    collector = SampleBuilder()
    for index in range(count):
        for number, (sentence, label) in enumerate(entailments(scenes.scene(index)), 1):
            target = {"label": LABELS.index(label), "id": None}
            collector.add(f"{scenes.key(index)} sentence {number}", [index], sentence, target)
    return collector.finish_over(drawn_table(scenes))


def _image_of(row: dict, where: str) -> str:
    if "image" in row:
        return text_of(row, where, "image")
    if "Flickr30K_ID" not in row:
        raise TercetError(f"{where}: no 'image' or 'Flickr30K_ID'; the keys there are {', '.join(map(str, row))}")
    name = str(row["Flickr30K_ID"])
    return name if name.endswith(".jpg") else f"{name}.jpg"
