"""Schedules and parameter groups of our own mode; the published ones are held by the parity tests."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from tercet.config import ModelConfig, ObjectivesConfig, OptimConfig
from tercet.model.tercet import Tercet
from tercet.train.optim import alpha_of, build_optimizer, gradient_norm, learning_rate, step_clipped

CONFIG = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-4, warmup_steps=10)


def test_warm_up_is_linear_and_the_cosine_ends_at_the_least_rate() -> None:
    rates = [learning_rate(CONFIG, step, 50, 2) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[5] == pytest.approx(5.5e-4)
    assert rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[100] == pytest.approx(1e-5)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_beyond_the_last_step_the_rate_stays() -> None:
    assert learning_rate(CONFIG, 5000, 50, 2) == pytest.approx(1e-5)


def test_constant() -> None:
    constant = CONFIG.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 99, 50, 2) == 1e-3


def test_alpha_rises_over_its_ramp() -> None:
    config = ObjectivesConfig(alpha=0.4, alpha_warmup=2)
    assert [alpha_of(config, step, 10) for step in (0, 5, 20, 99)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert alpha_of(ObjectivesConfig(alpha_warmup=0), 0, 10) == 0.4


def test_what_decays() -> None:
    model = Tercet(ModelConfig(size="tiny"))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1), published=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, free, numbers = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decaying | free | numbers == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert numbers == {"temperature"}
    for name in ("vision.class_token", "vision.position_embed", "text.position_embed.weight"):
        assert name in free
    assert "text.word_embed.weight" in decaying and "vision.patch_embed.weight" in decaying
    assert all(name in free for name in names.values() if name.endswith(".bias"))


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(), published=False)
    assert [group["params"] for group in optimizer.param_groups] == [[model.bias]]


@pytest.mark.parametrize("limit", [None, 1e-3, 1e6])
def test_a_clipped_step_is_that_of_clipped_gradients(limit: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    other = copy.deepcopy(model)
    optimizer, expected = (
        build_optimizer(each, OptimConfig(warmup_lr=0.1), published=False) for each in (model, other)
    )
    for _ in range(3):
        inputs = torch.randn(8, 40)
        for each in (model, other):
            each.zero_grad()
            each(inputs).square().sum().backward()
        norm = gradient_norm(model)
        step_clipped(optimizer, norm, limit)
        clipped = nn.utils.clip_grad_norm_(other.parameters(), limit or float("inf"))
        expected.step()
        torch.testing.assert_close(norm, clipped)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
