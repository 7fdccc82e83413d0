"""The loss of downstream tasks that choose one of a few labels, softened by the teacher's own guesses."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def label_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
    count: float | None = None,
) -> Tensor:
    """Cross-entropy, mixed with the cross-entropy to the teacher's probabilities.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`.
        teacher_logits: `[batch, classes]`, without gradient; None without a teacher.
        alpha: share of the teacher's probabilities in the targets.
        count: divides the sum over the batch; None: its size.  With several ranks the mean size on a rank.

    Returns:
        The mean over the batch, `[]`.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    count = labels.shape[0] if count is None else count
    hard = F.nll_loss(log_probabilities, labels, reduction="sum") / count
    if teacher_logits is None or alpha == 0:
        return hard
    believed = teacher_logits.float().softmax(dim=-1)
    soft = -(believed * log_probabilities).sum() / count
    return (1 - alpha) * hard + alpha * soft
