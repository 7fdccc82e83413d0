"""int8 encoders are near the fp32 ones, and nothing else changes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tercet.model.int8 import Int8Linear, quantise_encoders
from tercet.model.layers import Linear
from tercet.predictor import Predictor
from tiny_model import TEXTS, make_model


def test_a_map_differs_by_rounding_alone() -> None:
    torch.manual_seed(0)
    layer, hidden = Linear(64, 48), torch.randn(5, 7, 64)
    expected = F.linear(hidden, layer.weight, layer.bias)
    rounded = Int8Linear(layer)
    torch.testing.assert_close(rounded(hidden), expected, rtol=0, atol=0.06)
    torch.testing.assert_close(rounded.gelu(hidden), F.gelu(expected), rtol=0, atol=0.07)
    assert not torch.equal(rounded(hidden), expected)


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = Linear(8, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    values = Int8Linear(layer)(torch.randn(4, 8) * torch.tensor([1.0, 0.0, 1e-30, 1e30])[:, None])
    assert values.isfinite().all()
    torch.testing.assert_close(values[:, 1], layer.bias[1].detach().expand(4))


def test_features_of_quantised_encoders_are_near_and_the_fusion_encoder_is_the_same() -> None:
    model, rounded = make_model(), make_model()
    # Three blocks and two text layers of four maps each, and the patches.
    assert quantise_encoders(rounded) == 4 * (3 + 2) + 1
    assert not any(isinstance(part, Int8Linear) for part in rounded.fusion.modules())
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8).numpy()
    one, other = Predictor(model), Predictor(rounded)
    assert F.cosine_similarity(one.embed_texts(TEXTS), other.embed_texts(TEXTS)).min() > 0.99
    assert F.cosine_similarity(one.embed_images(images), other.embed_images(images)).min() > 0.99
