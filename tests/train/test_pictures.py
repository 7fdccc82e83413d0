"""What a run leaves for its report: the matrix is the model's own, and each map lies over its image."""

from __future__ import annotations

import base64
import json

import cv2
import numpy as np
import pytest
import torch

from tercet.config_io import default_config
from tercet.predictor import Predictor
from tercet.tasks.retrieval import RetrievalResult
from tercet.tasks.task import evaluate_task
from tercet.train.pictures import _whole_words, heatmaps, overlay, similarity_matrix
from tiny_model import SCENES, make_model

LIMIT = 10**8


def pixels(url: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]


def test_matrix_and_heatmaps_of_an_evaluation() -> None:
    model = make_model()
    result = evaluate_task("retrieval", model, SCENES, default_config({"evaluate.rerank": 2}))
    assert isinstance(result, RetrievalResult)
    matrix = similarity_matrix(result, SCENES, LIMIT)
    files = [SCENES.array(index) for index in range(len(SCENES))]
    cosines = torch.tensor(matrix["cosines"])
    expected = Predictor(model).similarity(files, matrix["captions"])
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(cosines, expected.T, atol=1e-4, rtol=0)
    for fused in (True, False):
        entries = heatmaps(model, result, SCENES, LIMIT, fused)
        assert [entry["query"] for entry in entries] == result.captions
        assert all(bool(entry["words"]) == fused for entry in entries)
        assert pixels(entries[0]["overlay"]).shape == pixels(entries[0]["thumbnail"]).shape
        if fused:
            assert [word["word"] for word in entries[0]["words"]] == result.captions[0].split()
        json.dumps(entries)
    assert 0 <= result.space["alignment"] <= 4


def test_overlay_is_bright_where_the_map_is_high() -> None:
    image = np.full((64, 64, 3), 128, np.uint8)
    heatmap = torch.zeros(4, 4)
    heatmap[0, 3] = 2.0
    drawn = pixels(overlay(image, heatmap)).astype(int).sum(axis=2)
    assert drawn[:12, -12:].mean() > 2 * drawn[-24:, :24].mean()


def test_pieces_of_a_word_share_a_map() -> None:
    maps = torch.arange(6.0).view(3, 2)
    words = _whole_words(["blue", "##ish", "star"], maps)
    assert [word for word, _ in words] == ["blueish", "star"]
    assert words[0][1].tolist() == pytest.approx([1.0, 2.0])
