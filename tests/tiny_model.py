"""A model of random weights that reads the captions of synthetic scenes."""

from __future__ import annotations

import torch

from tercet.config import ModelConfig
from tercet.data.scenes import split_scenes
from tercet.data.tokenizer import Tokenizer
from tercet.model.tercet import Tercet

SCENES = list(split_scenes("test", 4))
TEXTS = [SCENES[index].captions[0] for index in range(4)]


def make_model() -> Tercet:
    """In evaluation mode; the same weights every time, large enough to separate inputs."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(TEXTS, 120)
    sizes = {
        "size": "tiny",
        "vision": {"image_size": 32, "width": 32, "depth": 3, "heads": 2},
        "text": {
            **{"width": 32, "mlp_width": 64, "depth": 4, "fusion_layer": 2, "heads": 2},
            **{name: getattr(tokenizer, name) for name in ("vocabulary_size", "pad_id", "cls_id", "sep_id", "mask_id")},
        },
        "embed_dim": 16,
    }
    model = Tercet(ModelConfig.model_validate(sizes))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.tokenizer = tokenizer
    return model.eval()
