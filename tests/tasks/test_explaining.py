"""Heatmaps by word and their overlay, whatever the pieces and the image's shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tercet.tasks.explaining import Explanation, blend, fit, join_pieces


def test_pieces_are_joined() -> None:
    maps = torch.arange(16.0).reshape(4, 2, 2)
    words = join_pieces(list(zip(["a", "snow", "##man", "##s"], maps, strict=True)))
    assert [heat.word for heat in words] == ["a", "snowmans"]
    torch.testing.assert_close(words[1].heatmap, maps[1:].mean(dim=0))
    assert [heat.strength for heat in words] == [3 / 11, 1.0]
    assert join_pieces([("##s", maps[0])])[0].word == "##s"  # a cut text may begin anywhere
    assert join_pieces([("a", torch.zeros(2, 2))])[0].strength == 0


def test_the_overlay_is_coloured_where_the_heat_is() -> None:
    grey, heatmap = np.full((40, 80, 3), 128, np.uint8), torch.zeros(4, 8)
    heatmap[1, 6] = 2.0
    drawn, faint = (blend(grey, heatmap, strength).astype(int) for strength in (1.0, 0.0))
    colour = drawn.max(axis=2) - drawn.min(axis=2)
    assert np.unravel_index(colour.argmax(), colour.shape)[1] > 55 and colour[:, :40].max() == 0
    assert 0 < (faint.max(axis=2) - faint.min(axis=2)).max() < colour.max()
    assert (blend(grey, torch.zeros(4, 8)) == blend(grey, torch.zeros(2, 2))).all()
    explanation = Explanation("a star", grey, heatmap, join_pieces([("star", heatmap)]))
    assert np.array_equal(explanation.overlay(), explanation.overlay(0)) and 60 < explanation.point[0] < 70


@pytest.mark.parametrize(
    ("shape", "side", "fitted"), [((40, 80), 20, (10, 20)), ((3, 900), 90, (1, 90)), ((8, 8), 16, (16, 16))]
)
def test_fit(shape: tuple[int, int], side: int, fitted: tuple[int, int]) -> None:
    assert fit(np.zeros((*shape, 3), np.uint8), side).shape == (*fitted, 3)
