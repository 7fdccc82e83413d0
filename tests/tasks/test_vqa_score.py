"""The official accuracy: its rules one by one, and whole files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.config import DataConfig
from tercet.data.vqa_files import Gold, results_json
from tercet.errors import TercetError
from tercet.tasks.score import score_predictions
from tercet.tasks.vqa import CONTRACTIONS, answer_accuracy, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("the red  one", "red 1"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("A man and an apple", "man and apple"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets go", "lets go"),
        ("Im", "im"),
        # A mark beside a space goes; one inside a word becomes a space.
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("wii-mote -", "wiimote"),
        # A comma inside a number makes every mark go.
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        # A period stays in front of a digit alone.
        ("3.5", "3.5"),
        ("10:30 a.m.", "10:30 am"),
        ("st. louis.", "st louis"),
        ("2. ", "2"),
        ("'ows'at", "'ow's'at"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_officially(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_every_contraction_differs_from_its_right_form_by_an_apostrophe() -> None:
    assert len(CONTRACTIONS) == 114  # of the official list, those that are not capitalised
    for wrong, right in CONTRACTIONS.items():
        assert abs(len(wrong) - len(right)) == 1
        assert wrong.replace("'", "") == right.replace("'", "")


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_number_of_agreeing_annotators(agreeing: int, expected: float) -> None:
    annotators = ["red"] * agreeing + [f"other {index}" for index in range(10 - agreeing)]
    assert answer_accuracy("red", annotators) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["red", "blue", "The red", "2", "two"]), min_size=2, max_size=10), st.data())
def test_accuracy_is_the_mean_over_all_but_one_annotator(annotators: list[str], data: st.DataObject) -> None:
    answer = data.draw(st.sampled_from(["red", "two", "green"]))
    if len(set(annotators)) > 1:
        golds, found = [normalise(gold) for gold in annotators], normalise(answer)
    else:
        golds, found = annotators, answer
    subsets = list(itertools.combinations(range(len(golds)), len(golds) - 1))
    each = [min(1.0, sum(golds[index] == found for index in subset) / 3) for subset in subsets]
    assert answer_accuracy(answer, annotators) == pytest.approx(sum(each) / len(each))


def test_answers_that_all_annotators_share_are_compared_as_they_stand() -> None:
    assert answer_accuracy("two", ["2"] * 10) == 0.0
    assert answer_accuracy("two", ["2"] * 9 + ["3"]) == 1.0
    assert answer_accuracy("red\n", ["red"] * 10) == 1.0


def test_one_annotator_is_right_or_wrong() -> None:
    assert answer_accuracy("The Dog", ["dog"]) == 1.0
    assert answer_accuracy("cat", ["dog"]) == 0.0


def test_accuracy_by_answer_type() -> None:
    golds = [Gold(("yes",) * 10, "yes/no", "a"), Gold(("2",) * 10, "number", "b"), Gold(("no",) * 10, "yes/no", "c")]
    accuracy = vqa_accuracy(zip(["yes", "3", "yes"], golds, strict=True))
    assert accuracy == {"all": pytest.approx(100 / 3), "number": 0.0, "yes/no": 50.0}
    with pytest.raises(TercetError, match="no answered question"):
        vqa_accuracy([])


def test_an_official_annotation_is_scored_from_files(data_dir: Path, tmp_path: Path) -> None:
    gold = data_dir / "format_samples" / "vqav2" / "v2_mscoco_annotations.one_row.json"
    found = {}
    for answer in ("white", "light blue", "Light-Blue", "black"):
        predictions = tmp_path / "results.json"
        predictions.write_text(results_json({393714000: answer}))
        found[answer] = score_predictions("vqa", str(predictions), str(gold), DataConfig())["accuracy"]["all"]
    assert found == pytest.approx({"white": 100.0, "light blue": 30.0, "Light-Blue": 30.0, "black": 0.0})


def test_missing_and_unknown_questions_are_named(tmp_path: Path) -> None:
    gold, predictions = tmp_path / "gold.json", tmp_path / "results.json"
    gold.write_text(json.dumps([{"question_id": 7 + index, "answer": ["red"] * 10} for index in range(3)]))
    predictions.write_text(results_json({7: "red"}))
    with pytest.raises(TercetError, match=r"results\.json: no answer to question 8 \(2 of 3"):
        score_predictions("vqa", str(predictions), str(gold), DataConfig())
    predictions.write_text(results_json({7: "red", 8: "red", 9: "red", 10: "red"}))
    with pytest.raises(TercetError, match=r"results\.json: question 10 is not among"):
        score_predictions("vqa", str(predictions), str(gold), DataConfig())
