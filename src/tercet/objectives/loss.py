"""What the losses share: the mean over all ranks, targets softened by the teacher, and the total."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tercet.config import OBJECTIVE_NAMES, ObjectivesConfig

CONTRASTIVE = ("cma", "imc", "lmi")


def average(losses: Tensor, count: float | None = None) -> Tensor:
    """Mean of `losses` `[rows]`, `[]`; 0 where there are none.

    `count` divides their sum instead of their number: with several ranks the mean number of rows on a rank, so that
    the mean over the ranks is the mean over all rows.
    """
    return losses.sum() / (max(1, len(losses)) if count is None else count)


def distilled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
    count: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy to labels, mixed with the cross-entropy to the teacher's probabilities.

    Masked language modelling, classification and the generation of answers all minimise this.

    Args:
        logits: `[rows, classes]`.
        labels: `[rows]`.
        teacher_logits: `[rows, classes]`, without gradient; None without a teacher.
        alpha: weight of the teacher's probabilities in the targets.
        count: see `average`.
        weights: `[rows]`; None: 1 each.

    Returns:
        The mean over the rows, `[]`.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    losses = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
    if teacher_logits is not None and alpha > 0:
        soft = -(log_probabilities * teacher_logits.float().softmax(dim=-1)).sum(dim=-1)
        losses = (1 - alpha) * losses + alpha * soft
    return average(losses if weights is None else weights * losses, count)


def total(losses: Mapping[str, Tensor], config: ObjectivesConfig) -> Tensor:
    """The loss that is minimised: the mean of the contrastive losses, plus matching, plus masking, each weighted.

    Args:
        losses: `{name: loss}`, of the enabled objectives, or of a downstream task, whose own loss has weight 1.
        config: the weights.

    Returns:
        `[]`.
    """
    weighted = {
        name: getattr(config, name) * loss if name in OBJECTIVE_NAMES else loss for name, loss in losses.items()
    }
    contrastive = [weighted.pop(name) for name in CONTRASTIVE if name in weighted]
    parts = list(weighted.values())
    if contrastive:
        parts.insert(0, torch.stack(contrastive).mean())
    return torch.stack(parts).sum()
