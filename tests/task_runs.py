"""Files of every task over a few small images, and runs and evaluations of tiny models on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tercet.config_io import default_config, load_config
from tercet.distributed import init_distributed
from tercet.errors import TercetError
from tercet.tasks.task import evaluate_task, get_task, open_data
from tercet.train.loop import train
from tiny_model import make_model

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
NAMES = tuple(COLOURS)
TINY: dict[str, Any] = {
    "model.vision.image_size": 32,
    "model.vision.patch_size": 8,
    "model.vision.width": 32,
    "model.vision.depth": 1,
    "model.vision.heads": 2,
    "model.text.width": 32,
    "model.text.mlp_width": 64,
    "model.text.depth": 4,
    "model.text.fusion_layer": 2,
    "model.text.heads": 2,
    "model.text.dropout": 0.0,
    "model.embed_dim": 16,
    "data.tokenizer_size": 100,
    "data.workers": 0,
    "data.augment": "none",
    "objectives.queue_size": 0,
    "optim.lr": 2e-3,
    "optim.warmup_steps": 2,
    "train.device": "cpu",
    "train.batch_size": 8,
    "train.epochs": 100,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
    "evaluate.rerank": 3,
}


def sides(index: int) -> tuple[str, str]:
    """The colours of the left and of the right half of image `index`; nine images differ."""
    return NAMES[index % 3], NAMES[index // 3 % 3]


def write_image(path: Path, index: int, side: int = 32) -> None:
    """A PNG of two coloured halves."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, : side // 2], pixels[:, side // 2 :] = (COLOURS[colour] for colour in sides(index))
    Image.fromarray(pixels).save(path)


def write_task_files(folder: Path, count: int = 8) -> dict[str, str]:
    """Images, and for each task the file that it reads, by the task's name."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for index in range(count):
        name, (left, right) = f"{index}.png", sides(index)
        write_image(folder / name, index)
        beside, other = f"{(index + 1) % count}.png", sides((index + 1) % count)[0]
        captions = [f"{left} beside {right}", f"{right} to the right of {left}"]
        same = str(left == other)
        boxes = [[0, 0, 16, 32]] if left != right else [[0, 0, 32, 32]]
        new = {
            "retrieval": [{"image": name, "caption": captions}],
            "vqa": [
                {"question_id": 2 * index, "question": "which is left?", "answer": [left] * 10},
                {"question_id": 2 * index + 1, "question": "is red right?", "answer": [yes_no(right == "red")] * 10},
            ],
            "entailment": [
                {"image": name, "sentence": f"the left is {left}", "label": "entailment"},
                {"image": name, "sentence": f"the left is {NAMES[index % 3 - 1]}", "label": "contradiction"},
                {"image": name, "sentence": "it is heavy", "label": "neutral"},
            ],
            "nlvr": [{"images": [name, beside], "sentence": "the left sides are equal", "label": same}],
            "grounding": [{"image": name, "text": f"the {left} half", "boxes": boxes, "size": [32, 32]}],
        }
        new["vqa"] = [{"image": name, "dataset": "vqa", **row} for row in new["vqa"]]
        for task, own in new.items():
            rows.setdefault(task, []).extend(own)
    for task, own in rows.items():
        (folder / f"{task}.json").write_text(json.dumps(own), "utf-8")
    files = {task: str(folder / f"{task}.json") for task in rows}
    return files | dict.fromkeys(("pretrain", "embedding", "nlvr_pretrain"), files["retrieval"])


def yes_no(true: bool) -> str:
    return "yes" if true else "no"


def run_task(task: str, file: str, output: Path, **overrides: Any) -> Path:
    """Train `task` on a file into `output`; `a__b=c` sets `a.b`."""
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    return train(default_config({**TINY, "task": task, "data.train": [file], "output": str(output), **keys}))


def logged(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def assert_resumes_exactly(task: str, file: str, folder: Path, **overrides: Any) -> None:
    """A run stopped after a checkpoint and resumed ends bit for bit where an unbroken one does."""
    whole = run_task(task, file, folder / "whole", train__max_steps=7, **overrides)
    part = run_task(task, file, folder / "part", train__max_steps=4, **overrides)
    resumed = train(load_config(part, {"train.max_steps": 7}), resume=part)
    assert [line["loss"] for line in logged(resumed, "train")] == [line["loss"] for line in logged(whole, "train")]
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def evaluations(files: dict[str, str], overrides: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """On one of several ranks: by task (or TASK-ANYTHING), an evaluation of a small random model, or its error; and how
    many images this rank encoded."""
    found: dict[str, Any] = {}
    encoded = 0
    with init_distributed("cpu"):
        for name, file in files.items():
            task = name.partition("-")[0]
            config, model = default_config({**TINY, **overrides}), make_model()

            def count(_module: torch.nn.Module, images: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
                nonlocal encoded
                encoded += len(images[0])

            model.vision.register_forward_hook(count)
            torch.manual_seed(0)
            model.add_heads(get_task(task).heads)
            model.answers = ["red", "green", "blue", "yes"] if task == "vqa" else None
            try:
                result = evaluate_task(task, model.eval(), open_data(task, [file], config.data, "test"), config)
                found[name] = [result.metrics, result.sizes, result.problems, result.predictions]
            except TercetError as error:
                found[name] = str(error)
    return found, encoded
