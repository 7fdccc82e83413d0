"""The published schedule and position embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import load_fixture

from tercet.config import OptimConfig
from tercet.model.vision import resize_position_embed
from tercet.train.optim import learning_rate

CASES = (
    "pretrain_2500",
    "pretrain_700",
    "pretrain_100",
    "retrieval_flickr_350",
    "retrieval_coco_350",
    "vqa_600",
    "ve_350",
    "nlvr_350",
    "nlvr_pretrain_350",
    "grounding_350",
)


def test_every_case_is_here(parity_dir: Path) -> None:
    assert set(load_fixture(parity_dir, "scheduler").about["cases"]) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_learning_rate_of_every_step(parity_dir: Path, case: str) -> None:
    fixture = load_fixture(parity_dir, "scheduler")
    about = fixture.about["cases"][case]
    settings, steps = about["settings"]["schedular"], about["steps_per_epoch"]
    config = OptimConfig(
        lr=about["settings"]["optimizer"]["lr"],
        min_lr=settings["min_lr"],
        warmup_lr=settings["warmup_lr"],
        warmup_epochs=settings["warmup_epochs"],
        schedule="published",
    )
    epochs = settings["epochs"]
    first = [learning_rate(config, step, steps, epochs) for step in range(steps)]
    np.testing.assert_allclose(first, fixture.tensors[f"out.{case}.epoch0_lr_per_step"].numpy(), rtol=1e-12)
    last = [learning_rate(config, (epoch + 1) * steps - 1, steps, epochs) for epoch in range(epochs)]
    np.testing.assert_allclose(last, fixture.tensors[f"out.{case}.lr_of_epoch"].numpy(), rtol=1e-12)


@pytest.mark.parametrize(("source", "side"), [(16, 24), (16, 14), (14, 16), (16, 16), (14, 14)])
def test_position_embeddings(parity_dir: Path, source: int, side: int) -> None:
    tensors = load_fixture(parity_dir, "interpolate_pos_embed").tensors
    target = {(16, 24): "24", (16, 14): "14", (14, 16): "14_to_16", (16, 16): "16"}.get((source, side))
    expected = tensors["in.pos_embed_14"] if target is None else tensors[f"out.pos_embed_{target}"]
    resized = resize_position_embed(tensors[f"in.pos_embed_{source}"], side, side)
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
