"""Training and evaluation in bf16, which a processor with AMX takes by itself, beside fp32; any processor can do it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from task_runs import logged, run_task

from tercet.config_io import load_config
from tercet.data.scenes import SceneSource
from tercet.tasks.evaluation import TaskResult
from tercet.tasks.retrieval import RetrievalResult
from tercet.tasks.task import evaluate_task, get_task, open_data
from tiny_model import make_model

RECIPES = ["demo", "demo-vqa", "demo-entailment", "demo-nlvr-pretrain", "demo-nlvr", "demo-grounding"]
TASKS = ["retrieval", "embedding", "entailment", "nlvr", "nlvr_pretrain", "vqa", "grounding", "classify", "probes"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_task_trains_in_bf16_as_in_fp32(recipe: str, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        sections = {"train__precision": precision, "evaluate__precision": precision, "train__max_steps": 3}
        run = run_task(recipe, tmp_path / precision, data__test=["scenes:test"], evaluate__rerank=2, **sections)
        found[precision] = [line["loss"] for line in logged(run, "train")]
        assert len(found[precision]) == 3
        assert logged(run, "evaluate")[-1]["data"] == "test"
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["bf16"] != found["fp32"]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_measured_in_bf16_as_in_fp32(task: str, tmp_path: Path) -> None:
    exact, rough = (measure(task, precision, tmp_path) for precision in ("fp32", "bf16"))
    assert rough.sizes == exact.sizes
    assert rough.metrics.keys() == exact.metrics.keys()
    for group, numbers in exact.metrics.items():
        assert rough.metrics[group].keys() == numbers.keys()


def test_scores_that_fp32_tells_apart_are_not_tied(tmp_path: Path) -> None:
    exact, rough = (measure("retrieval", precision, tmp_path) for precision in ("fp32", "bf16"))
    assert isinstance(exact, RetrievalResult) and isinstance(rough, RetrievalResult)
    assert rough.similarities.dtype == torch.float32
    torch.testing.assert_close(rough.similarities, exact.similarities, rtol=0, atol=0.02)
    assert len(rough.similarities.unique()) == len(exact.similarities.unique())
    assert len(rough.scores.image_to_text.unique()) == len(exact.scores.image_to_text.unique())


def measure(task: str, precision: str, folder: Path) -> TaskResult:
    """What a small random model is found to do on drawn scenes."""
    scenes, source = SceneSource(8, "test", distinct=True), "scenes:test"
    for index in range(8):
        label = folder / ("even" if index % 2 == 0 else "odd")
        label.mkdir(exist_ok=True)
        (label / f"{index}.png").write_bytes(scenes.image(index))
    if task == "classify":
        source = str(folder)
    if task == "probes":
        texts = {"caption": scenes.captions(1)[0], "negative_caption": scenes.captions(2)[0]}
        rows = {"0": {"filename": "odd/1.png", **texts}, "1": {"filename": "even/2.png", **texts}}
        (folder / "crepe.json").write_text(json.dumps(rows))
        source = str(folder / "crepe.json")
    sections = {"data.workers": 0, "evaluate.limit": 12, "evaluate.rerank": 4, "evaluate.precision": precision}
    config = load_config("demo", {**sections, "classify.train": [str(folder)], "classify.shots": [1]})
    model = make_model()
    torch.manual_seed(0)
    model.add_heads(get_task(task).heads)
    if task == "vqa":
        model.answers = ["yes", "no", "red", "two"]
    return evaluate_task(task, model.eval(), open_data(task, [source], config.data, "test"), config)
