"""Classification: by names, and by linear probes that reach their optimum."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tercet.config import DataConfig
from tercet.data.class_folders import labels_of, open_labelled
from tercet.errors import TercetError
from tercet.tasks.zero_shot import (
    PENALTIES,
    LabelledFeats,
    accuracy,
    assign_folds,
    choose_penalty,
    fit_probe,
    probe_accuracy,
    sample_shots,
    zero_shot,
)


def clusters(images: int, classes: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one centre a class, which do not depend on `seed`."""
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    return centres[labels] + spread * torch.randn(images, 8, generator=generator), labels


def test_zero_shot_is_a_softmax_of_similarities_over_the_temperature() -> None:
    image_feats, classes = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)
    chances = zero_shot(image_feats, classes, 0.07)
    torch.testing.assert_close(chances.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(chances, (image_feats @ classes.T / 0.07).softmax(dim=1))


def test_accuracy_counts_a_tie_as_wrong() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 2.0, 1.0]])
    labels = torch.tensor([0, 0, 2])
    assert accuracy(scores, labels) == pytest.approx(100 / 3)
    assert accuracy(scores, labels, rank=2) == pytest.approx(100)


def test_a_probe_reaches_its_optimum() -> None:
    feats, labels = clusters(60, 3, spread=1.0)
    probe = fit_probe(feats, labels, 3, penalty=0.01)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    standardised = (feats.double() - probe.mean) / probe.scale
    loss = F.cross_entropy(F.linear(standardised, weight, bias), labels) + 0.005 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 1e-5 and bias.grad.abs().max() < 1e-5


def test_a_feature_that_never_changes_does_no_harm() -> None:
    feats, labels = clusters(30, 3, spread=0.1)
    feats[:, 0] = 7.0
    probe = fit_probe(feats, labels, 3, 0.01)
    assert accuracy(probe(feats), labels) == 100


def test_noise_asks_for_a_larger_penalty() -> None:
    clear, labels = clusters(60, 3, spread=0.2)
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(3))
    assert choose_penalty(noise, labels, 3) > choose_penalty(clear, labels, 3)
    assert choose_penalty(clear[:3], labels[:3], 3) == PENALTIES[2]


def test_folds_and_shots_hold_every_class() -> None:
    labels = torch.tensor([0] * 7 + [1] * 4 + [2] * 5)
    folds = assign_folds(labels, 4)
    assert all(set(labels[folds == fold].tolist()) == {0, 1, 2} for fold in range(4))
    rows = sample_shots(labels, 3, 2, seed=0)
    assert labels[rows].bincount().tolist() == [2, 2, 2]
    assert len(set(rows.tolist())) == 6
    assert not torch.equal(rows, sample_shots(labels, 3, 2, seed=1))
    with pytest.raises(TercetError, match="class 1 has 4 training images, fewer than 5 shots"):
        sample_shots(labels, 3, 5, seed=0)


def test_more_shots_are_no_worse_on_clusters() -> None:
    train = LabelledFeats(*clusters(120, 4, spread=0.8))
    test = LabelledFeats(*clusters(200, 4, spread=0.8, seed=5))
    one, many = (probe_accuracy(train, test, 4, shots) for shots in (1, 16))
    assert many > one and many > 80


def test_folders_of_classes(tmp_path: Path) -> None:
    for label in ("red_square", "blue_square"):
        (tmp_path / label).mkdir()
        for number in range(2):
            cv2.imwrite(str(tmp_path / label / f"{number}.png"), np.zeros((8, 8, 3), np.uint8))
    source = open_labelled([str(tmp_path)], DataConfig(), "test")
    assert labels_of(source) == ["blue square", "blue square", "red square", "red square"]
    assert source.key(0) == "blue_square/0.png"
    assert source.image(3) == (tmp_path / "red_square/1.png").read_bytes()


def test_labels_of_an_annotation_file(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"x")
    (tmp_path / "rows.csv").write_text("image,label\n0.png,dog\n", "utf-8")
    data = DataConfig(caption_column="label")
    assert labels_of(open_labelled([str(tmp_path / "rows.csv")], data, "test")) == ["dog"]
    (tmp_path / "rows.csv").write_text("image,label\n0.png,dog\n0.png,cat\n", "utf-8")
    with pytest.raises(TercetError, match=r"0\.png: 2 labels, such as 'dog' and 'cat'"):
        labels_of(open_labelled([str(tmp_path / "rows.csv")], data, "test"))
