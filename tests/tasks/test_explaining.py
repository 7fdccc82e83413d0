"""Explanations: the maps of grounding by word, whatever the pieces and the image's shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.tasks.explaining import Explanation, blend, fit, join_pieces
from tiny_model import SCENES, TEXTS, make_model


def test_pieces_are_joined() -> None:
    maps = torch.arange(16.0).reshape(4, 2, 2)
    words = join_pieces(list(zip(["a", "snow", "##man", "##s"], maps, strict=True)))
    assert [heat.word for heat in words] == ["a", "snowmans"]
    torch.testing.assert_close(words[1].heatmap, maps[1:].mean(dim=0))
    assert [heat.strength for heat in words] == [3 / 11, 1.0]
    assert join_pieces([("##s", maps[0])])[0].word == "##s"  # a cut text may begin anywhere
    assert join_pieces([("a", torch.zeros(2, 2))])[0].strength == 0


def test_explain_is_ground_by_word() -> None:
    model = Predictor(make_model())
    picture = Image.fromarray(SCENES.array(0)).resize((90, 40))
    found = model.explain(picture, TEXTS[0])
    grounding = model.ground(picture, TEXTS[0])
    assert isinstance(found, Explanation) and isinstance(grounding, Explanation)
    torch.testing.assert_close(found.heatmap, grounding.heatmap)
    assert "".join(heat.word for heat in found.words) == TEXTS[0].replace(" ", "").replace(",", "")
    assert found.match == pytest.approx(model.match(picture, TEXTS[0]), abs=1e-6)
    assert found.overlay().shape == found.overlay(0).shape == (40, 90, 3)
    assert found.overlay(0, side=180).shape == (80, 180, 3)

    several = model.explain([SCENES.array(0), SCENES.array(1)], TEXTS[:2])
    one_image = model.explain(SCENES.array(1), TEXTS[:2])
    assert isinstance(several, list) and isinstance(one_image, list)
    assert [one.text for one in several] == TEXTS[:2]
    torch.testing.assert_close(several[1].heatmap, one_image[1].heatmap, rtol=1e-4, atol=1e-6)
    with pytest.raises(TercetError, match="has no cross-attention"):
        model.explain(picture, TEXTS[0], layer=0)


def test_colours_lie_where_the_heat_is() -> None:
    grey = np.full((40, 80, 3), 128, np.uint8)
    heatmap = torch.zeros(4, 8)
    heatmap[1, 6] = 2.0
    drawn = blend(grey, heatmap).astype(int)
    colour = drawn.max(axis=2) - drawn.min(axis=2)
    assert np.unravel_index(colour.argmax(), colour.shape)[1] > 55 and colour[:, :40].max() == 0
    thin = blend(grey, heatmap, strength=0.0).astype(int)
    assert 0 < (thin.max(axis=2) - thin.min(axis=2)).max() < colour.max()
    assert (blend(grey, torch.zeros(4, 8)) == blend(grey, torch.zeros(2, 2))).all()


@pytest.mark.parametrize(
    ("shape", "side", "fitted"), [((40, 80), 20, (10, 20)), ((3, 900), 90, (1, 90)), ((8, 8), 16, (16, 16))]
)
def test_fit(shape: tuple[int, int], side: int, fitted: tuple[int, int]) -> None:
    assert fit(np.zeros((*shape, 3), np.uint8), side).shape == (*fitted, 3)
