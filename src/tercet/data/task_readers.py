"""The annotation files of the tasks, as tables of samples: questions, entailments, statements, labels and probes.

A mistake in a row is an error that names file, row and key.  Images are named relative to `data.image_root`, or to the
folder of the annotations; where they are no files there, they are looked for in the tar shards or tables there.
`grounding_readers` reads what has boxes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from tercet.config import DataConfig
from tercet.data.builders import Strings, encode_name
from tercet.data.parts import FilePart
from tercet.data.readers import TABLE_SUFFIXES, find_files, open_samples, open_sources, suffix_of
from tercet.data.rows import (
    Rejected,
    choose_layout,
    get_field,
    image_root,
    is_id,
    is_text,
    parse_json,
    read_objects,
    text_of,
)
from tercet.data.storage import is_file, is_url, missing, read_text
from tercet.data.table import Samples, SampleTable
from tercet.errors import TercetError

Row = dict[str, Any]
QuestionId = int | str

# Visual Genome asks one annotator; the published training counts such an answer half.
ONE_ANNOTATOR_WEIGHT = 0.5
PROBED_ROWS = 16
COCO_LAYOUTS = (
    "{split}/COCO_{split}_{number:012d}.jpg",
    "COCO_{split}_{number:012d}.jpg",
    "{split}/{number:012d}.jpg",
    "{number:012d}.jpg",
)


class TaskBuilder:
    """Collects the samples of an annotation file; images that several samples name are held once.

    Attributes:
        root: what image names are relative to.
        rejected: takes messages of rejected rows.
    """

    def __init__(self, file: str, data: DataConfig) -> None:
        self.root = image_root(file, data)
        self.rejected = Rejected()
        self._file, self._data = file, data
        self._images: list[list[int]] = []
        self._columns = {name: Strings(pa.large_string()) for name in ("text", "target", "key")}
        self._archive: SampleTable | None = None
        self._index: dict[str, int] | None = None  # of each image, by its name

    def add(self, where: str, images: Sequence[str], text: str, target: object) -> None:
        """Take one sample; one whose images the shards lack is rejected.

        Args:
            where: file and row.
            images: names of its images.
            text: its sentence or question.
            target: plain values, as JSON has them.
        """
        if self._index is None:
            self._archive = self._open_archive(images[0])
            self._index = {} if self._archive is None else _index_by_name(self._archive)
        rows: list[int] = []
        for name in images:
            if self._archive is None:
                row = self._index.setdefault(name, len(self._index))
            else:
                path = PurePosixPath(name)
                row = self._index.get(path.stem, self._index.get(path.name))
            if row is None:
                self.rejected.add(f"{where}: no image {name} in {self.root}")
                return
            rows.append(row)
        self._images.append(rows)
        for column, value in (("text", text), ("target", json.dumps(target)), ("key", where)):
            self._columns[column].append(value.encode("utf-8", "replace").decode())

    def finish(self) -> SampleTable:
        """The samples over those images that they name.

        Raises:
            TercetError: there are none, or none of a few images exists.
        """
        if not self._images:
            raise TercetError(f"{self._file}: no samples in it{self.rejected.summary()}")
        table = self._archive
        if table is None:
            part = FilePart.of(self.root, [encode_name(name) for name in self._index or ()])
            part.require_some(self._file)
            table = SampleTable([part])
        columns = [column.finish() for column in self._columns.values()]
        batch = pa.RecordBatch.from_arrays(columns, list(self._columns))
        return table.with_samples(Samples(np.array(self._images, np.int64), batch), self.rejected)

    def _open_archive(self, image: str) -> SampleTable | None:
        """The shards or tables at the image root; None where images are files."""
        archives = {".tar", *TABLE_SUFFIXES}
        if suffix_of(self.root) not in archives and (is_url(self.root) or is_file(Path(self.root) / image)):
            return None
        try:
            files = find_files(self.root)[0]
        except TercetError:
            return None
        if not all(suffix_of(file) in archives for file in files):
            return None
        return open_sources([self.root], self._data, need_captions=False)


def _index_by_name(table: SampleTable) -> dict[str, int]:
    """Where each image of shards or tables is, by the last part of its key `shard.tar#KEY`."""
    keys = (table.key(index) for index in range(table.image_count))
    return {PurePosixPath(key.rpartition("#")[2]).name: index for index, key in enumerate(keys)}


@dataclass(frozen=True)
class Gold:
    """What the annotators say of a question.

    Attributes:
        answers: one of each annotator.
        answer_type: 'yes/no', 'number', 'other', or what else the data distinguishes; None where it gives nothing.
        where: file and row, for messages.
    """

    answers: tuple[str, ...]
    answer_type: str | None
    where: str


def open_questions(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """Questions about images, one a sample.

    A target is `{"question_id", "answers", "weight", "answer_type"}`; `answers` is None where a file has none, which is
    allowed in evaluation alone.

    Args:
        specs: official questions of VQA v2 (`v2_OpenEnded_mscoco_train2014_questions.json`, with
            `v2_mscoco_train2014_annotations.json` beside it, or `questions.json#annotations.json`), or ALBEF's lists of
            `{"image", "question", "question_id", "answer", "dataset"}`.
        data: where images lie.
        split: 'train', 'validation' or 'test'.

    Raises:
        TercetError: a file is missing or cannot be parsed, a row is wrong, or a question to train on has no answer.
    """
    training = split == "train"
    return open_samples(specs, data, lambda file, suffix, data: read_questions(file, suffix, data, training))


def read_questions(file: str, suffix: str | None, data: DataConfig, need_answers: bool) -> SampleTable:
    """The questions of one file; `suffix` names the annotations of an official file, or the split of an ALBEF list."""
    if _is_list(file):
        return _read_albef_questions(file, suffix, data, need_answers)
    whole = _read_json(file)
    if isinstance(whole, dict) and isinstance(whole.get("questions"), list):
        return _read_official_questions(file, whole, suffix, data, need_answers)
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):
        raise TercetError(f"{file}: holds annotations; name the file of questions, they are looked for beside it")
    raise TercetError(f"{file}: neither official questions (an object with 'questions') nor a list of questions")


def _read_official_questions(
    file: str, whole: Row, suffix: str | None, data: DataConfig, need_answers: bool
) -> SampleTable:
    annotations = _annotations_of(file, suffix, required=need_answers)
    golds = None if annotations is None else _read_annotations(annotations, _read_json(annotations))
    rows: list[tuple[str, int, str, QuestionId]] = []
    seen: dict[QuestionId, str] = {}
    for number, row in enumerate(whole["questions"], 1):
        where = f"{file} questions {number}"
        question_id = _question_id(row, where, seen)
        is_number = lambda value: isinstance(value, int) and not isinstance(value, bool)  # noqa: E731
        image_id = get_field(row, where, "image_id", is_number, "COCO's number of an image")
        if golds is not None and question_id not in golds:
            raise TercetError(
                f"{where}: question_id {question_id} has no annotation in {annotations}; give those of its split"
            )
        rows.append((where, image_id, text_of(row, where, "question"), question_id))
    builder = TaskBuilder(file, data)
    names = _coco_names(file, whole.get("data_subtype"), [image_id for _, image_id, _, _ in rows], builder.root)
    for where, image_id, text, question_id in rows:
        gold = Gold((), None, where) if golds is None else golds[question_id]
        builder.add(
            where, [names[image_id]], text, _answer_target(question_id, list(gold.answers) or None, gold.answer_type)
        )
    return builder.finish()


def _read_albef_questions(file: str, suffix: str | None, data: DataConfig, need_answers: bool) -> SampleTable:
    builder = TaskBuilder(file, data)
    seen: dict[QuestionId, str] = {}
    for where, row in read_objects(file, suffix):
        # Training needs no question ids, and its files join sets whose numbers overlap.
        question_id = row.get("question_id") if need_answers else _question_id(row, where, seen)
        answers = _answers(row, where, "answer") if "answer" in row or need_answers else None
        alone = row.get("dataset") == "vg" or (answers is not None and isinstance(row["answer"], str))
        target = _answer_target(question_id, answers, _answer_type(row, where), ONE_ANNOTATOR_WEIGHT if alone else 1.0)
        builder.add(where, [text_of(row, where, "image")], text_of(row, where, "question"), target)
    return builder.finish()


def _answer_target(
    question_id: QuestionId | None, answers: list[str] | None, kind: str | None, weight: float = 1.0
) -> Row:
    return {"question_id": question_id, "answers": answers, "weight": weight, "answer_type": kind}


def weighted_answers(target: Mapping[str, Any]) -> dict[str, float]:
    """The different answers to a question, each with its share of the annotators times the question's weight."""
    counts = Counter(target["answers"])
    return {answer: target["weight"] * count / counts.total() for answer, count in counts.items()}


def common_answers(source: SampleTable, limit: int) -> list[str]:
    """The `limit` answers that the most annotators gave; of equal frequency, those that come first."""
    counts: Counter[str] = Counter()
    for index in range(source.sample_count):
        counts.update(source.sample(index).target["answers"] or ())
    return [answer for answer, _ in counts.most_common(limit)]


def read_gold(file: str) -> dict[QuestionId, Gold]:
    """What the annotators say, by question id.

    Args:
        file: official annotations, official questions with annotations beside them, or an ALBEF file with answers.

    Raises:
        TercetError: it cannot be read or parsed, or a row is wrong; names file and row.
    """
    seen: dict[QuestionId, str] = {}
    if _is_list(file):
        return {
            _question_id(row, where, seen): Gold(tuple(_answers(row, where, "answer")), _answer_type(row, where), where)
            for where, row in read_objects(file)
        }
    whole = _read_json(file)
    if not (isinstance(whole, dict) and isinstance(whole.get("questions"), list)):
        return _read_annotations(file, whole)
    annotations = _annotations_of(file, None, required=True)
    assert annotations is not None
    for number, row in enumerate(whole["questions"], 1):
        _question_id(row, f"{file} questions {number}", seen)
    golds = _read_annotations(annotations, _read_json(annotations))
    return {question: gold for question, gold in golds.items() if question in seen}


def read_results(file: str) -> dict[QuestionId, str]:
    """The answers of a result file, by question id.

    Raises:
        TercetError: it is no list of `{"question_id", "answer"}`, or a question has two answers; names file and row.
    """
    if not _is_list(file):
        raise TercetError(f'{file}: no list; results are a JSON list of {{"question_id", "answer"}}')
    seen: dict[QuestionId, str] = {}
    return {
        _question_id(row, where, seen): get_field(row, where, "answer", lambda value: isinstance(value, str), "a text")
        for where, row in read_objects(file)
    }


def results_json(answers: Mapping[QuestionId, str]) -> str:
    """The result file that the evaluation server takes."""
    return json.dumps([{"question_id": question, "answer": answer} for question, answer in answers.items()]) + "\n"


def read_answer_list(file: str) -> list[str]:
    """The answers to choose from: a JSON list of texts, or text with one on each line.

    Raises:
        TercetError: it cannot be read, is empty, or holds something that is no text or that it holds twice.
    """
    if suffix_of(file) == ".json":
        values = _read_json(file)
        if not isinstance(values, list):
            raise TercetError(f'{file}: no list; a list of answers is JSON like ["yes", "no"], or text with one a line')
        named = [(f"{file} row {number}", value) for number, value in enumerate(values, 1)]
    else:
        lines = read_text(file).split("\n")
        named = [(f"{file} line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not named:
        raise TercetError(f"{file}: no answers in it")
    first: dict[str, str] = {}
    for where, value in named:
        if not is_text(value):
            raise TercetError(f"{where}: {str(value)[:60]!r} is no answer")
        if value in first:
            raise TercetError(f"{where}: {value!r} is in {first[value]} already; remove one of them")
        first[value] = where
    return list(first)


def _read_annotations(file: str, whole: Any) -> dict[QuestionId, Gold]:
    """`{"annotations": [{"question_id", "answers": [{"answer"}], "answer_type"}]}`."""
    if not isinstance(whole, dict) or not isinstance(whole.get("annotations"), list):
        raise TercetError(f"{file}: no official annotations (an object with a list of 'annotations')")
    golds: dict[QuestionId, Gold] = {}
    seen: dict[QuestionId, str] = {}
    for number, row in enumerate(whole["annotations"], 1):
        where = f"{file} annotations {number}"
        question_id = _question_id(row, where, seen)
        golds[question_id] = Gold(tuple(_answers(row, where, "answers")), _answer_type(row, where), where)
    return golds


def _answers(row: Row, where: str, key: str) -> list[str]:
    """The annotators' answers: a text, a list of texts, or a list of `{"answer": text}`."""
    is_given = lambda value: isinstance(value, str) or (isinstance(value, list) and bool(value))  # noqa: E731
    given = get_field(row, where, key, is_given, "the answers of annotators")
    answers: list[str] = []
    for number, entry in enumerate(given if isinstance(given, list) else [given], 1):
        answer = entry.get("answer") if isinstance(entry, dict) else entry
        if not isinstance(answer, str):
            raise TercetError(f"{where}: answer {number} is {str(answer)[:60]!r}, not a text")
        answers.append(answer)
    return answers


def _answer_type(row: Row, where: str) -> str | None:
    if row.get("answer_type") is None:
        return None
    return get_field(row, where, "answer_type", lambda value: isinstance(value, str), "a text")


def _question_id(row: object, where: str, seen: dict[QuestionId, str]) -> QuestionId:
    """The row's question id, which `seen` did not have yet."""
    question_id = get_field(row, where, "question_id", is_id, "a number or a text")
    if question_id in seen:
        raise TercetError(f"{where}: question_id {question_id} is that of {seen[question_id]} already")
    seen[question_id] = where
    return question_id


def _coco_names(file: str, subtype: object, image_ids: Sequence[int], root: str) -> dict[int, str]:
    """Paths of COCO's images by number, in the layout that this disk has."""
    parts = PurePosixPath(file).name.split("_")
    found = subtype if isinstance(subtype, str) else next((part for part in parts if "201" in part), None)
    if found is None:
        raise TercetError(f"{file}: no 'data_subtype' such as 'val2014' in it; COCO's image names need it")
    split = found.replace("-dev", "")  # test-dev asks about a part of the images of test
    numbers = list(dict.fromkeys(image_ids))
    probed = numbers[:: max(1, len(numbers) // PROBED_ROWS)]
    layout = choose_layout(
        root, COCO_LAYOUTS, lambda way: [way.format(split=split, number=number) for number in probed]
    )
    return {number: layout.format(split=split, number=number) for number in numbers}


def _annotations_of(file: str, suffix: str | None, required: bool) -> str | None:
    """The annotations of a file of questions: those that `suffix` names, or those beside it, if there are any."""
    if suffix is not None:
        folder = file.rpartition("/")[0]
        named = f"{folder}/{suffix}" if folder else suffix
        if not is_url(named) and not Path(named).is_file():
            raise TercetError(f"{missing(named)} (the annotations of {file})")
        return named
    name = PurePosixPath(file).name.replace("OpenEnded_", "").replace("questions", "annotations")
    beside = str(PurePosixPath(file).with_name(name))
    if beside != file and not is_url(file) and Path(beside).is_file():
        return beside
    if required:
        raise TercetError(
            f"{file}: no annotations for it; looked for {name} beside it, or name them as in {file}#annotations.json"
        )
    return None


def _is_list(file: str) -> bool:
    """Whether a file holds a JSON list, or JSON lines, rather than one object."""
    return suffix_of(file) in (".jsonl", ".ndjson") or read_text(file).lstrip(" \t\r\n").startswith("[")


def _read_json(file: str) -> Any:
    return parse_json(read_text(file), file)
