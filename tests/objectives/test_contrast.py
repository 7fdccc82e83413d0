"""Contrast: positives by image id, empty slots, and the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tercet.objectives.contrast import contrast, cross_modal, gather_candidates, intra_modal
from tercet.objectives.state import FeatureQueue


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
    for loss in (cross_modal, intra_modal):
        torch.testing.assert_close(loss(feats, others, empty, temperature), loss(feats, others, plain, temperature))
    soft = {"teacher_feats": (feats, others), "alpha": 0.3}
    expected = cross_modal(feats, others, plain, temperature, **soft)
    torch.testing.assert_close(cross_modal(feats, others, empty, temperature, **soft), expected)


def test_without_teacher_it_is_the_loss_of_clip() -> None:
    images, texts, temperature = unit(5, 8, seed=3), unit(5, 8, seed=4), torch.tensor(0.07)
    loss = cross_modal(images, texts, gather_candidates(images, texts, None, None), temperature)
    logits, labels = images @ texts.T / temperature, torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_soft_targets_mix_the_teachers_similarities() -> None:
    images, texts, teacher = unit(4, 8, seed=5), unit(4, 8, seed=6), unit(4, 8, seed=7)
    temperature = torch.tensor(0.2)
    candidates = gather_candidates(teacher, texts, None, None)
    loss = contrast(images, candidates.text_feats, candidates, temperature, None, teacher, 0.4)
    targets = 0.4 * (teacher @ texts.T / temperature).softmax(1) + 0.6 * torch.eye(4)
    expected = -((images @ texts.T / temperature).log_softmax(1) * targets).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_gradient_reaches_student_and_temperature_and_not_the_teacher() -> None:
    images, texts = unit(3, 8).requires_grad_(), unit(3, 8, seed=1).requires_grad_()
    teacher = unit(3, 8, seed=2)
    temperature = torch.tensor(0.07, requires_grad=True)
    candidates = gather_candidates(teacher, teacher, torch.arange(3), None)
    cross_modal(images, texts, candidates, temperature, None, (teacher, teacher), 0.4).backward()
    assert images.grad is not None and texts.grad is not None and temperature.grad is not None
    # With targets held fixed: what the teacher's similarities say of the temperature is no gradient.
    fixed = 0.4 * (teacher @ teacher.T / temperature.detach()).softmax(1) + 0.6 * torch.eye(3)
    other = temperature.detach().clone().requires_grad_()
    for feats in (images, texts):
        (-((feats.detach() @ teacher.T / other).log_softmax(1) * fixed).sum(1).mean() / 2).backward()
    torch.testing.assert_close(temperature.grad, other.grad)


def test_a_count_makes_the_mean_over_ranks_the_mean_over_all_rows() -> None:
    images, texts, temperature = unit(5, 8, seed=3), unit(5, 8, seed=4), torch.tensor(0.1)
    candidates = gather_candidates(images, texts, None, None)
    parts = []
    for rows in (slice(0, 3), slice(3, 5)):
        own = gather_candidates(images, texts, None, None, rows=rows)
        parts.append(cross_modal(images[rows], texts[rows], own, temperature, 2.5))
    torch.testing.assert_close(sum(parts) / 2, cross_modal(images, texts, candidates, temperature))
