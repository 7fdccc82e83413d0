"""The enabled losses into one: the only place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tercet.config import ObjectivesConfig

CONTRASTIVE = ("cma", "imc", "lmi")


def total(losses: Mapping[str, Tensor], config: ObjectivesConfig) -> Tensor:
    """The loss that is minimised: the mean of the contrastive losses, plus matching, plus masking, each weighted.

    Args:
        losses: `{name: loss}`, of the enabled objectives alone.
        config: their weights.

    Returns:
        `[]`.
    """
    weighted = {name: getattr(config, name) * loss for name, loss in losses.items()}
    contrastive = [weighted.pop(name) for name in CONTRASTIVE if name in weighted]
    parts = list(weighted.values())
    if contrastive:
        parts.insert(0, torch.stack(contrastive).mean())
    return torch.stack(parts).sum()
