"""Every reader of files that others made, by name."""

from __future__ import annotations

from functools import cache

import cv2
import torch

from fuzz.data_targets import image_targets, pair_targets, sample_targets, score_targets
from fuzz.model_targets import checkpoint_targets, text_targets, weight_targets
from fuzz.target import Target


@cache
def all_targets() -> dict[str, Target]:
    """Every reader by name."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    return {
        **pair_targets(),
        **sample_targets(),
        **score_targets(),
        **text_targets(),
        **weight_targets(),
        **checkpoint_targets(),
        **image_targets(),
    }
