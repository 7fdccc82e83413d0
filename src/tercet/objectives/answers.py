"""The loss of answers that a decoder writes word piece by word piece."""

from __future__ import annotations

import torch
from torch import Tensor


def answer_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    questions: float,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """Cross-entropy of weighted answers, softened by the teacher's guesses.

    An answer's loss is the sum over its word pieces, not their mean; a question's is the weighted sum over its answers.

    Args:
        logits: `[guesses, vocabulary]`, one row for every word piece of every answer.
        labels: `[guesses]`, the word pieces.
        weights: `[guesses]`, the weight of the answer that each belongs to.
        questions: number of questions that the answers belong to; with several ranks the mean number on a rank.
        teacher_logits: `[guesses, vocabulary]`, without gradient; None without a teacher.
        alpha: share of the teacher's guesses in the targets.

    Returns:
        The mean over the questions, `[]`.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    loss = -log_probabilities.gather(1, labels[:, None]).squeeze(1)
    if teacher_logits is not None and alpha > 0:
        soft = -(log_probabilities * teacher_logits.float().softmax(dim=-1)).sum(dim=-1)
        loss = torch.lerp(loss, soft, alpha)
    return (weights * loss).sum() / (questions or 1)
