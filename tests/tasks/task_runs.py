"""Runs of downstream tasks, tiny and on drawn scenes, by the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tercet.config_io import load_config
from tercet.train.loop import train
from tiny_run import TINY_MODEL

TINY: dict[str, Any] = {
    **TINY_MODEL,
    "model.text.depth": 4,
    "model.text.fusion_layer": 2,
    "model.text.dropout": 0.0,
    "data.tokenizer_size": 150,
    "data.scenes": 8,
    "data.workers": 0,
    "data.augment": "none",
    "data.share_images": False,
    "data.validation": [],
    "data.test": [],
    "train.device": "cpu",
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
    "train.epochs": 100,
    "evaluate.limit": 24,
    "objectives.alpha": 0.4,
    "optim.lr": 2e-3,
    "optim.warmup_steps": 2,
}


def run_task(recipe: str, output: Path, **overrides: Any) -> Path:
    """Train `recipe` on drawn scenes into `output`; `a__b=c` sets `a.b`."""
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    return train(load_config(recipe, {**TINY, "output": str(output), **keys}))


def logged(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def assert_resumes_exactly(recipe: str, folder: Path, **overrides: Any) -> None:
    """A run cut off after a checkpoint and gone on with ends bit for bit where an unbroken one does."""
    whole = run_task(recipe, folder / "whole", train__max_steps=7, **overrides)
    part = run_task(recipe, folder / "part", train__max_steps=4, **overrides)
    resumed = train(load_config(part, {"train.max_steps": 7}), resume=part)
    assert [line["loss"] for line in logged(resumed, "train")] == [line["loss"] for line in logged(whole, "train")]
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
