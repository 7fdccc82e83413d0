"""Dropout drops as often as asked, keeps the mean, follows the seed, and passes its mask on to the gradient."""

from __future__ import annotations

import pytest
import torch

from tercet.model.dropout import LEVELS, draw_kept, drop


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.003])
def test_share_and_mean(probability: float) -> None:
    torch.manual_seed(0)
    count = 1_000_003
    dropped = drop(torch.ones(count), probability)
    share = (dropped == 0).double().mean().item()
    spread = (probability * (1 - probability) / count) ** 0.5
    assert share == pytest.approx(probability, abs=5 * spread + 1 / LEVELS)
    assert dropped.double().mean().item() == pytest.approx(1, abs=5 * spread / (1 - probability))
    assert len(dropped.unique()) == 2


def test_elements_are_independent() -> None:
    torch.manual_seed(0)
    kept = draw_kept(torch.Size([1_000_000]), LEVELS // 4).double()
    for distance in (1, 2, 3, 4, 768):
        both = (kept[:-distance] * kept[distance:]).mean().item()
        assert both == pytest.approx(0.75**2, abs=3e-3), distance
    for lane in range(4):
        assert kept[lane::4].mean().item() == pytest.approx(0.75, abs=5e-3)


def test_gradient_has_the_mask_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 7, 11, dtype=torch.float64, requires_grad=True)
    dropped = drop(hidden, 0.3)
    gradient = torch.randn_like(dropped)
    (actual,) = torch.autograd.grad(dropped, hidden, gradient)
    torch.testing.assert_close(actual, gradient * dropped.detach() / hidden.detach())


def test_the_seed_decides() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(drop(torch.ones(1000), 0.1))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_nothing_is_dropped_outside_training() -> None:
    hidden = torch.randn(3, 4)
    assert drop(hidden, 0.5, training=False) is hidden
    assert drop(hidden, 0.0) is hidden
