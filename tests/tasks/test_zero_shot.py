"""Frozen features: classes by name, and linear probes that reach their optimum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from task_runs import COLOURS, NAMES
from tercet.config import Config
from tercet.errors import TercetError
from tercet.tasks.evaluation import TaskResult
from tercet.tasks.task import build_task, evaluate_task, open_data
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
from tiny_model import make_model


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


def write_classes(root: Path, count: int, seed: int, names: tuple[str, ...] = NAMES) -> str:
    """A folder for each colour, of noisy images."""
    rng = np.random.default_rng(seed)
    for name in names:
        (root / f"{name}_square").mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-60, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{name}_square" / f"{number}.png")
    return str(root)


def evaluate_classes(folder: str, **classify: object) -> TaskResult:
    config = Config.model_validate({"data": {"workers": 0}, "classify": classify})
    return evaluate_task("classify", make_model(), open_data("classify", [folder], config.data, "test"), config)


def test_classes_by_name_and_by_probe(tmp_path: Path) -> None:
    train, test = write_classes(tmp_path / "train", 4, 0), write_classes(tmp_path / "test", 5, 1)
    result = evaluate_classes(test, train=[train], shots=[1, 2, 8])
    assert result.sizes == {"images": 15, "classes": 3}
    # Even random features separate colours; 8 shots are more images than there are.
    assert result.metrics["linear probe"]["all"] > 90
    assert set(result.metrics["linear probe"]) == {
        *(f"{shots} shots{kind}" for shots in (1, 2) for kind in ("", ", deviation")),
        "all",
    }
    rows = result.predictions
    assert rows[0]["gold"] == "blue square" and rows[0]["image"] == "blue_square/0.png"
    right = sum(row["label"] == row["gold"] for row in rows)
    assert 100 * right / 15 == pytest.approx(result.metrics["zero-shot"]["r1"])


def test_errors(tmp_path: Path) -> None:
    test = write_classes(tmp_path / "test", 2, 0)
    with pytest.raises(TercetError, match=r"classify\.train has no image of 'green square'"):
        evaluate_classes(test, train=[write_classes(tmp_path / "train", 2, 1, ("red", "blue"))])
    with pytest.raises(TercetError, match="all images have the label 'red square'"):
        evaluate_classes(write_classes(tmp_path / "one", 2, 2, ("red",)))
    with pytest.raises(TercetError, match="classify is measured, not trained"):
        build_task(Config().model_copy(update={"task": "classify"}), make_model())
