"""The loss of downstream tasks that choose one of a few labels, softened by the teacher's own guesses."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def label_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Cross-entropy, mixed with the cross-entropy to the teacher's probabilities.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`.
        teacher_logits: `[batch, classes]`, without gradient; None without a teacher.
        alpha: share of the teacher's probabilities in the targets.

    Returns:
        The mean over the batch, `[]`.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    hard = F.nll_loss(log_probabilities, labels)
    if teacher_logits is None or alpha == 0:
        return hard
    believed = teacher_logits.float().softmax(dim=-1)
    soft = -(believed * log_probabilities).sum(dim=-1).mean()
    return (1 - alpha) * hard + alpha * soft
