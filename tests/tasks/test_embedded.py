"""Evaluations of frozen features over files: classes in folders, and captions of scenes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tercet.config import Config
from tercet.errors import TercetError
from tercet.tasks.task import build_task, evaluate_task, open_data
from tiny_model import make_model

COLOURS = {"red_square": (0, 0, 255), "blue_square": (255, 0, 0), "green_square": (0, 255, 0)}


def draw_folders(root: Path, count: int, seed: int, colours: dict[str, tuple[int, int, int]] = COLOURS) -> str:
    """A folder for each colour, of noisy images."""
    rng = np.random.default_rng(seed)
    for label, colour in colours.items():
        (root / label).mkdir(parents=True)
        for number in range(count):
            image = np.clip(np.array(colour) + rng.integers(-60, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(root / label / f"{number}.png"), image)
    return str(root)


def config(**classify: object) -> Config:
    return Config.model_validate({"data": {"workers": 0}, "classify": classify})


def test_classes_by_name_and_by_probe(tmp_path: Path) -> None:
    train, test = draw_folders(tmp_path / "train", 4, 0), draw_folders(tmp_path / "test", 5, 1)
    settings = config(train=[train], shots=[1, 2, 8])
    source = open_data("classify", [test], settings.data, "test")
    result = evaluate_task("classify", make_model(), source, settings)
    metrics = result.metrics
    assert result.sizes == {"images": 15, "classes": 3}
    assert 0 <= metrics["zero-shot"]["r1"] <= 100
    # Colours are told apart even by random features; 8 shots are more than there are.
    assert metrics["linear probe"]["all"] > 90
    assert set(metrics["linear probe"]) == {"1 shots", "1 shots, deviation", "2 shots", "2 shots, deviation", "all"}
    rows = result.predictions
    assert rows[0]["gold"] == "blue square" and rows[0]["image"] == "blue_square/0.png"
    assert sum(row["label"] == row["gold"] for row in rows) / 0.15 == pytest.approx(metrics["zero-shot"]["r1"])


def test_what_is_refused(tmp_path: Path) -> None:
    test = draw_folders(tmp_path / "test", 2, 0)
    train = draw_folders(tmp_path / "train", 2, 1, {key: COLOURS[key] for key in ("red_square", "blue_square")})
    one = draw_folders(tmp_path / "one", 2, 2, {"red_square": COLOURS["red_square"]})
    settings = config(train=[train])
    with pytest.raises(TercetError, match=r"classify\.train has no image of 'green square'"):
        evaluate_task("classify", make_model(), open_data("classify", [test], settings.data, "test"), settings)
    with pytest.raises(TercetError, match="all images have the label 'red square'"):
        evaluate_task("classify", make_model(), open_data("classify", [one], settings.data, "test"), settings)
    with pytest.raises(TercetError, match="classify is measured, not trained"):
        build_task(settings.model_copy(update={"task": "classify"}), make_model())


def test_quality_of_the_space_on_scenes() -> None:
    settings = Config.model_validate({"data": {"workers": 0, "scenes": 20}})
    source = open_data("embedding", ["scenes:train"], settings.data, "train")
    result = evaluate_task("embedding", make_model(), source, settings)
    assert result.sizes == {"images": 20, "texts": 60}
    metrics = result.metrics
    assert 0 <= metrics["space"]["alignment"] <= 4
    assert metrics["space"]["image_uniformity"] <= 0
    assert 0 <= metrics["neighbourhood"]["caption_r1"] <= 100
