"""Alignment, uniformity and neighbourhoods against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tercet.config import Config
from tercet.tasks.embedding import (
    alignment,
    caption_recall,
    caption_vectors,
    modality_gap,
    neighbourhood,
    uniformity,
)
from tercet.tasks.task import evaluate_task, open_data
from tiny_model import make_model


def unit(points: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(points, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_alignment_is_the_mean_squared_distance() -> None:
    images, owners = unit(3), torch.tensor([0, 0, 1, 2])
    texts = unit(4, seed=1)
    expected = sum((images[owner] - text).square().sum().item() for owner, text in zip(owners, texts, strict=True)) / 4
    assert alignment(images, texts, owners) == pytest.approx(expected, rel=1e-6)
    assert alignment(images, images, torch.arange(3)) == 0


def test_uniformity_is_the_log_of_the_mean_potential_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    feats = unit(7)
    pairs = [math.exp(-2 * (feats[a] - feats[b]).square().sum().item()) for a in range(7) for b in range(7) if a != b]
    expected = math.log(sum(pairs) / len(pairs))
    assert uniformity(feats) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("tercet.tasks.embedding.CHUNK", 3)
    assert uniformity(feats) == pytest.approx(expected, rel=1e-5)
    assert uniformity(feats[:1].expand(5, -1)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two points"):
        uniformity(feats[:1])


def test_gap_between_the_modalities() -> None:
    images = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), dim=1)
    texts = F.normalize(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), dim=1)
    assert modality_gap(images, texts) == pytest.approx(math.sqrt(2))


CAPTIONS = ["a red dog", "a red dog runs", "a blue car", "a blue car stops", "a green boat", "the sea"]
OWNERS = torch.arange(6)


def test_captions_are_similar_by_the_rare_words_that_they_share() -> None:
    vectors = caption_vectors(CAPTIONS, OWNERS, 6)
    similar = vectors @ vectors.T
    assert similar[0, 1] == pytest.approx(1)
    assert similar[2, 3] > 0.9
    assert 0 < similar[0, 2] < 0.2  # 'a' alone
    assert not similar[5, :5].any()


def test_neighbourhood_lies_between_chance_and_best(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = caption_vectors(CAPTIONS, OWNERS, 6)
    found = neighbourhood(vectors, vectors, neighbours=1)
    assert found["kept"] == pytest.approx(100)
    assert found["chance"] < found["overlap"] <= found["best"]
    monkeypatch.setattr("tercet.tasks.embedding.CHUNK", 4)
    assert neighbourhood(vectors, vectors, neighbours=1) == pytest.approx(found)
    everyone = neighbourhood(unit(6), vectors, neighbours=5)
    assert everyone["overlap"] == pytest.approx(everyone["chance"]) == pytest.approx(everyone["best"])
    assert everyone["kept"] == pytest.approx(0, abs=1e-6)


def test_nearest_caption_of_the_same_image() -> None:
    feats = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]]), dim=1)
    assert caption_recall(feats, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(75)
    assert math.isnan(caption_recall(feats, torch.arange(5)))


def test_quality_of_embeddings(files: dict[str, str]) -> None:
    config = Config.model_validate({"data": {"workers": 0}})
    source = open_data("embedding", [files["embedding"]], config.data, "test")
    result = evaluate_task("embedding", make_model(), source, config)
    assert result.sizes == {"images": 8, "texts": 16}
    assert set(result.metrics) == {"embeddings", "neighbourhood"}
    assert all(math.isfinite(value) for group in result.metrics.values() for value in group.values())
    assert 0 <= result.metrics["embeddings"]["alignment"] <= 4
    assert result.metrics["embeddings"]["image_uniformity"] <= 0
    assert 0 <= result.metrics["neighbourhood"]["caption_r1"] <= 100
