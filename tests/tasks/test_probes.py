"""Scores of compositional probes, and their evaluation over files and images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from task_runs import write_image
from tercet.config import Config, DataConfig
from tercet.data.table import SampleTable
from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.tasks.probes import choice_scores, crop, open_probes, winoground_scores
from tercet.tasks.task import evaluate_task
from tiny_model import make_model

CAPTIONS = ["red beside red", "green beside red", "blue beside red", "red beside green"]


def config(**evaluate: int) -> Config:
    return Config.model_validate({"data": {"workers": 0}, "evaluate": evaluate})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index in range(4):
        write_image(tmp_path / f"images/{index}.png", index, 64)
    return tmp_path


def pixels(photos: Path, index: int) -> np.ndarray:
    return np.asarray(Image.open(photos / f"images/{index}.png"))


def sugarcrepe(folder: Path, name: str = "swap_obj.json", images: tuple[str, ...] = ("0.png", "1.png")) -> str:
    rows = {
        str(row): {"filename": image, "caption": CAPTIONS[row], "negative_caption": "a red circle"}
        for row, image in enumerate(images)
    }
    (folder / name).write_text(json.dumps(rows), "utf-8")
    return str(folder / name)


def test_a_tie_is_no_choice() -> None:
    scores = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])]
    assert choice_scores(scores, ["a", "a", "a"]) == {"all": pytest.approx(100 / 3)}
    by_kind = choice_scores(scores, ["a", "a", "b"])
    assert by_kind == {"all": pytest.approx(100 / 3), "mean": 25.0, "a": 50.0, "b": 0.0}


def test_of_many_kinds_only_the_frequent_ones_have_a_number() -> None:
    kinds = ["often"] * 30 + [f"kind {number}" for number in range(20)]
    found = choice_scores([torch.tensor([[1.0, 0.0]])] * 50, kinds)
    assert set(found) == {"all", "mean", "often"}


def test_winoground_asks_for_both_images_and_both_texts() -> None:
    both = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    text_only = torch.tensor([[2.0, 1.0], [3.0, 4.0]])  # image 1 beats image 0 for text 0
    image_only = torch.tensor([[2.0, 3.0], [1.0, 4.0]])
    neither = torch.zeros(2, 2)
    found = winoground_scores([both, text_only, image_only, neither], ["a", "a", "b", "b"])
    assert found == {"text": 50.0, "image": 50.0, "group": 25.0, "group a": 50.0, "group b": 0.0}


def test_sugarcrepe_by_both_scorers(photos: Path) -> None:
    model = make_model()
    files = [sugarcrepe(photos), sugarcrepe(photos, "add_att.json", ("2.png", "3.png"))]
    probes = open_probes(files, DataConfig(), "test")
    result = evaluate_task("probes", model, probes, config(batch_size=3))
    metrics = result.metrics
    assert set(metrics) == {"similarity", "matching"}
    assert set(metrics["matching"]) == {"all", "mean", "swap_obj", "add_att"}
    assert result.sizes == {"samples": 4}
    # The same numbers as the one-line calls give.
    texts = result.predictions[1]["texts"]
    predictor, image = Predictor(model), pixels(photos, 1)
    similarity, chance = predictor.similarity(image, texts), predictor.match(image, texts)
    assert isinstance(similarity, torch.Tensor) and isinstance(chance, torch.Tensor)
    torch.testing.assert_close(torch.tensor(result.predictions[1]["similarity"][0]), similarity, rtol=1e-4, atol=1e-5)
    first, second = result.predictions[1]["matching"][0]
    assert (first > second) == (chance[0] > chance[1])


def test_winoground_names_images_without_their_ending(photos: Path) -> None:
    row = {"image_0": "0", "image_1": "1", "caption_0": CAPTIONS[0], "caption_1": CAPTIONS[1]}
    (photos / "examples.jsonl").write_text(json.dumps(row), "utf-8")
    probes = open_probes([str(photos / "examples.jsonl")], DataConfig(), "test")
    result = evaluate_task("probes", make_model(), probes, config())
    assert torch.tensor(result.predictions[0]["matching"]).shape == (2, 2)
    assert set(result.metrics["similarity"]) == {"text", "image", "group"}


def test_aro_crops_to_the_box(photos: Path) -> None:
    def probes_at(left: int) -> SampleTable:
        row = {"image_path": "0.png", "bbox_x": left, "bbox_y": 4, "bbox_w": 30, "bbox_h": 20, "relation_name": "on"}
        row |= {"true_caption": "a circle on a star", "false_caption": "a star on a circle"}
        (photos / "rows.json").write_text(json.dumps([row]), "utf-8")
        return open_probes([str(photos / "rows.json")], DataConfig(), "test")

    inside = probes_at(8)
    assert np.array_equal(crop(inside.pixels(0, 10**6), inside.sample(0)), pixels(photos, 0)[4:24, 8:38])
    with pytest.raises(TercetError, match=r"rows\.json row 1: the box \(64, 4, 94, 24\) lies outside .* 64x64"):
        evaluate_task("probes", make_model(), probes_at(64), config())


def test_broken_images_are_skipped_and_named(photos: Path) -> None:
    (photos / "images/1.png").write_bytes(b"no image")
    file = sugarcrepe(photos, images=("0.png", "1.png", "9.png"))
    result = evaluate_task("probes", make_model(), open_probes([file], DataConfig(), "test"), config())
    assert result.sizes == {"samples": 1}
    for row, problem in enumerate(result.problems, 1):
        assert f"swap_obj.json row '{row}'" in problem and ("1.png", "9.png")[row - 1] in problem


def test_errors(photos: Path, tmp_path: Path) -> None:
    other = photos / "other.jsonl"
    other.write_text(json.dumps({"image_0": "0", "image_1": "1", "caption_0": "a", "caption_1": "b"}), "utf-8")
    with pytest.raises(TercetError, match=r"is of winoground, .* of sugarcrepe; measure one benchmark at a time"):
        open_probes([sugarcrepe(photos), str(other)], DataConfig(), "test")
    with pytest.raises(TercetError, match=r"none of its images exists, .* set data\.image_root"):
        open_probes([sugarcrepe(photos, images=("8.png", "9.png"))], DataConfig(), "test")
