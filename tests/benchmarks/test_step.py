"""The step that the benchmark times is the step that a training takes."""

from __future__ import annotations

import torch

from step import OurStep, PlainStep, draw_batch
from tercet.config import Config

TINY = {
    "model": {
        "vision": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2},
        "text": {"width": 32, "mlp_width": 64, "depth": 2, "fusion_layer": 1, "heads": 2, "vocabulary_size": 200},
        "embed_dim": 16,
    },
    "objectives": {"queue_size": 16, "alpha_warmup": 0},
    "train": {"device": "cpu", "precision": "fp32"},
}


def test_both_steps_learn() -> None:
    torch.manual_seed(0)
    config = Config.model_validate(TINY)
    batch = draw_batch(config.model, 4, 7)
    ours = OurStep(config, batch)
    plain = PlainStep(config, batch, ours.task.student)
    before = ours.task.student.mlm_head.state_dict()["bias"].clone()
    for step in (ours, plain):
        step()
        step()
    assert ours.state.step == 2
    assert not torch.equal(before, ours.task.student.mlm_head.state_dict()["bias"])
