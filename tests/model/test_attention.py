"""Attention in bf16 on a CPU learns from gradients that are PyTorch's or better."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.model.attention import attention


def draw(learns: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    # Heads as a projection leaves them: side by side.
    parts = torch.randn(2, 37, 3 * 4 * 16).bfloat16().chunk(3, dim=-1)
    return [part.unflatten(-1, (4, 16)).transpose(1, 2).detach().requires_grad_(learns) for part in parts]


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def test_gradients_in_bf16_are_at_least_as_exact_as_those_of_pytorch() -> None:
    inputs = draw()
    whole = [part.detach().double().requires_grad_() for part in inputs]
    gradient = torch.randn(2, 4, 37, 16).bfloat16()
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*whole), whole, gradient.double())
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, gradient)
    attended = attention(*inputs)
    assert type(attended.grad_fn).__name__ == "_AttentionBackward"
    for own, other, expected in zip(torch.autograd.grad(attended, inputs, gradient), theirs, exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert error(own, expected) <= error(other, expected)


def test_values_in_bf16_are_those_of_pytorch() -> None:
    inputs = draw()
    expected = F.scaled_dot_product_attention(*inputs)
    assert torch.equal(attention(*inputs), expected)
    assert torch.equal(attention(*draw(learns=False)), expected)
    with torch.no_grad():
        assert torch.equal(attention(*inputs), expected)


def test_bf16_is_one_graph_when_compiled() -> None:
    inputs = draw()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), attention(*inputs))
