"""Linear maps by either library are the same map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.model import layers
from tercet.model.layers import Linear, is_intel, linear


@pytest.fixture(autouse=True, params=["Intel's processor", "another"])
def on_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MIN_ONEDNN_WORK", 1)
    monkeypatch.setattr(layers, "is_intel", lambda: request.param != "another")


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4), (0, 4)])
def test_values_and_gradients_are_those_of_pytorch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(*shape, 24, requires_grad=True)
    weight, bias = torch.randn(40, 24, requires_grad=True), torch.randn(40, requires_grad=True)
    inputs = [hidden, weight, bias]
    ours, expected = linear(hidden, weight, bias), F.linear(hidden, weight, bias)
    torch.testing.assert_close(ours, expected)
    for own, other in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(own, other)
    torch.testing.assert_close(linear(hidden, weight), F.linear(hidden, weight))


def test_parts_of_a_matrix_and_transposed_inputs() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(30, 8, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    ours, expected = linear(hidden.t(), weight[10:20]), F.linear(hidden.t(), weight[10:20])
    torch.testing.assert_close(ours, expected)
    for own, other in zip(gradients(ours, [weight, hidden]), gradients(expected, [weight, hidden]), strict=True):
        torch.testing.assert_close(own, other)


def test_frozen_parameters_take_no_gradient() -> None:
    layer = Linear(8, 8)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_other_precisions_are_left_to_pytorch() -> None:
    layer, hidden = Linear(8, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(hidden).dtype == torch.bfloat16
    assert layer.double()(hidden.double()).dtype == torch.float64


def test_weights_are_those_of_a_plain_linear_map() -> None:
    torch.manual_seed(0)
    plain, hidden = nn.Linear(8, 4), torch.randn(3, 8)
    layer = Linear(8, 4)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(hidden), plain(hidden))


def test_products_with_a_gradient_go_to_onednn_where_the_processor_is_not_intels() -> None:
    weight, hidden = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    function = type(linear(hidden, weight).grad_fn).__name__
    assert (function == "_OneDnnLinearBackward") == (not layers.is_intel())


def test_a_compiled_layer_is_one_graph_that_asks_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "is_intel", is_intel)
    is_intel.cache_clear()
    hidden, weight, bias = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden, weight, bias), F.linear(hidden, weight, bias))
    assert is_intel.cache_info().currsize == 0
