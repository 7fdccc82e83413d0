"""Scores of prediction files against annotations, without a model and without images.

What `tercet evaluate --predictions FILE` writes is read, and the forms of the official evaluations:

* retrieval: `{"caption", "images": [names, best first]}` and `{"image", "captions": [texts, best first]}`;
* vqa: the server's `{"question_id", "answer"}`;
* entailment: `{"id" or "sample", "label"}`;
* nlvr: `{"identifier" or "sample", "label"}`, or the official lines `identifier,label`;
* grounding: `{"ref_id" or "sample", "point": [x, y] and/or "box": [left, top, right, bottom]}`.

`sample` names a row of the annotations, as in `dev.jsonl line 3`; the folder in front of it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

from tercet.config import DataConfig
from tercet.data.grounding_readers import open_expressions
from tercet.data.readers import open_sources
from tercet.data.rows import read_objects
from tercet.data.storage import read_text
from tercet.data.table import SampleTable
from tercet.data.task_readers import read_gold, read_results
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError
from tercet.tasks.classification import ENTAILMENT, NLVR, ClassHead, open_entailments, open_statements
from tercet.tasks.evaluation import Metrics
from tercet.tasks.grounding import Localization, as_box, grounding_metrics
from tercet.tasks.retrieval import RANKS
from tercet.tasks.vqa import vqa_accuracy

# A root that no image is ever read from: of a URL the readers do not ask whether the first images are there.
_NO_IMAGES = "memory://"


def score_predictions(task: str, predictions: str, gold: str, data: DataConfig) -> Metrics:
    """Score a file of predictions.

    Args:
        task: 'retrieval', 'vqa', 'entailment', 'nlvr' or 'grounding'.
        predictions: JSON list or lines, as above.
        gold: annotations, as `tercet evaluate --data` takes them.
        data: names of columns; references and instances of grounding.

    Raises:
        TercetError: no such task; a file that is missing or cannot be parsed; a row without a prediction, or a
            prediction without its row.
    """
    if task not in SCORERS:
        raise TercetError(f"nothing to score for {task!r}; the tasks are {', '.join(SCORERS)}")
    return SCORERS[task](predictions, gold, data.model_copy(update={"image_root": _NO_IMAGES}))


def score_retrieval(predictions: str, gold: str, data: DataConfig) -> Metrics:
    """Recall of ranked lists, in percent; a caption that several images have is right with any of them."""
    source = open_sources([gold], data, "test")
    images_of: dict[str, set[str]] = {}
    captions_of: dict[str, set[str]] = {}
    for index in range(source.image_count):
        key = _image_name(source.key(index))
        for caption in source.captions(index):
            cleaned = clean_caption(caption, data.max_words)
            images_of.setdefault(cleaned, set()).add(key)
            captions_of.setdefault(key, set()).add(cleaned)
    ranks: dict[str, dict[str, list[int]]] = {"text": {}, "image": {}}  # by query
    for where, row in read_objects(predictions):
        if isinstance(row.get("caption"), str):
            way, query, right = "image", clean_caption(row["caption"], data.max_words), images_of
            found = [_image_name(name) for name in _names(row, "images", where)]
        elif isinstance(row.get("image"), str):
            way, query, right = "text", _image_name(row["image"]), captions_of
            found = [clean_caption(text, data.max_words) for text in _names(row, "captions", where)]
        else:
            raise TercetError(f"{where}: neither 'caption' nor 'image' names the query")
        if query not in right:
            raise TercetError(f"{where}: {query[:60]!r} is not in {gold}; give the annotations of the same split")
        never = max(len(found), RANKS[-1])
        rank = next((rank for rank, name in enumerate(found) if name in right[query]), never)
        ranks[way].setdefault(query, []).append(rank)
    result: dict[str, float] = {}
    for way, everything in (("text", captions_of), ("image", images_of)):
        if not ranks[way]:
            continue
        missing = next((query for query in everything if query not in ranks[way]), None)
        if missing is not None:
            raise TercetError(f"{predictions}: no results for {missing[:60]!r}; every query of {gold} needs them")
        every = [rank for own in ranks[way].values() for rank in own]
        for rank in RANKS:
            result[f"{way}_r{rank}"] = 100.0 * sum(own < rank for own in every) / len(every)
    if not result:
        raise TercetError(f"{predictions}: no results in it")
    return {"recall": result}


def score_questions(predictions: str, gold: str, data: DataConfig) -> Metrics:
    """The official accuracy of answers; like the official evaluation, it refuses unequal sets of questions."""
    del data  # annotations name no columns
    answers, golds = read_results(predictions), read_gold(gold)
    missing = [question for question in golds if question not in answers]
    if missing:
        raise TercetError(
            f"{predictions}: no answer to question {missing[0]} ({len(missing)} of {len(golds)} questions have none); "
            "every question needs one"
        )
    unknown = [question for question in answers if question not in golds]
    if unknown:
        raise TercetError(
            f"{predictions}: question {unknown[0]} is not among the annotated ones ({len(unknown)} are not); "
            "give the annotations of the same split"
        )
    return {"accuracy": vqa_accuracy((answers[question], gold) for question, gold in golds.items())}


def score_entailment(predictions: str, gold: str, data: DataConfig) -> Metrics:
    """Accuracy and confusion of labels."""
    return _score_labels(ENTAILMENT, read_objects(predictions), predictions, open_entailments([gold], data, "test"))


def score_statements(predictions: str, gold: str, data: DataConfig) -> Metrics:
    """Accuracy and consistency of verdicts."""
    return _score_labels(NLVR, _verdicts(predictions), predictions, open_statements([gold], data, "test"))


def _score_labels(
    head: ClassHead, rows: Iterable[tuple[str, dict[str, Any]]], file: str, source: SampleTable
) -> Metrics:
    matched = _match(rows, source, head.id_key, file, "id")
    numbers = {name.lower(): number for number, name in enumerate(head.classes)}
    chosen = []
    for where, row in matched:
        label = str(row.get("label"))
        if label.lower() not in numbers:
            raise TercetError(f"{where}: the label {label!r} is none of {', '.join(head.classes)}")
        chosen.append(numbers[label.lower()])
    return head.metrics(chosen, [source.sample(index).target for index in range(source.sample_count)])


def score_grounding(predictions: str, gold: str, data: DataConfig) -> Metrics:
    """Pointing and chosen boxes."""
    source = open_expressions([gold], data, "test")
    rows = _match(read_objects(predictions), source, "ref_id", predictions, "ref_id")
    found = []
    for index, (where, row) in enumerate(rows):
        sample = source.sample(index)
        point, box = _numbers(row, "point", 2, where), _numbers(row, "box", 4, where)
        if point is None and box is None:
            raise TercetError(f"{where}: neither 'point' [x, y] nor 'box' [left, top, right, bottom]")
        size = sample.target["size"]
        pair = None if size is None else (size[0], size[1])
        pointed = None if point is None else (point[0], point[1])
        found.append(Localization(sample, pair, pointed, None if box is None else as_box(box)))
    return grounding_metrics(found)


SCORERS: dict[str, Callable[[str, str, DataConfig], Metrics]] = {
    "retrieval": score_retrieval,
    "vqa": score_questions,
    "entailment": score_entailment,
    "nlvr": score_statements,
    "grounding": score_grounding,
}


def _match(
    rows: Iterable[tuple[str, dict[str, Any]]],
    source: SampleTable,
    id_key: str,
    file: str,
    target_key: str,
) -> list[tuple[str, dict[str, Any]]]:
    """The prediction of each sample, in the order of the source, found by `sample` or else by the official id."""
    samples = [source.sample(index) for index in range(source.sample_count)]
    by_name = {_row_name(sample.key): index for index, sample in enumerate(samples)}
    by_id: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_id.setdefault(str(sample.target[target_key]), []).append(index)
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for where, row in rows:
        if isinstance(row.get("sample"), str):
            index = by_name.get(_row_name(row["sample"]))
            name = row["sample"]
        elif row.get(id_key) is not None:
            name = f"{id_key} {row[id_key]}"
            named = by_id.get(str(row[id_key]), [])
            if len(named) > 1:
                raise TercetError(f"{where}: {len(named)} samples have the {name}; name one by 'sample'")
            index = named[0] if named else None
        else:
            raise TercetError(f"{where}: neither 'sample' nor {id_key!r} says which sample it is of")
        if index is None:
            raise TercetError(f"{where}: {name} is not among the annotations; give those of the same split")
        if index in found:
            raise TercetError(f"{where}: a second prediction of {name}; the first is {found[index][0]}")
        found[index] = where, row
    for index, sample in enumerate(samples):
        if index not in found:
            missing = len(samples) - len(found)
            raise TercetError(f"{file}: no prediction of {sample.key} ({missing} of {len(samples)} have none)")
    return [found[index] for index in range(len(samples))]


def _verdicts(file: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Rows of JSON, or of the official evaluation's `identifier,label`."""
    if PurePosixPath(file).suffix.lower() != ".csv":
        yield from read_objects(file)
        return
    for number, line in enumerate(read_text(file).splitlines(), 1):
        identifier, comma, label = line.strip().rpartition(",")
        if not line.strip():
            continue
        if not comma:
            raise TercetError(f"{file} line {number}: {line[:60]!r} is not 'identifier,label'")
        yield f"{file} line {number}", {"identifier": identifier.strip(), "label": label.strip()}


def _numbers(row: dict[str, Any], key: str, count: int, where: str) -> list[float] | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or not all(isinstance(n, int | float) for n in value):
        raise TercetError(f"{where}: {key!r} is {str(value)[:60]!r}, not {count} numbers")
    return value


def _names(row: dict[str, Any], key: str, where: str) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TercetError(f"{where}: {key!r} is {str(value)[:60]!r}, not a list of names, best first")
    return value


def _image_name(key: str) -> str:
    """An image's name; that of a shard's member without the folder of the shard."""
    shard, mark, member = key.partition("#")
    return f"{_row_name(shard)}#{member}" if mark else key


def _row_name(key: str) -> str:
    """A row's name without the folder of its file, which differs from machine to machine."""
    return key.rsplit("/", 1)[-1]
