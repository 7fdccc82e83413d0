"""The entries of a report: the matrix is the model's own, and each heatmap has the size of its image."""

from __future__ import annotations

import base64
import json

import cv2
import numpy as np
import torch

from scene_files import scene_file
from tercet.config import DataConfig
from tercet.config_io import default_config
from tercet.data.readers import open_sources
from tercet.predictor import Predictor
from tercet.tasks.retrieval import RetrievalResult
from tercet.tasks.task import evaluate_task
from tercet.train.evaluate import gallery_entries, heatmap_entries, similarity_matrix
from tiny_model import make_model

LIMIT = 10**8


def pixels(url: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]


def test_gallery_matrix_and_heatmaps_of_an_evaluation() -> None:
    model = make_model()
    table = open_sources([scene_file("test", 4)], DataConfig())
    result = evaluate_task("retrieval", model, table, default_config({"evaluate.rerank": 2}))
    assert isinstance(result, RetrievalResult)
    for entry, scores in zip(gallery_entries(result, table, LIMIT), result.scores.text_to_image, strict=True):
        order = scores.argsort(descending=True).tolist()
        assert [found["key"] for found in entry["results"]] == [result.images.keys[image] for image in order]
        assert [found["right"] for found in entry["results"]].index(True) == entry["rank"] - 1

    matrix = similarity_matrix(result, table, LIMIT)
    images = [pixels(url) for url in matrix["thumbnails"]]
    assert len(images) == table.image_count
    files = [table.pixels(index, 10**6) for index in range(table.image_count)]
    expected = Predictor(model).similarity(files, matrix["captions"])
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(torch.tensor(matrix["cosines"]), expected.T, atol=1e-4, rtol=0)

    for fused in (True, False):
        entries = heatmap_entries(model, result, table, LIMIT, fused)
        assert [entry["query"] for entry in entries] == result.captions
        assert pixels(entries[0]["overlay"]).shape == pixels(entries[0]["thumbnail"]).shape
        words = [word["word"] for word in entries[0]["words"]]
        assert words == (result.captions[0].split() if fused else [])
        json.dumps(entries)
