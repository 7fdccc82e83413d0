"""Training and evaluation in bf16, which a processor with AMX takes by itself, beside fp32; any processor can do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from task_runs import TINY, logged, run_task
from tercet.config_io import default_config
from tercet.tasks.evaluation import TaskResult
from tercet.tasks.retrieval import RetrievalResult
from tercet.tasks.task import evaluate_task, get_task, open_data
from tiny_model import make_model


@pytest.mark.parametrize("task", ["pretrain", "vqa", "entailment", "nlvr_pretrain", "nlvr", "grounding"])
def test_a_task_trains_in_bf16_as_in_fp32(task: str, tmp_path: Path, files: dict[str, str]) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        sections = {"train__precision": precision, "evaluate__precision": precision, "train__max_steps": 3}
        run = run_task(task, files[task], tmp_path / precision, data__test=[files[task]], **sections)
        found[precision] = [line["loss"] for line in logged(run, "train")]
        assert len(found[precision]) == 3
        assert logged(run, "evaluate")[-1]["data"] == "test"
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["bf16"] != found["fp32"]


def rows_of(*names: str) -> Callable[[TaskResult], list[Any]]:
    return lambda result: [row[name] for row in result.predictions for name in names]


# Numbers of an evaluation that move little with the precision, unlike a rank or a class, which jumps.
NUMBERS: dict[str, Callable[[TaskResult], list[Any]]] = {
    "entailment": lambda result: [list(row["probabilities"].values()) for row in result.predictions],
    "nlvr": lambda result: [list(row["probabilities"].values()) for row in result.predictions],
    "probes": rows_of("similarity", "matching"),
    "embedding": lambda result: [result.metrics["embeddings"][name] for name in sorted(result.metrics["embeddings"])],
    "retrieval": lambda result: result.similarities.tolist() if isinstance(result, RetrievalResult) else [],
}


@pytest.mark.parametrize("task", NUMBERS)
def test_a_task_is_measured_in_bf16_as_in_fp32(task: str, tmp_path: Path, files: dict[str, str]) -> None:
    exact, rough = (measure(task, precision, tmp_path, files) for precision in ("fp32", "bf16"))
    assert (rough.sizes, rough.problems) == (exact.sizes, exact.problems)
    first, second = (torch.tensor(NUMBERS[task](result)).flatten() for result in (exact, rough))
    torch.testing.assert_close(second, first, rtol=0.03, atol=0.02)
    assert not torch.equal(first, second)
    if isinstance(exact, RetrievalResult) and isinstance(rough, RetrievalResult):  # nor does bf16 tie any scores
        assert rough.similarities.dtype == torch.float32
        assert len(rough.similarities.unique()) == len(exact.similarities.unique())
        assert len(rough.scores.image_to_text.unique()) == len(exact.scores.image_to_text.unique())


def measure(task: str, precision: str, folder: Path, files: dict[str, str]) -> TaskResult:
    """An evaluation of a small random model."""
    images = Path(files["retrieval"]).parent
    texts = {"caption": "red beside green", "negative_caption": "green beside red"}
    (folder / "crepe.json").write_text(json.dumps({"0": {"filename": "1.png", **texts}}))
    keys = {"data.image_root": str(images), "evaluate.precision": precision}
    config, model = default_config({**TINY, **keys}), make_model()
    torch.manual_seed(0)
    model.add_heads(get_task(task).heads)
    file = str(folder / "crepe.json") if task == "probes" else files[task]
    return evaluate_task(task, model.eval(), open_data(task, [file], config.data, "test"), config)
