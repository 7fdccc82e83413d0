"""The tasks by name, what their training loads, and the texts that their tokenizer is trained on."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.config import DataConfig
from tercet.config_io import default_config
from tercet.errors import TercetError
from tercet.tasks.task import MODULES, build_loader, further_texts, get_task, open_data, tokenizer_texts
from tiny_model import make_model

NO_TEACHER = {"objectives.teacher": False, "objectives.imc": 0, "objectives.lmi": 0, "objectives.queue_size": 0}


def test_every_task_is_found_by_its_name() -> None:
    assert all(get_task(name).evaluate for name in MODULES)
    with pytest.raises(TercetError, match="no task 'captioning'; the tasks are pretrain, retrieval"):
        get_task("captioning")


@pytest.mark.parametrize(
    ("task", "settings", "views"), [("pretrain", {}, 2), ("pretrain", NO_TEACHER, 1), ("nlvr_pretrain", {}, 1)]
)
def test_a_second_view_is_made_where_a_teacher_sees_it(
    task: str, settings: dict[str, Any], views: int, files: dict[str, str]
) -> None:
    config = default_config({**settings, "task": task, "data.workers": 0, "train.batch_size": 2})
    tokenizer = make_model().tokenizer
    assert tokenizer is not None
    loader = build_loader(config, open_data(task, [files[task]], config.data, "train"), tokenizer, 32)
    assert (next(loader.batches(0)).second_views is not None) == (views == 2)


def test_a_tokenizer_is_trained_on_the_texts_of_its_task_and_of_further_ones(files: dict[str, str]) -> None:
    data = DataConfig(tokenizer_texts=[f"vqa={files['vqa']}", f"grounding={files['grounding']}"])
    own = set(tokenizer_texts("pretrain", open_data("pretrain", [files["pretrain"]], data, "train"), data))
    assert len(own) == 16 and {"red beside green", "green to the right of red"} <= own
    assert {"which is left", "yes", "red", "the green half"} <= set(further_texts(data))


@pytest.mark.parametrize(
    ("entry", "message"),
    [("vqa=nowhere.json", r"nowhere\.json")]
    + [
        (entry, r"data\.tokenizer_texts: .* is not TASK=SOURCE.*pretrain, retrieval")
        for entry in ("pairs.json", "captioning=pairs.json", "=pairs.json", "probes=probes.json")
    ],
)
def test_an_entry_without_task_or_file_is_refused(entry: str, message: str) -> None:
    with pytest.raises(TercetError, match=message):
        list(further_texts(DataConfig(tokenizer_texts=[entry])))
