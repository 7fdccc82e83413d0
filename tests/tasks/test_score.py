"""Prediction files alone: the same numbers as the evaluation that wrote them, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tercet.config import Config, DataConfig
from tercet.errors import TercetError
from tercet.tasks.score import score_predictions
from tercet.tasks.task import evaluate_task, open_data
from tiny_model import make_model


def write(folder: Path, rows: Any, name: str = "predictions.json") -> str:
    (folder / name).write_text(json.dumps(rows), "utf-8")
    return str(folder / name)


@pytest.mark.parametrize("task", ["retrieval", "entailment", "nlvr", "grounding"])
def test_the_numbers_of_the_evaluation_itself(task: str, tmp_path: Path, files: dict[str, str]) -> None:
    config = Config.model_validate({"data": {"workers": 0}, "evaluate": {"rerank": 4}})
    model = make_model()
    model.add_heads(["entailment", "nlvr"])
    result = evaluate_task(task, model, open_data(task, [files[task]], config.data, "test"), config)
    scored = score_predictions(task, write(tmp_path, result.predictions), files[task], DataConfig())
    if task == "retrieval":
        expected = {key: value for key, value in result.metrics["reranked"].items() if "mean" not in key}
        assert scored == {"recall": pytest.approx(expected)}
    else:
        assert scored == {group: pytest.approx(numbers) for group, numbers in result.metrics.items()}


def test_official_nlvr2_lines(data_dir: Path, tmp_path: Path) -> None:
    gold = data_dir / "format_samples/nlvr2/dev.sample.json"
    rows = [json.loads(line) for line in gold.read_text("utf-8").splitlines()]
    lines = [f"{row['identifier']},{row['label'].lower()}" for row in rows]
    wrong = {"True": "false", "False": "true"}[rows[0]["label"]]
    for first, accuracy in ((lines[0], 100), (f"{rows[0]['identifier']},{wrong}", 100 * (1 - 1 / len(rows)))):
        (tmp_path / "lines.csv").write_text("\n".join([first, *lines[1:]]), "utf-8")
        scored = score_predictions("nlvr", str(tmp_path / "lines.csv"), str(gold), DataConfig())
        assert scored["nlvr"]["accuracy"] == pytest.approx(accuracy)


def test_official_snli_ve_rows_by_pair_id(data_dir: Path, tmp_path: Path) -> None:
    gold = data_dir / "format_samples/snli_ve/snli_ve_dev.sample.jsonl"
    rows = [json.loads(line) for line in gold.read_text("utf-8").splitlines()]
    labels = [{"id": row["pairID"], "label": row["gold_label"]} for row in reversed(rows)]
    scored = score_predictions("entailment", write(tmp_path, labels), str(gold), DataConfig())
    assert scored["entailment"]["accuracy"] == 100
    labels = [row | {"label": "maybe"} for row in labels]
    with pytest.raises(TercetError, match=r"predictions\.json row \d+: the label 'maybe' is none of contradiction"):
        score_predictions("entailment", write(tmp_path, labels), str(gold), DataConfig())
    with pytest.raises(TercetError, match="nothing to score for 'embedding'"):
        score_predictions("embedding", write(tmp_path, labels), str(gold), DataConfig())


EXPRESSIONS = [
    {"image": "a.jpg", "text": "the dog", "boxes": [[0, 0, 10, 10]], "size": [40, 40], "ref_id": 3, "split": "val"},
    {"image": "a.jpg", "text": "the cat", "boxes": [[20, 20, 40, 40]], "size": [40, 40], "ref_id": 4, "split": "testA"},
]


def test_grounding_by_points_and_boxes(tmp_path: Path) -> None:
    gold = write(tmp_path, EXPRESSIONS, "gold.json") + "#all"
    rows = [{"ref_id": 4, "box": [20, 20, 40, 30.5]}, {"ref_id": 3, "box": [0, 0, 30, 30]}]
    scored = score_predictions("grounding", write(tmp_path, rows), gold, DataConfig())
    assert scored == {"boxes": {"all": 50.0, "testA": 100.0, "val": 0.0}}
    rows = [{"sample": "elsewhere/gold.json row 1", "point": [5, 5]}, {"sample": "gold.json row 2", "point": [5, 5]}]
    scored = score_predictions("grounding", write(tmp_path, rows), gold, DataConfig())
    assert scored == {"pointing": {"all": 50.0, "centre": 50.0}}


def test_recall_of_ranked_names(tmp_path: Path) -> None:
    gold = write(tmp_path, [{"image": "a.jpg", "caption": ["A dog.", "a cat"]}, {"image": "b.jpg", "caption": "a dog"}])
    rows = [
        {"caption": "a dog", "images": ["b.jpg", "a.jpg"]},  # both images have it
        {"caption": "a cat", "images": ["b.jpg", "a.jpg"]},
        {"image": "a.jpg", "captions": ["a cat"]},
        {"image": "b.jpg", "captions": ["a cat"]},
    ]
    scored = score_predictions("retrieval", write(tmp_path, rows, "ranked.json"), gold, DataConfig())["recall"]
    assert (scored["image_r1"], scored["image_r5"]) == (50, 100)
    assert (scored["text_r1"], scored["text_r10"]) == (50, 50)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"ref_id": 3, "point": [1, 1]}], r"no prediction of .*gold\.json row 2 \(1 of 2"),
        ([{"ref_id": 9, "point": [1, 1]}], "row 1: ref_id 9 is not"),
        ([{"ref_id": 3, "point": [1, 1]}] * 2, "row 2: a second prediction of ref_id 3"),
        ([{"point": [1, 1]}], "row 1: neither 'sample' nor 'ref_id'"),
        ([{"ref_id": 3}, {"ref_id": 4}], "row 1: neither 'point' .* nor 'box'"),
        ([{"ref_id": 3, "box": [1, 2]}, {"ref_id": 4}], r"row 1: 'box' is '\[1, 2\]', not 4 numbers"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    gold = write(tmp_path, EXPRESSIONS, "gold.json") + "#all"
    with pytest.raises(TercetError, match=message):
        score_predictions("grounding", write(tmp_path, rows), gold, DataConfig())
