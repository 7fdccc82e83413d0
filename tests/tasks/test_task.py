"""What a task's training loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tercet.config import DataConfig
from tercet.config_io import load_config
from tercet.data.loader import TrainLoader
from tercet.data.scenes import SceneSource
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.tasks.task import build_loader, further_texts, open_data
from tercet.train.setup import find_tokenizer

NO_TEACHER = {"objectives": {"teacher": False, "imc": 0, "lmi": 0, "queue_size": 0}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["a small red circle", "two large blue stars"]), 100)


@pytest.mark.parametrize(
    ("recipe", "settings", "views"), [("demo", {}, 2), ("demo", NO_TEACHER, 1), ("demo-nlvr-pretrain", {}, 1)]
)
def test_a_second_view_is_made_where_a_teacher_sees_it(
    recipe: str, settings: dict[str, Any], views: int, tokenizer: Tokenizer
) -> None:
    config = load_config(recipe, {**settings, "data.workers": 0, "train.batch_size": 2})
    loader = build_loader(config, SceneSource(4), tokenizer, 64)
    assert isinstance(loader, TrainLoader)
    batch = next(loader.batches(0))
    assert (batch.second_views is not None) == (views == 2)


class TestFurtherTexts:
    def test_a_new_tokenizer_spells_the_words_of_the_tasks_in_one_piece(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        file = tmp_path / "questions.json"
        row = {"image": "a.png", "question": "Which zeppelin?", "answer": ["none"], "dataset": "vqa"}
        file.write_text(json.dumps([row] * 3))
        entries = [f"vqa={file}", "grounding=scenes"]
        settings = {"data.scenes": 40, "data.tokenizer_size": 400, "data.tokenizer_texts": entries}
        words = {
            name: find_tokenizer(config, open_data("pretrain", ["scenes"], config.data, "train"), tmp_path / "none")[0]
            for name, config in (
                ("without", load_config("demo", {**settings, "data.tokenizer_texts": []})),
                ("with", load_config("demo", settings)),
            )
        }
        spelled = {name: len(words[name].encode(["which zeppelin is leftmost"], 40)[0][0]) for name in words}
        assert spelled["with"] == 1 + 4  # [CLS] and the words
        assert spelled["without"] > 10

    def test_the_demo_knows_the_words_of_every_task(self, tmp_path: Path) -> None:
        config = load_config("demo", {"data.scenes": 300})
        source = open_data("pretrain", ["scenes"], config.data, "train")
        words = find_tokenizer(config, source, tmp_path / "none")[0]
        asked = [
            "how many purple diamonds are there",
            "what colour is the cross",
            "on which side of the ring is the star",
        ]
        for text in asked:
            assert len(words.encode([text], 40)[0][0]) == 1 + len(text.split()), text

    @pytest.mark.parametrize("entry", ["scenes", "captioning=scenes", "=scenes", "probes=probes.json"])
    def test_an_entry_that_names_no_task_is_refused(self, entry: str) -> None:
        with pytest.raises(TercetError, match=r"data\.tokenizer_texts: .* is not TASK=SOURCE.*pretrain, retrieval"):
            list(further_texts(DataConfig(tokenizer_texts=[entry])))

    def test_a_missing_file_is_named(self) -> None:
        with pytest.raises(TercetError, match=r"nowhere\.json"):
            list(further_texts(DataConfig(tokenizer_texts=["vqa=nowhere.json"])))
