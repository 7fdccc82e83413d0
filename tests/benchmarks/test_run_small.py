"""Each benchmark runs small, compares the same computation both ways, and reports what it counted."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from step import OurStep, PlainStep, draw_batch
from task_runs import write_task_files
from tercet.config import Config
from tercet.model.hub import save_model
from tiny_model import make_model

TINY = {
    "vision": {"image_size": 32, "width": 32, "depth": 1, "heads": 2},
    "text": {"width": 32, "mlp_width": 64, "depth": 2, "fusion_layer": 1, "heads": 2, "vocabulary_size": 200},
}


def run_quick(name: str, *options: str) -> dict[str, Any]:
    """The numbers that a benchmark prints."""
    command = [sys.executable, str(import_module(name).__file__), "--quick", *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.parametrize("int8", [False, True])
def test_encode(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = import_module("encode")
    monkeypatch.setattr(encode, "QUICK_MODEL", TINY)
    settings = {"quick": True, "plain": True, "return_memory": False, "device": "cpu", "compile": False}
    result = encode.measure(
        argparse.Namespace(**settings, int8=int8, images=2, batch=4, rounds=1, processor_time=False)
    )
    assert result["ours"] > 0 and result["ratio"] > 0
    assert min(result["least_cosine_to_plain"].values()) > (0.99 if int8 else 0.99999)


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    startup = import_module("startup")
    monkeypatch.setattr(startup, "QUICK_MODEL", TINY)
    result = startup.measure(argparse.Namespace(quick=True, repeats=1))
    assert result["folder_mb"] > 0.1 and 0 < result["import_seconds"] < 1 and 0 < result["help_seconds"] < 5


def test_memory_of_a_small_step_is_estimated_within_15_percent() -> None:
    found = run_quick("memory")
    assert found["size"] == "small" and found["ours"] > 0
    assert found["ratio"] == pytest.approx(1, abs=0.15)


def test_reranking_few_captions_of_a_small_image() -> None:
    found = run_quick("rerank", "--image-size", "64", "--captions", "6", "--images", "2", "--rounds", "1")
    assert found["name"] == "rerank" and found["ours"] > 0
    assert found["gflop_per_pair"]["ours"] < found["gflop_per_pair"]["plain"]


def test_search(tmp_path: Path) -> None:
    settings = argparse.Namespace(count=4000, dim=16, queries=30, folder=str(tmp_path), faiss=False)
    result = import_module("search").measure(settings)
    assert result["exact"]["recall"] == 1 and result["same"]["recall"] >= 0.97 and result["shifted"]["recall"] >= 0.95
    assert 0 < result["same"]["p50_ms"] <= result["same"]["p95_ms"]
    assert not list(tmp_path.iterdir())


def test_serving_in_batches_and_one_by_one() -> None:
    result = import_module("serve").measure_calls("tiny", images=8, loads=["embed", "search"], jobs=4, rounds=1)
    assert set(result["ratio"]) == {"embed", "search"} and min(result["ratio"].values()) > 0


def test_both_steps_learn() -> None:
    torch.manual_seed(0)
    model = {"vision": {**TINY["vision"], "patch_size": 8}, "text": TINY["text"], "embed_dim": 16}
    objectives, train = {"queue_size": 16, "alpha_warmup": 0}, {"device": "cpu", "precision": "fp32"}
    config = Config.model_validate({"model": model, "objectives": objectives, "train": train})
    batch = draw_batch(config.model, 4, 7)
    ours = OurStep(config, batch)
    plain = PlainStep(config, batch, ours.task.student)
    before = ours.task.student.mlm_head.state_dict()["bias"].clone()
    for step in (ours, plain):
        step()
        step()
    assert ours.state.step == 2
    assert not torch.equal(before, ours.task.student.mlm_head.state_dict()["bias"])


def test_a_task_from_a_model_and_from_random_weights(tmp_path: Path) -> None:
    file = write_task_files(tmp_path)["entailment"]
    save_model(make_model(), tmp_path / "model")
    settings = [f"data.{split}={file}" for split in ("train", "validation", "test")]
    settings += ["data.workers=0", "train.epochs=2", "train.max_steps=2", "train.device=cpu"]
    settings += ["model.vision.image_size=32"]
    found = import_module("tasks").run_pair("entailment", tmp_path, str(tmp_path / "model"), settings)
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
