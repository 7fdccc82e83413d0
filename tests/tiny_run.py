"""The keys of the smallest runs, which tests of several folders train and change."""

from __future__ import annotations

from typing import Any

from scene_files import scene_file

# 0.1 million parameters, of which a step takes some hundredths of a second.
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
# Twelve steps of pre-training on synthetic scenes, each of which is logged.
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


def flag(name: str, value: Any) -> list[str]:
    """A key of the config as words of the command line; a list without parts is its name alone."""
    return [f"--{name}", *([str(part) for part in value] if isinstance(value, list) else [str(value)])]
