"""Statements about two pictures: NLVR2's JSON lines, ALBEF's JSON, and pairs of drawn scenes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tercet.config import DataConfig
from tercet.data.builders import SampleBuilder
from tercet.data.drawn import drawn_table
from tercet.data.rows import choose_layout, image_root, read_objects, text_of
from tercet.data.scene_pairs import PairStatement, pair_statement, shared_statements
from tercet.data.scenes import SPLITS, encode_png
from tercet.data.table import SampleTable
from tercet.errors import TercetError

TRUTHS = {"true": 1, "false": 0}
LAYOUTS = (
    "{name}",
    "{split}/{name}",
    "{split}/{directory}/{name}",
    "images/{split}/{name}",
    "images/{split}/{directory}/{name}",
    "{directory}/{name}",
)
PROBES = 16
# Further ones about each pair of drawn scenes that is trained on.  A pair is drawn so that its own sentence is nearly
# true, or nearly false; the others are easier, and the more there are the easier learning begins.
TRAINING_STATEMENTS, HARD_STATEMENTS = 8, 2
SHARING_PAIRS = 8  # pairs in a row that are trained on and that share their further statements


def read_statements(file: str, suffix: str | None, data: DataConfig) -> SampleTable:
    """The statements of a file; targets are `{"label": 0 or 1, "group": ..., "id": ...}`.

    NLVR2's rows have `label`, `sentence` and `identifier`, such as `dev-850-2-0`, which names the images
    `dev-850-2-img0.png` and `dev-850-2-img1.png`; they lie beside each other or in the folders of the official
    download.  ALBEF's have `label`, `sentence` and `images`, a list of two.

    `group` is the same for all pairs of one sentence, which consistency is counted over.

    Raises:
        TercetError: a key is missing, a label is neither true nor false, or an image of the pair is not named; names
            file and row.
    """
    rows = read_objects(file, suffix)
    first = list(itertools.islice(rows, PROBES))
    root = image_root(file, data)
    named = [(where, row) for where, row in first if "images" not in row]
    layout = LAYOUTS[choose_layout(root, [[_official(*row, way)[0] for row in named] for way in LAYOUTS])]
    collector = SampleBuilder()
    for where, row in itertools.chain(first, rows):
        sentence = text_of(row, where, "sentence")
        images = _listed(row, where) if "images" in row else _official(where, row, layout)
        identifier = row.get("identifier")
        group = _group(identifier) if isinstance(identifier, str) else sentence
        collector.add(where, images, sentence, {"label": _truth(row, where), "group": group, "id": identifier})
    return collector.finish(file, image_root(file, data))


class PairDrawings:
    """Pairs of drawn scenes: images 2n and 2n + 1 are the left and the right one of pair n.

    Args:
        count: pairs.
        split: 'train', 'validation' or 'test'; no two splits share a pair.
    """

    def __init__(self, count: int, split: str) -> None:
        self.split = split
        self.image_count = 2 * count

    def statement(self, number: int) -> PairStatement:
        """Pair `number` and its sentence; pairs 2n and 2n + 1 share theirs, true of one and false of the other."""
        return pair_statement(self._seed(number))

    def more_statements(self, pairs: Sequence[PairStatement], count: int) -> list[list[tuple[str, bool]]]:
        """Further statements about the first pairs, `count` each at most on average, with their truth.

        `SHARING_PAIRS` in a row share theirs.
        """
        told: list[list[tuple[str, bool]]] = []
        for first in range(0, len(pairs), SHARING_PAIRS):
            together = pairs[first : first + SHARING_PAIRS]
            told += shared_statements(together, self._seed(first), count)
        return told

    def _seed(self, number: int) -> int:
        group, side = divmod(number, 2)
        return 2 * (len(SPLITS) * group + SPLITS[self.split]) + side

    def array(self, index: int) -> np.ndarray:
        """Image `index`: uint8 [size, size, 3], RGB."""
        pair = self.statement(index // 2)
        return (pair.scene_b if index % 2 else pair.scene_a).image

    def image(self, index: int) -> bytes:
        """Image `index` as PNG."""
        return encode_png(self.array(index))

    def key(self, index: int) -> str:
        """A name for messages: 'pairs:test#12 left'."""
        return f"pairs:{self.split}#{index // 2} {'right' if index % 2 else 'left'}"


def draw_statements(count: int, split: str, further: int = TRAINING_STATEMENTS) -> SampleTable:
    """`count` pairs of drawn scenes, each with a sentence that is true of it or not.

    Those to train on have some `further` ones each.
    """
    drawings = PairDrawings(count, split)
    collector = SampleBuilder()
    pairs = [drawings.statement(number) for number in range(count)]
    more = drawings.more_statements(pairs, further) if split == "train" else [[]] * count
    for number, (pair, others) in enumerate(zip(pairs, more, strict=True)):
        for place, (sentence, truth) in enumerate([(pair.sentence, pair.truth), *others]):
            # The first of a pair shares its sentence with its neighbour; every other sentence stands for itself.
            key = f"pairs:{split}#{number}"
            group = str(number // 2) if place == 0 else f"{number} statement {place + 1}"
            target = {"label": int(truth), "group": group, "id": None}
            images = [2 * number, 2 * number + 1]
            collector.add(key if place == 0 else f"{key} statement {place + 1}", images, sentence, target)
    return collector.finish_over(drawn_table(drawings))


def _truth(row: dict, where: str) -> int:
    if "label" not in row:
        raise TercetError(f"{where}: no 'label'; the keys there are {', '.join(map(str, row))}")
    label = str(row["label"]).lower()  # "True" in the official files, true in those that JSON tools wrote
    if label not in TRUTHS:
        raise TercetError(f"{where}: the label {row['label']!r} is neither True nor False")
    return TRUTHS[label]


def _listed(row: dict, where: str) -> list[str]:
    images = row["images"]
    if not isinstance(images, list) or len(images) != 2 or not all(isinstance(name, str) and name for name in images):
        raise TercetError(f"{where}: 'images' is {str(images)[:80]!r}, not a list of two file names")
    return images


def _official(where: str, row: dict, layout: str) -> list[str]:
    parts = text_of(row, where, "identifier").split("-")
    if len(parts) != 4:
        raise TercetError(f"{where}: the identifier {row['identifier']!r} is not SPLIT-SET-PAIR-SENTENCE")
    split, group, pair, _ = parts
    directory = row.get("directory", group)
    names = [f"{split}-{group}-{pair}-img{side}.png" for side in (0, 1)]
    return [layout.format(name=name, split=split, directory=directory) for name in names]


def _group(identifier: str) -> str:
    """What the pairs of one sentence share: the identifier without the number of the pair."""
    parts = identifier.split("-")
    return "-".join([*parts[:-2], parts[-1]]) if len(parts) == 4 else identifier
