"""Contrast: positives by image id, empty slots, and the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tercet.objectives.contrast import cross_modal, gather_candidates, intra_modal, same_image
from tercet.objectives.features import FeatureQueue


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_captions_of_one_image_are_positives_of_each_other_through_the_queue_too() -> None:
    queue = FeatureQueue(4, 8)
    queue.enqueue(unit(3, 8), unit(3, 8), torch.tensor([7, 9, 7]))
    candidates = gather_candidates(unit(2, 8), unit(2, 8), torch.tensor([7, 5]), queue)
    expected = torch.tensor([[1 / 3, 0, 1 / 3, 0, 1 / 3, 0], [0, 1, 0, 0, 0, 0]])
    torch.testing.assert_close(candidates.targets, expected)
    assert candidates.excluded is not None
    assert candidates.excluded.tolist() == [False] * 5 + [True]


def test_empty_slots_change_nothing() -> None:
    feats, others = unit(3, 8, seed=1), unit(3, 8, seed=2)
    ids, temperature = torch.arange(3), torch.tensor(0.1)
    plain = gather_candidates(feats, others, ids, None)
    empty = gather_candidates(feats, others, ids, FeatureQueue(5, 8))
    for loss in (cross_modal(feats, others, feats, others, c, temperature, 0.3) for c in (empty,)):
        expected = cross_modal(feats, others, feats, others, plain, temperature, 0.3)
        torch.testing.assert_close(torch.stack(loss), torch.stack(expected))
    torch.testing.assert_close(
        torch.stack(intra_modal(feats, others, empty, temperature)),
        torch.stack(intra_modal(feats, others, plain, temperature)),
    )


def test_without_teacher_it_is_the_loss_of_clip() -> None:
    images, texts, temperature = unit(5, 8, seed=3), unit(5, 8, seed=4), torch.tensor(0.07)
    candidates = gather_candidates(images, texts, None, None)
    losses = cross_modal(images, texts, None, None, candidates, temperature, 0.0)
    logits = images @ texts.T / temperature
    labels = torch.arange(5)
    assert losses[0].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert losses[1].item() == pytest.approx(F.cross_entropy(logits.T, labels).item(), rel=1e-6)


def test_soft_targets_mix_the_teachers_similarities() -> None:
    images, texts, teacher = unit(4, 8, seed=5), unit(4, 8, seed=6), unit(4, 8, seed=7)
    temperature = torch.tensor(0.2)
    candidates = gather_candidates(teacher, texts, None, None)
    image_to_text, _ = cross_modal(images, texts, teacher, texts, candidates, temperature, 0.4)
    believed = (teacher @ texts.T / temperature).softmax(1)
    targets = 0.4 * believed + 0.6 * torch.eye(4)
    expected = -((images @ texts.T / temperature).log_softmax(1) * targets).sum(1).mean()
    torch.testing.assert_close(image_to_text, expected)


def test_gradient_reaches_student_and_temperature_and_not_the_candidates() -> None:
    images, texts = unit(3, 8).requires_grad_(), unit(3, 8, seed=1).requires_grad_()
    teacher = unit(3, 8, seed=2)
    temperature = torch.tensor(0.07, requires_grad=True)
    candidates = gather_candidates(teacher, teacher, torch.arange(3), None)
    torch.stack(cross_modal(images, texts, teacher, teacher, candidates, temperature, 0.4)).sum().backward()
    assert images.grad is not None and texts.grad is not None and temperature.grad is not None
    assert temperature.grad.abs() > 0


def test_same_image_without_ids_is_the_diagonal() -> None:
    assert torch.equal(same_image(None, 3, torch.device("cpu")), torch.eye(3, dtype=torch.bool))


def test_sigmoid_judges_each_pair_alone() -> None:
    images, texts, teacher = unit(4, 8, seed=5), unit(4, 8, seed=6), unit(4, 8, seed=7)
    temperature, bias = torch.tensor(0.2), -math.log(3)
    candidates = gather_candidates(teacher, texts, None, None)
    image_to_text, _ = cross_modal(images, texts, teacher, texts, candidates, temperature, 0.0, sigmoid=True)
    logits = images @ texts.T / temperature + bias
    signs = 2 * torch.eye(4) - 1
    torch.testing.assert_close(image_to_text, -F.logsigmoid(signs * logits).sum(1).mean())
    softened, _ = cross_modal(images, texts, teacher, texts, candidates, temperature, 0.4, sigmoid=True)
    targets = 0.4 * (teacher @ texts.T / temperature + bias).sigmoid() + 0.6 * torch.eye(4)
    expected = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).sum(1).mean()
    torch.testing.assert_close(softened, expected)


def test_sigmoid_takes_several_positives_whole_and_leaves_empty_slots_out() -> None:
    images, texts, ids = unit(3, 8, seed=1), unit(3, 8, seed=2), torch.tensor([7, 7, 5])
    temperature = torch.tensor(0.1)
    candidates = gather_candidates(images, texts, ids, FeatureQueue(5, 8))
    loss, _ = cross_modal(images, texts, None, None, candidates, temperature, 0.0, sigmoid=True)
    signs = 2.0 * (ids[:, None] == ids[None, :]) - 1
    logits = images @ texts.T / temperature - math.log(8 - 1)
    torch.testing.assert_close(loss, -F.logsigmoid(signs * logits).sum(1).mean())
