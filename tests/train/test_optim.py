"""Schedules, parameter groups and AdamW of our own mode; the published ones are held by the parity tests."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from tercet.config import ModelConfig, ObjectivesConfig, OptimConfig
from tercet.model.tercet import Tercet
from tercet.train.optim import alpha_at, build_optimizer, gradient_norm, learning_rate, step_clipped

CONFIG = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-4, warmup_steps=10)


def test_warmup_is_linear_and_the_cosine_ends_at_the_minimum() -> None:
    rates = [learning_rate(CONFIG, step, 50, 2) for step in range(101)]
    assert [rates[step] for step in (0, 5, 10)] == pytest.approx([1e-4, 5.5e-4, 1e-3])
    assert [rates[step] for step in (55, 100)] == pytest.approx([(1e-3 + 1e-5) / 2, 1e-5])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert learning_rate(CONFIG, 5000, 50, 2) == pytest.approx(1e-5)
    assert learning_rate(CONFIG.model_copy(update={"schedule": "constant"}), 99, 50, 2) == 1e-3


def test_alpha_rises_over_its_warmup() -> None:
    config = ObjectivesConfig(alpha=0.4, alpha_warmup=2)
    assert [alpha_at(config, step, 10) for step in (0, 5, 20, 99)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert alpha_at(ObjectivesConfig(alpha_warmup=0), 0, 10) == 0.4


def test_what_decays() -> None:
    model = Tercet(ModelConfig(size="tiny"))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1), published=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, free, scalars = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decaying | free | scalars == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert scalars == {"temperature"}
    for name in ("vision.class_token", "vision.position_embed", "text.position_embed.weight"):
        assert name in free
    assert "text.word_embed.weight" in decaying and "vision.patch_embed.weight" in decaying
    assert all(name in free for name in names.values() if name.endswith(".bias"))


def test_frozen_parameters_are_not_optimized() -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(), published=False)
    assert [group["params"] for group in optimizer.param_groups] == [[model.bias]]


def adamw(weights: dict[str, Tensor], gradients: list[dict[str, Tensor]], config: OptimConfig) -> dict[str, Tensor]:
    """AdamW as its paper writes it (arXiv 1711.05101, algorithm 2), in float64."""
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    for step, found in enumerate(gradients, 1):
        for name, gradient in found.items():
            first, second = moments[name]
            first.mul_(config.beta1).add_(gradient, alpha=1 - config.beta1)
            second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
            mean = first / (1 - config.beta1**step)
            deviation = (second / (1 - config.beta2**step)).sqrt() + config.epsilon
            decay = config.weight_decay if weights[name].ndim > 1 else 0.0
            weights[name] = weights[name] - config.warmup_lr * (mean / deviation + decay * weights[name])
    return weights


@pytest.mark.parametrize("limit", [None, 1e-3, 1e6])
def test_steps_are_those_of_adamw_with_decay_and_clipping(limit: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    start = {name: weight.detach().double() for name, weight in copy.deepcopy(model).named_parameters()}
    config = OptimConfig(warmup_lr=0.01, weight_decay=0.3, beta1=0.8, beta2=0.95)
    optimizer = build_optimizer(model, config, published=False)
    gradients: list[dict[str, Tensor]] = []
    for _ in range(5):
        model.zero_grad()
        model(torch.randn(8, 40)).square().sum().backward()
        found = {name: weight.grad.double() for name, weight in model.named_parameters() if weight.grad is not None}
        norm = torch.cat([gradient.flatten() for gradient in found.values()]).norm()
        scale = 1.0 if limit is None else min(1.0, limit / float(norm))
        gradients.append({name: scale * gradient for name, gradient in found.items()})
        torch.testing.assert_close(gradient_norm(model).double(), norm, rtol=1e-6, atol=0)
        step_clipped(optimizer, gradient_norm(model), limit)
    expected = adamw(start, gradients, config)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=2e-6)


def test_a_step_with_an_infinite_gradient_changes_nothing() -> None:
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimConfig(warmup_lr=0.1, weight_decay=0.3), published=False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.full((1, 4), float("inf"))).sum().backward()
    step_clipped(optimizer, gradient_norm(model), 1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
