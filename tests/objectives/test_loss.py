"""Targets softened by the teacher, and the total: the mean of the contrastive losses plus the others, weighted."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tercet.config import ObjectivesConfig
from tercet.objectives.loss import distilled_cross_entropy, total


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ({"cma": 1, "imc": 2, "lmi": 6, "itm": 10, "mlm": 100}, {}, 3 + 10 + 100),
        ({"cma": 1, "lmi": 6, "itm": 10}, {"imc": 0, "mlm": 0}, 3.5 + 10),
        ({"cma": 1, "imc": 2, "itm": 10}, {"cma": 2, "imc": 0.5, "lmi": 0, "itm": 0.1, "mlm": 0}, (2 + 1) / 2 + 1),
        ({"itm": 0.7}, {"cma": 0, "imc": 0, "lmi": 0, "mlm": 0}, 0.7),
        ({"answer": 3}, {}, 3),
    ],
)
def test_total(values: dict[str, float], weights: dict[str, float], expected: float) -> None:
    losses = {name: torch.tensor(float(value)) for name, value in values.items()}
    assert total(losses, ObjectivesConfig.model_validate(weights)).item() == pytest.approx(expected)


def test_hard_and_soft_targets_are_mixed_and_rows_weighted() -> None:
    logits, teacher = torch.randn(6, 20), torch.randn(6, 20)
    labels, weights = torch.randint(20, (6,)), torch.rand(6)
    hard = F.cross_entropy(logits, labels, reduction="none")
    soft = F.cross_entropy(logits, teacher.softmax(1), reduction="none")
    mixed = 0.6 * hard + 0.4 * soft
    torch.testing.assert_close(distilled_cross_entropy(logits, labels), hard.mean())
    torch.testing.assert_close(distilled_cross_entropy(logits, labels, teacher, 0.4), mixed.mean())
    weighted = distilled_cross_entropy(logits, labels, teacher, 0.4, 2.0, weights)
    torch.testing.assert_close(weighted, (mixed * weights).sum() / 2)
