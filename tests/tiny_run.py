"""The smallest runs: their config keys, and what they leave in the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from scene_files import scene_file

# 0.1 million parameters; a step takes some hundredths of a second.
TINY_MODEL: dict[str, Any] = {
    "model.vision.image_size": 32,
    "model.vision.width": 32,
    "model.vision.depth": 1,
    "model.vision.heads": 2,
    "model.text.width": 32,
    "model.text.mlp_width": 64,
    "model.text.depth": 2,
    "model.text.fusion_layer": 1,
    "model.text.heads": 2,
    "model.embed_dim": 16,
}
# Twelve steps of pre-training on synthetic scenes; each is logged.
TINY: dict[str, Any] = {
    **TINY_MODEL,
    "objectives.queue_size": 20,
    "data.train": [scene_file("train", 24)],
    "data.tokenizer_texts": [],
    "data.workers": 0,
    "data.validation": [],
    "data.test": [],
    "train.batch_size": 6,
    "train.epochs": 3,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "optim.warmup_steps": 2,
}


NUMBERS = ("loss", "cma", "imc", "lmi", "itm", "mlm", "lr", "temperature", "grad_norm", "alpha")


def flags(keys: dict[str, Any]) -> list[str]:
    """Config keys as words of the command line."""
    words = []
    for name, value in keys.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def dotted(keys: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as config keys: two underscores stand for a dot."""
    return {name.replace("__", "."): value for name, value in keys.items()}


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl of one kind."""
    file = run / "metrics.jsonl"
    text = file.read_text("utf-8") if file.is_file() else ""
    return [line for line in map(json.loads, text.split("\n")[:-1]) if line["kind"] == kind]


def events(run: Path) -> str:
    """All messages of a run."""
    return "\n".join(line["message"] for line in lines(run, "event"))


def losses(run: Path) -> list[tuple[float, ...]]:
    """The numbers of every step, to the last bit."""
    return [tuple(line[name] for name in ("step", *NUMBERS)) for line in lines(run)]


def kept_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward one, without the parameters."""
    weights = {weight.untyped_storage().data_ptr() for weight in parameters}
    kept: dict[int, Tensor] = {}  # holding each tensor keeps its address from being used again

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def assert_equal(first: Path, second: Path) -> int:
    """Two finished runs have the same numbers and parameters, bit for bit; returns the number of steps."""
    assert losses(first) == losses(second)
    expected, actual = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    return len(losses(first))
