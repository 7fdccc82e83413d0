"""The total: the mean of the contrastive losses plus the others, each weighted."""

from __future__ import annotations

import pytest
import torch

from tercet.config import ObjectivesConfig
from tercet.objectives.total import total


def losses(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_all_five() -> None:
    value = total(losses(cma=1, imc=2, lmi=6, itm=10, mlm=100), ObjectivesConfig())
    assert value.item() == pytest.approx(3 + 10 + 100)


def test_a_switched_off_loss_leaves_the_mean_of_the_others() -> None:
    value = total(losses(cma=1, lmi=6, itm=10), ObjectivesConfig(imc=0, mlm=0))
    assert value.item() == pytest.approx(3.5 + 10)


def test_weights() -> None:
    value = total(losses(cma=1, imc=2, itm=10), ObjectivesConfig(cma=2, imc=0.5, lmi=0, itm=0.1, mlm=0))
    assert value.item() == pytest.approx((2 + 1) / 2 + 1)


def test_matching_alone() -> None:
    config = ObjectivesConfig(cma=0, imc=0, lmi=0, mlm=0)
    assert total(losses(itm=0.7), config).item() == pytest.approx(0.7)
