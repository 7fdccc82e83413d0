"""The enabled losses into one: the only place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tercet.config import OBJECTIVE_NAMES, ObjectivesConfig

CONTRASTIVE = ("cma", "imc", "lmi")


def total(losses: Mapping[str, Tensor], config: ObjectivesConfig) -> Tensor:
    """The loss that is minimised: the mean of the contrastive losses, plus matching, plus masking, each weighted.

    Args:
        losses: `{name: loss}`, of the enabled objectives alone, or of a downstream task.
        config: their weights.

    Returns:
        `[]`.
    """
    weighted = {name: weight_of(name, config) * loss for name, loss in losses.items()}
    contrastive = [weighted.pop(name) for name in CONTRASTIVE if name in weighted]
    parts = list(weighted.values())
    if contrastive:
        parts.insert(0, torch.stack(contrastive).mean())
    return torch.stack(parts).sum()


def weight_of(name: str, config: ObjectivesConfig) -> float:
    """The weight of an objective; a downstream task's own loss has weight 1."""
    return getattr(config, name) if name in OBJECTIVE_NAMES else 1.0
