"""The model card of a run says what the run knows, and is Markdown with YAML in front."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tercet.config_io import load_config
from tercet.train.model_card import RECALLS, run_card
from tiny_model import make_model


def front_matter(card: str) -> dict:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_card_of_a_run(tmp_path: Path) -> None:
    recall = {name: 10.0 + number for number, name in enumerate(RECALLS)}
    lines = [
        {"kind": "train", "step": 10, "loss": 1.0},
        {"kind": "evaluate", "step": 20, "data": "test", "dual": recall, "size": {"images": 60, "texts": 300}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    (tmp_path / "run.json").write_text(json.dumps({"pairs": 4000, "machine": "2 cores"}))
    keys = {"objectives.itm": 0, "train.seed": 5, "train.batch_size": 32, "data.train": ["/home/me/photos"]}
    config = load_config("demo", keys)
    card = run_card(make_model(), config, tmp_path)
    assert front_matter(card)["model-index"][0]["results"][0]["metrics"][0] == {
        "type": "image_r1",
        "name": "dual image_r1",
        "value": 10.0,
    }
    for expected in (
        "4,000 texts with their images, from `photos`. It started from random weights.",
        "| steps | 20 of 32 pairs each |",
        "| seed | 5 |",
        "| dual encoder | 10.0 | 11.0 |",
        "60 images, 300 texts)",
        "Its matching head was not trained",
    ):
        assert expected in card
    assert "/home/me" not in card


def test_card_of_a_task_without_evaluation(tmp_path: Path) -> None:
    card = run_card(make_model(), load_config("demo-vqa", {"init": "somebody/start"}), tmp_path)
    assert front_matter(card)["pipeline_tag"] == "visual-question-answering"
    assert "Answering short questions" in card
    assert "weights of `somebody/start`" in card
    assert "It was not evaluated" in card
