"""Questions about images: the official VQA v2 files, ALBEF's, drawn scenes; and the files around them.

* Official: `v2_OpenEnded_mscoco_train2014_questions.json`, with `v2_mscoco_train2014_annotations.json` beside it (or
  the file that `questions.json#annotations.json` names); images are named by number, as COCO names them.
* ALBEF: a list of `{"image", "question", "question_id", "answer", "dataset"}`.
* Results for the evaluation server: a list of `{"question_id", "answer"}`.
* A list of answers to choose from: a JSON list, or text with an answer on each line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tercet.config import DataConfig
from tercet.data.builders import SampleBuilder
from tercet.data.drawn import drawn_table, open_samples
from tercet.data.rows import choose_layout, image_root, parse_json, read_objects, text_of
from tercet.data.scene_tasks import Question, place_questions, questions, referred_questions
from tercet.data.scenes import Scene, SceneSource
from tercet.data.storage import is_url, missing, read_text
from tercet.data.table import SampleTable
from tercet.errors import TercetError

QuestionId = int | str

# Visual Genome asks one annotator; the published training counts such an answer half.
ONE_ANNOTATOR_WEIGHT = 0.5
IMAGES_TRIED = 16


@dataclass(frozen=True)
class Gold:
    """What the annotators say of a question.

    Attributes:
        answers: one of each annotator.
        answer_type: 'yes/no', 'number', 'other', or what else the data tells apart; None where it tells nothing.
        where: file and row, for messages.
    """

    answers: tuple[str, ...]
    answer_type: str | None
    where: str


def open_questions(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """Questions about images, one a sample.

    A target is `{"question_id", "answers", "weight", "answer_type"}`; `answers` is None where a file has none, which
    is allowed for evaluation alone.

    Args:
        specs: official or ALBEF files, `scenes`, or scenes of `split` that are asked for places, `scenes:places`, or
            by them, `scenes:referred`; see `place_questions` and `referred_questions`.
        data: where images lie; how many scenes are drawn.
        split: 'train', 'validation' or 'test'.

    Raises:
        TercetError: a file is missing or cannot be parsed, a row is wrong, or a question to train on has no answer.
    """

    def read(file: str, suffix: str | None, data: DataConfig) -> SampleTable:
        return read_questions(file, suffix, data, need_answers=split == "train")

    kinds = {"places": place_questions, "referred": referred_questions}
    other = {name: partial(draw_questions, ask=ask) for name, ask in kinds.items()}
    return open_samples(specs, data, split, read, draw_questions, other)


def draw_questions(count: int, split: str, ask: Callable[[Scene], list[Question]] = questions) -> SampleTable:
    """What `ask` asks about `count` drawn scenes, as if ten annotators agreed on each answer."""
    scenes = SceneSource(count, split, distinct=split != "train")
    collector = SampleBuilder()
    for index in range(count):
        for question in ask(scenes.scene(index)):
            target = _target(len(collector), [question.answer] * 10, question.kind)
            collector.add(f"{scenes.key(index)} question {len(collector)}", [index], question.text, target)
    return collector.finish_over(drawn_table(scenes))


def read_questions(file: str, suffix: str | None, data: DataConfig, need_answers: bool) -> SampleTable:
    """The questions of one file.

    Args:
        file: official questions, or an ALBEF list.
        suffix: the annotations beside an official file; the split to take of an ALBEF file whose rows have one.
        data: where images lie.
        need_answers: refuse questions without an answer.

    Raises:
        TercetError: as `open_questions`.
    """
    if _is_list(file):
        return _read_albef(file, suffix, data, need_answers)
    whole = _read_json(file)
    if isinstance(whole, dict) and isinstance(whole.get("questions"), list):
        return _read_official(file, whole, suffix, data, need_answers)
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):
        raise TercetError(f"{file}: holds annotations; name the file of questions, they are looked for beside it")
    raise TercetError(f"{file}: neither official questions (an object with 'questions') nor a list of questions")


def _read_official(
    file: str, whole: dict[str, Any], suffix: str | None, data: DataConfig, need_answers: bool
) -> SampleTable:
    beside = _annotations_of(file, suffix)
    if beside is None and need_answers:
        raise TercetError(
            f"{file}: no annotations for it; looked for {_annotations_name(file)} beside it, or name them as in "
            f"{file}#annotations.json"
        )
    golds = None if beside is None else _read_annotations(beside, _read_json(beside))
    rows: list[tuple[str, int, str, QuestionId]] = []
    seen: dict[QuestionId, str] = {}
    for number, row in enumerate(whole["questions"], 1):
        where = f"{file} questions {number}"
        if not isinstance(row, dict):
            raise TercetError(f"{where}: {type(row).__name__} {str(row)[:60]!r} is no object with keys")
        question_id = _question_id(row, where, seen)
        image_id = row.get("image_id")
        if not isinstance(image_id, int) or isinstance(image_id, bool):
            raise TercetError(f"{where}: 'image_id' is {str(image_id)[:60]!r}, not COCO's number of an image")
        if golds is not None and question_id not in golds:
            raise TercetError(
                f"{where}: question_id {question_id} has no annotation in {beside}; give those of its split"
            )
        rows.append((where, image_id, text_of(row, where, "question"), question_id))
    names = _coco_names(file, whole.get("data_subtype"), [image_id for _, image_id, _, _ in rows], data)
    collector = SampleBuilder()
    for where, image_id, text, question_id in rows:
        gold = None if golds is None else golds[question_id]
        answers, kind = (None, None) if gold is None else (list(gold.answers), gold.answer_type)
        collector.add(where, [names[image_id]], text, _target(question_id, answers, kind))
    return collector.finish(file, image_root(file, data))


def _read_albef(file: str, suffix: str | None, data: DataConfig, need_answers: bool) -> SampleTable:
    collector = SampleBuilder()
    seen: dict[QuestionId, str] = {}
    for where, row in read_objects(file, suffix):
        # Training names no question, and its files join sets whose numbers overlap.
        question_id = row.get("question_id") if need_answers else _question_id(row, where, seen)
        answers = _answers(row, where) if "answer" in row or need_answers else None
        alone = row.get("dataset") == "vg" or (answers is not None and isinstance(row["answer"], str))
        weight = ONE_ANNOTATOR_WEIGHT if alone else 1.0
        target = _target(question_id, answers, _answer_type(row, where), weight)
        collector.add(where, [text_of(row, where, "image")], text_of(row, where, "question"), target)
    return collector.finish(file, image_root(file, data))


def _target(
    question_id: QuestionId | None, answers: list[str] | None, kind: str | None, weight: float = 1.0
) -> dict[str, Any]:
    return {"question_id": question_id, "answers": answers, "weight": weight, "answer_type": kind}


def weighted_answers(target: Mapping[str, Any]) -> dict[str, float]:
    """The different answers to a question, each with its share of the annotators times the question's weight."""
    counts = Counter(target["answers"])
    return {answer: target["weight"] * count / counts.total() for answer, count in counts.items()}


def common_answers(source: SampleTable, limit: int) -> list[str]:
    """The `limit` answers of a source that the most annotators gave; of like frequency, those that come first."""
    counts: Counter[str] = Counter()
    for index in range(source.sample_count):
        counts.update(source.sample(index).target["answers"] or ())
    return [answer for answer, _ in counts.most_common(limit)]


def read_gold(file: str) -> dict[QuestionId, Gold]:
    """What the annotators say, by question id.

    Args:
        file: official annotations, official questions with annotations beside them, an ALBEF file with answers, or
            scenes:SPLIT.

    Raises:
        TercetError: it cannot be read or parsed, or a row is wrong; names file and row.
    """
    if file == "scenes" or file.startswith("scenes:"):
        return _gold_of_scenes(open_questions([file], DataConfig(), "test"))
    if not _is_list(file):
        whole = _read_json(file)
        if isinstance(whole, dict) and isinstance(whole.get("questions"), list):
            return _gold_of_questions(file, whole["questions"])
        return _read_annotations(file, whole)
    golds: dict[QuestionId, Gold] = {}
    seen: dict[QuestionId, str] = {}
    for where, row in read_objects(file):
        question_id = _question_id(row, where, seen)
        golds[question_id] = Gold(tuple(_answers(row, where)), _answer_type(row, where), where)
    return golds


def _gold_of_scenes(source: SampleTable) -> dict[QuestionId, Gold]:
    samples = [source.sample(index) for index in range(source.sample_count)]
    return {
        sample.target["question_id"]: Gold(tuple(sample.target["answers"]), sample.target["answer_type"], sample.key)
        for sample in samples
    }


def _gold_of_questions(file: str, rows: Sequence[Any]) -> dict[QuestionId, Gold]:
    beside = _annotations_of(file, None)
    if beside is None:
        raise TercetError(f"{file}: no annotations for it; looked for {_annotations_name(file)} beside it")
    golds = _read_annotations(beside, _read_json(beside))
    seen: dict[QuestionId, str] = {}
    for number, row in enumerate(rows, 1):
        where = f"{file} questions {number}"
        if not isinstance(row, dict):
            raise TercetError(f"{where}: {type(row).__name__} {str(row)[:60]!r} is no object with keys")
        _question_id(row, where, seen)
    return {question: gold for question, gold in golds.items() if question in seen}


def read_results(file: str) -> dict[QuestionId, str]:
    """The answers of a result file, by question id.

    Raises:
        TercetError: it is no list of `{"question_id", "answer"}`, or a question has two answers; names file and row.
    """
    answers: dict[QuestionId, str] = {}
    seen: dict[QuestionId, str] = {}
    if not _is_list(file):
        raise TercetError(f'{file}: no list; results are a JSON list of {{"question_id", "answer"}}')
    for where, row in read_objects(file):
        question_id = _question_id(row, where, seen)
        if not isinstance(row.get("answer"), str):
            raise TercetError(f"{where}: 'answer' is {str(row.get('answer'))[:60]!r}, not a text")
        answers[question_id] = row["answer"]
    return answers


def results_json(answers: Mapping[QuestionId, str]) -> str:
    """The result file that the evaluation server takes."""
    return json.dumps([{"question_id": question, "answer": answer} for question, answer in answers.items()]) + "\n"


def read_answer_list(file: str) -> list[str]:
    """The answers to choose from: a JSON list of texts, or text with one on each line.

    Raises:
        TercetError: it cannot be read, is empty, or holds something that is no text or stands there twice.
    """
    if PurePosixPath(file).suffix.lower() == ".json":
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
        if not isinstance(value, str) or not value.strip():
            raise TercetError(f"{where}: {str(value)[:60]!r} is no answer")
        if value in first:
            raise TercetError(f"{where}: {value!r} stands in {first[value]} already; leave one of them out")
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
        if not isinstance(row, dict):
            raise TercetError(f"{where}: {type(row).__name__} {str(row)[:60]!r} is no object with keys")
        question_id = _question_id(row, where, seen)
        golds[question_id] = Gold(tuple(_answers(row, where, "answers")), _answer_type(row, where), where)
    return golds


def _answers(row: Mapping[str, Any], where: str, key: str = "answer") -> list[str]:
    """The annotators' answers: a text, a list of texts, or a list of `{"answer": text}`."""
    given = row.get(key)
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not found:
        there = (
            f"is {str(given)[:60]!r}" if key in row else f"is missing; the keys there are {', '.join(map(str, row))}"
        )
        raise TercetError(f"{where}: {key!r} {there}; it must hold the annotators' answers")
    answers: list[str] = []
    for number, entry in enumerate(found, 1):
        answer = entry.get("answer") if isinstance(entry, dict) else entry
        if not isinstance(answer, str):
            raise TercetError(f"{where}: answer {number} is {str(answer)[:60]!r}, not a text")
        answers.append(answer)
    return answers


def _answer_type(row: Mapping[str, Any], where: str) -> str | None:
    kind = row.get("answer_type")
    if not isinstance(kind, str | None):
        raise TercetError(f"{where}: 'answer_type' is {str(kind)[:60]!r}, not a text")
    return kind


def _question_id(row: Mapping[str, Any], where: str, seen: dict[QuestionId, str]) -> QuestionId:
    """The row's question id, which `seen` did not have yet."""
    question_id = row.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise TercetError(f"{where}: 'question_id' is {str(question_id)[:60]!r}, not a number or a text")
    if question_id in seen:
        raise TercetError(f"{where}: question_id {question_id} is that of {seen[question_id]} already")
    seen[question_id] = where
    return question_id


def _coco_names(file: str, subtype: Any, image_ids: Sequence[int], data: DataConfig) -> dict[int, str]:
    """Paths of COCO's images by number, laid out as they are on this disk."""
    name = PurePosixPath(file).name
    found = subtype if isinstance(subtype, str) else next((part for part in name.split("_") if "201" in part), None)
    if found is None:
        raise TercetError(f"{file}: no 'data_subtype' such as 'val2014' in it; COCO's image names need it")
    split = found.replace("-dev", "")  # test-dev asks about a part of the images of test
    numbers = list(dict.fromkeys(image_ids))
    layouts = [
        {number: form.format(split=split, number=number) for number in numbers}
        for form in (
            "{split}/COCO_{split}_{number:012d}.jpg",
            "COCO_{split}_{number:012d}.jpg",
            "{split}/{number:012d}.jpg",
            "{number:012d}.jpg",
        )
    ]
    tried = numbers[:: max(1, len(numbers) // IMAGES_TRIED)]
    return layouts[choose_layout(image_root(file, data), [[names[number] for number in tried] for names in layouts])]


def _annotations_of(file: str, suffix: str | None) -> str | None:
    """The annotations that belong to a file of questions; None where there are none."""
    folder = file.rpartition("/")[0]
    if suffix is not None:
        named = f"{folder}/{suffix}" if folder else suffix
        if not is_url(named) and not Path(named).is_file():
            raise TercetError(f"{missing(named)} (the annotations of {file})")
        return named
    beside = str(PurePosixPath(file).with_name(_annotations_name(file)))
    return beside if beside != file and not is_url(file) and Path(beside).is_file() else None


def _annotations_name(file: str) -> str:
    """`v2_OpenEnded_mscoco_val2014_questions.json` to `v2_mscoco_val2014_annotations.json`."""
    return PurePosixPath(file).name.replace("OpenEnded_", "").replace("questions", "annotations")


def _is_list(file: str) -> bool:
    """Whether a file holds a JSON list, or JSON lines, rather than one object."""
    if PurePosixPath(file).suffix.lower() in (".jsonl", ".ndjson"):
        return True
    return read_text(file).lstrip(" \t\r\n").startswith("[")


def _read_json(file: str) -> Any:
    return parse_json(read_text(file), file)
