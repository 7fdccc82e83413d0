"""The benchmarks of the downstream tasks and of filtering run, and count what they say."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from task_runs import write_task_files
from tercet.model.hub import save_model
from tiny_model import make_model


def test_a_task_from_a_model_and_from_random_weights(tmp_path: Path) -> None:
    tasks = import_module("tasks")
    file = write_task_files(tmp_path)["entailment"]
    save_model(make_model(), tmp_path / "model")
    data = [f"data.{split}={file}" for split in ("train", "validation", "test")]
    settings = [
        *data,
        "data.workers=0",
        "train.epochs=2",
        "train.max_steps=2",
        "train.device=cpu",
        "model.vision.image_size=32",
    ]
    found = tasks.run_pair("entailment", tmp_path, str(tmp_path / "model"), settings)
    assert found.keys() == {"pre-trained", "random"}
    for start, run in found.items():
        assert run["steps"] == 2 and run["size"] == {"samples": 24}
        assert run["score"] == run["numbers"]["entailment"]["accuracy"]
        assert ("--init" in run["commands"][0]) == (start == "pre-trained")


def test_filtering(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "model")
    result = import_module("filtering").measure(argparse.Namespace(model=tmp_path / "model", quick=True, wrong=0.4))
    assert result["pairs"] == 200
    for by in ("match", "similarity"):
        assert 0 <= result[by]["auc"] <= 1 and result[by]["kept"] >= 120
