"""Files of questions, annotations, results and answers: the official rows, named mistakes, where images are."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scene_files import write_image, write_rows
from tercet.config import DataConfig
from tercet.data.task_readers import (
    common_answers,
    open_questions,
    read_answer_list,
    read_gold,
    read_questions,
    read_results,
    results_json,
    weighted_answers,
)
from tercet.errors import TercetError

DATA = DataConfig()
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def annotation(question_id: int, answers: list[str], kind: str = "other") -> dict[str, Any]:
    rows = [{"answer": answer, "answer_confidence": "yes", "answer_id": place} for place, answer in enumerate(answers)]
    return {"question_id": question_id, "image_id": 1, "answer_type": kind, "answers": rows}


@pytest.fixture
def official(data_dir: Path, tmp_path: Path) -> Path:
    """The real rows of the official questions, with annotations and images beside them."""
    source = data_dir / "format_samples" / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.sample.json"
    whole = json.loads(source.read_text())
    (tmp_path / QUESTIONS).write_text(json.dumps(whole))
    rows = [annotation(row["question_id"], ["yes"] * 7 + ["no"] * 3, "yes/no") for row in whole["questions"]]
    (tmp_path / ANNOTATIONS).write_text(json.dumps({"annotations": rows}))
    for row in whole["questions"]:
        write_image(tmp_path / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg")
    return tmp_path / QUESTIONS


def change(path: Path, edit: Any) -> None:
    whole = json.loads(path.read_text())
    edit(whole)
    path.write_text(json.dumps(whole))


def test_official_questions_find_annotations_and_images(official: Path) -> None:
    source = open_questions([str(official)], DATA, "train")
    assert source.sample_count == 12 and source.image_count == 4 and source.images_per_sample == 1
    sample = source.sample(3)
    assert sample.text == "What website copyrighted the picture?"
    assert sample.target["question_id"] == 393225000 and sample.target["answer_type"] == "yes/no"
    assert weighted_answers(sample.target) == pytest.approx({"yes": 0.7, "no": 0.3})
    assert sample.key.endswith("questions 4")
    assert source.key(sample.images[0]) == "val2014/COCO_val2014_000000393225.jpg"
    assert source.pixels(sample.images[0], 10**6).shape == (20, 30, 3)
    assert pickle.loads(pickle.dumps(source)).sample(3) == sample
    assert common_answers(source, 5) == ["yes", "no"]


@pytest.mark.parametrize("form", ["COCO_val2014_{:012d}.jpg", "val2014/{:012d}.jpg", "{:012d}.jpg"])
def test_images_are_found_in_other_layouts(official: Path, tmp_path: Path, form: str) -> None:
    root = tmp_path / "elsewhere"
    write_image(root / form.format(262148))
    source = read_questions(str(official), None, DataConfig(image_root=str(root)), need_answers=True)
    assert source.key(0) == form.format(262148)


def test_test_dev_asks_about_images_of_test(official: Path) -> None:
    change(official, lambda whole: whole.update(data_subtype="test-dev2015"))
    write_image(official.parent / "test2015" / "COCO_test2015_000000262148.jpg")
    source = open_questions([str(official)], DATA, "test")
    assert source.key(0) == "test2015/COCO_test2015_000000262148.jpg"


def test_questions_without_annotations_can_be_answered_but_not_learned(official: Path) -> None:
    (official.parent / ANNOTATIONS).rename(official.parent / "mine.json")
    source = open_questions([str(official)], DATA, "test")
    assert source.sample(0).target == {"question_id": 262148000, "answers": None, "weight": 1.0, "answer_type": None}
    assert common_answers(source, 5) == []
    with pytest.raises(TercetError, match=f"no annotations for it; looked for {ANNOTATIONS}"):
        open_questions([str(official)], DATA, "train")
    named = open_questions([f"{official}#mine.json"], DATA, "train")
    assert named.sample(0).target["answers"] == ["yes"] * 7 + ["no"] * 3
    with pytest.raises(TercetError, match=r"no file .*mine\.jsn; did you mean .*mine\.json"):
        open_questions([f"{official}#mine.jsn"], DATA, "train")


def test_a_question_id_without_annotation_is_named(official: Path) -> None:
    change(official.parent / ANNOTATIONS, lambda whole: whole["annotations"].pop(4))
    with pytest.raises(
        TercetError, match=rf"{QUESTIONS} questions 5: question_id 393225001 has no annotation in .*{ANNOTATIONS}"
    ):
        open_questions([str(official)], DATA, "test")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows[2].pop("question"), r"questions 3: no 'question'; the keys there are image_id, question_id"),
        (lambda rows: rows[2].update(question=7), r"questions 3: 'question' is '7', not a text"),
        (lambda rows: rows[2].update(image_id="x.jpg"), r"questions 3: 'image_id' is 'x.jpg'"),
        (lambda rows: rows[2].pop("question_id"), r"questions 3: no 'question_id'; the keys there are image_id"),
        (lambda rows: rows.append(rows[0]), r"questions 13: question_id 262148000 is that of .* questions 1 already"),
        (lambda rows: rows.insert(0, "x"), r"questions 1: str 'x' is no object"),
        (lambda rows: rows.clear(), r"no samples in it"),
    ],
)
def test_mistakes_in_official_questions_are_named(official: Path, edit: Any, message: str) -> None:
    change(official, lambda whole: edit(whole["questions"]))
    with pytest.raises(TercetError, match=message):
        open_questions([str(official)], DATA, "train")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows[1].update(answers=[]), r"annotations 2: 'answers' is '\[\]'"),
        (lambda rows: rows[1].pop("answers"), r"annotations 2: no 'answers'; the keys there are question_id"),
        (lambda rows: rows[1]["answers"][4].update(answer=3), r"annotations 2: answer 5 is '3', not a text"),
        (lambda rows: rows[1]["answers"].append("ok") or rows[1]["answers"].append(4), r"answer 12 is '4'"),
    ],
)
def test_mistakes_in_annotations_are_named(official: Path, edit: Any, message: str) -> None:
    change(official.parent / ANNOTATIONS, lambda whole: edit(whole["annotations"]))
    with pytest.raises(TercetError, match=message):
        open_questions([str(official)], DATA, "train")


def test_files_of_another_kind_are_refused(official: Path, tmp_path: Path) -> None:
    with pytest.raises(TercetError, match=r"holds annotations; name the file of questions"):
        open_questions([str(official.parent / ANNOTATIONS)], DATA, "train")
    other = tmp_path / "other.json"
    other.write_text('{"images": []}')
    with pytest.raises(TercetError, match="neither official questions"):
        open_questions([str(other)], DATA, "train")
    other.write_text('{"questions": [')
    with pytest.raises(TercetError, match=r"other\.json: the JSON ends too early"):
        open_questions([str(other)], DATA, "train")
    with pytest.raises(TercetError, match="no official annotations"):
        read_gold(write_rows(tmp_path / "third.json", {"images": []}))


def test_albef_files(tmp_path: Path) -> None:
    write_image(tmp_path / "train2014" / "a.jpg")
    file = tmp_path / "vqa_train.json"
    rows: list[dict[str, Any]] = [
        {
            "question_id": 5,
            "question": "What colour?",
            "answer": ["red"] * 6 + ["dark red"] * 4,
            "image": "train2014/a.jpg",
            "dataset": "vqa",
        },
        {"question_id": 5, "question": "Who?", "answer": "a man", "image": "train2014/a.jpg", "dataset": "vg"},
    ]
    file.write_text(json.dumps(rows))
    source = open_questions([str(file)], DATA, "train")
    assert source.sample_count == 2 and source.image_count == 1
    assert weighted_answers(source.sample(0).target) == pytest.approx({"red": 0.6, "dark red": 0.4})
    assert weighted_answers(source.sample(1).target) == {"a man": 0.5}
    with pytest.raises(TercetError, match=r"row 2: question_id 5 is that of .* row 1 already"):
        open_questions([str(file)], DATA, "test")
    rows[1] = {"question_id": 6, "question": "Who?", "image": "train2014/a.jpg", "dataset": "vqa"}
    file.write_text(json.dumps(rows))
    assert open_questions([str(file)], DATA, "test").sample(1).target["answers"] is None
    with pytest.raises(TercetError, match=r"row 2: no 'answer'; the keys there are question_id, question"):
        open_questions([str(file)], DATA, "train")
    with pytest.raises(TercetError, match=r"row 2: no 'answer'"):
        read_gold(str(file))
    file.write_text(json.dumps(rows[:1]))
    assert read_gold(str(file))[5].answers == ("red",) * 6 + ("dark red",) * 4


def test_gold_of_official_rows(data_dir: Path) -> None:
    gold = read_gold(str(data_dir / "format_samples" / "vqav2" / "v2_mscoco_annotations.one_row.json"))
    assert list(gold) == [393714000]
    assert gold[393714000].answers.count("white") == 9 and gold[393714000].answer_type == "other"


def test_gold_of_questions_is_that_of_the_annotations_beside_them(official: Path) -> None:
    change(official, lambda whole: whole["questions"].pop())
    gold = read_gold(str(official))
    assert len(gold) == 11 and gold[262148000].answers == ("yes",) * 7 + ("no",) * 3
    (official.parent / ANNOTATIONS).unlink()
    with pytest.raises(TercetError, match=f"looked for {ANNOTATIONS} beside it"):
        read_gold(str(official))


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(results_json({262148000: "down", 7: "café"}))
    assert json.loads(file.read_text())[0] == {"question_id": 262148000, "answer": "down"}
    assert read_results(str(file)) == {262148000: "down", 7: "café"}
    for text, message in (
        ('{"question_id": 1}', "no list"),
        ('[{"question_id": 1, "answer": 2}]', r"row 1: 'answer' is '2', not a text"),
        ('[{"answer": "x"}]', r"row 1: no 'question_id'"),
        ('[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}]', r"row 2: question_id 1 is that of"),
    ):
        file.write_text(text)
        with pytest.raises(TercetError, match=message):
            read_results(str(file))


def test_lists_of_answers(tmp_path: Path) -> None:
    file, lines = tmp_path / "answers.json", tmp_path / "answers.txt"
    file.write_text('["yes", "no", "2"]')
    lines.write_text("yes\r\nno\n\n2\n")
    assert read_answer_list(str(file)) == read_answer_list(str(lines)) == ["yes", "no", "2"]
    for text, message in (
        ('{"yes": 0}', "no list; a list of answers is JSON like"),
        ("[]", "no answers in it"),
        ('["yes", 2]', r"row 2: '2' is no answer"),
        ('["yes", " "]', r"row 2: ' ' is no answer"),
        ('["yes", "no", "yes"]', r"row 3: 'yes' is in .*row 1 already"),
    ):
        file.write_text(text)
        with pytest.raises(TercetError, match=message):
            read_answer_list(str(file))


def test_images_in_shards(tmp_path: Path, tar: Callable[..., Path], jpeg: Callable[..., bytes]) -> None:
    rows = [{"question_id": n, "question": "Who?", "image": f"images/{n}.jpg", "answer": ["a man"]} for n in (7, 8, 9)]
    file = write_rows(tmp_path / "vqa.json", rows)
    with pytest.raises(TercetError, match=r"vqa\.json: none of its images exists"):
        open_questions([file], DATA, "test")
    tar(tmp_path / "a.tar", [("7.jpg", jpeg(7)), ("9.jpg", jpeg(9)), ("9.txt", b"anything")])
    for data in (DATA, DataConfig(image_root=str(tmp_path / "*.tar")), DataConfig(image_root=str(tmp_path / "a.tar"))):
        source = open_questions([str(file)], data, "test")
        assert [source.sample(index).target["question_id"] for index in range(2)] == [7, 9]
        assert source.image(source.sample(1).images[0]) == jpeg(9)
        assert len(source.rejected) == 1 and source.rejected[0].startswith(f"{file} row 2: no image images/8.jpg in ")
    write_image(tmp_path / "images" / "7.jpg")
    source = open_questions([str(file)], DATA, "test")
    assert source.image_count == 3 and source.key(0) == "images/7.jpg"
