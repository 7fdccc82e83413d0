"""What a task's training loads."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.config_io import load_config
from tercet.data.loader import TrainLoader
from tercet.data.scenes import SceneSource
from tercet.data.texts import Tokenizer
from tercet.tasks.build import build_loader

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
