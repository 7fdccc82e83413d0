"""Negatives and images of text assignment: sampled by their softmax, never of the own image, never failing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tercet.objectives.matching import (
    FIRST,
    IGNORED,
    NEITHER,
    SECOND,
    Assignment,
    assignment_loss,
    assignment_similarity,
    matching,
    sample_assignment,
    sample_negatives,
)


def test_draws_follow_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0]] * 4)
    same = torch.eye(4, dtype=torch.bool)
    counts = torch.zeros(4, 4)
    draws = 4000
    for _ in range(draws):
        negatives = sample_negatives(logits, logits, same)
        counts[torch.arange(4), negatives.texts] += 1
    expected = logits.masked_fill(same, float("-inf")).softmax(dim=1)
    # Five standard errors of a share measured 4000 times.
    assert ((counts / draws - expected).abs() < 5 * (0.25 / draws) ** 0.5).all()
    assert counts.diagonal().sum() == 0


def test_a_row_whose_softmax_underflows_still_has_its_negatives() -> None:
    logits = torch.full((3, 3), -1e4)
    logits.fill_diagonal_(1e4)
    same = torch.eye(3, dtype=torch.bool)
    weights = logits.masked_fill(same, float("-inf")).softmax(dim=1)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    negatives = sample_negatives(logits, logits, same)
    assert negatives.valid.all()
    assert (negatives.images != torch.arange(3)).all()


def test_rows_without_any_negative_do_not_count_in_the_loss() -> None:
    ids = torch.tensor([4, 4, 4])
    same = ids[:, None] == ids
    negatives = sample_negatives(torch.randn(3, 3), torch.randn(3, 3), same)
    assert not negatives.valid.any()
    logits = torch.randn(9, 2, requires_grad=True)
    loss = matching(logits, negatives.valid)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:3], torch.ones(3, dtype=torch.long)))
    loss.backward()
    assert logits.grad is not None and (logits.grad[3:] == 0).all()
    alone = sample_negatives(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert matching(torch.randn(3, 2), alone.valid).isfinite()


def test_other_captions_of_the_same_image_are_never_drawn() -> None:
    torch.manual_seed(1)
    ids = torch.tensor([1, 2, 1, 3])
    same = ids[:, None] == ids
    for _ in range(200):
        negatives = sample_negatives(torch.randn(4, 4) * 5, torch.randn(4, 4) * 5, same)
        assert not same[torch.arange(4), negatives.images].any()
        assert not same[torch.arange(4), negatives.texts].any()


def feats(batch: int) -> torch.Tensor:
    return F.normalize(torch.randn(batch, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def draws(image_feats: torch.Tensor, same: torch.Tensor, count: int) -> list[Assignment]:
    torch.manual_seed(0)
    return [sample_assignment(image_feats, same) for _ in range(count)]


def test_labels_name_the_slot_of_the_own_image() -> None:
    ids = torch.tensor([0, 1, 1, 2, 3, 4])
    same = ids[:, None] == ids[None, :]
    own = torch.arange(6)
    for drawn in draws(feats(6), same, 50):
        first, second, labels = drawn.first, drawn.second, drawn.labels
        assert torch.equal(first == own, labels == FIRST)
        assert torch.equal(second == own, labels == SECOND)
        negatives = torch.where(labels == FIRST, second, first)
        assert not same[own, negatives].any()
        neither = labels == NEITHER
        assert not same[own, second][neither].any()
        assert (first != second).all()


def test_frequencies_and_weights_of_assignment_are_the_published_ones() -> None:
    image_feats = feats(5)
    same = torch.eye(5, dtype=torch.bool)
    found = draws(image_feats, same, 1500)
    labels = torch.stack([drawn.labels for drawn in found])
    for label in (FIRST, SECOND, NEITHER):
        assert (labels == label).double().mean().item() == pytest.approx(1 / 3, abs=0.03)
    weights = assignment_similarity(image_feats).masked_fill(same, float("-inf")).softmax(dim=1).nan_to_num(0.0)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    counts = torch.zeros(5, 5)
    for drawn in found:
        matched = drawn.labels != NEITHER
        negatives = torch.where(drawn.labels == FIRST, drawn.second, drawn.first)
        counts[torch.arange(5)[matched], negatives[matched]] += 1
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), weights, rtol=0, atol=0.06)


def test_assignment_in_small_batches() -> None:
    for drawn in draws(feats(2), torch.eye(2, dtype=torch.bool), 20):
        assert ((drawn.labels == FIRST) | (drawn.labels == SECOND)).all()
        assert {tuple(pair) for pair in torch.stack([drawn.first, drawn.second], 1).tolist()} <= {(0, 1), (1, 0)}
    for size in (1, 3):
        alone = sample_assignment(feats(size), torch.ones(size, size, dtype=torch.bool))
        assert (alone.labels == IGNORED).all()
        logits = torch.randn(size, 3, requires_grad=True)
        loss = assignment_loss(logits, alone.labels)
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None and torch.equal(logits.grad, torch.zeros(size, 3))


def test_assignment_of_similar_images_does_not_underflow() -> None:
    """One image is nearly the same and the others are opposite: every sample still has another image."""
    image_feats = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1e-4], [-1.0, 0.0], [-1.0, 1e-4]]), dim=-1)
    for drawn in draws(image_feats, torch.eye(4, dtype=torch.bool), 20):
        assert (drawn.labels != IGNORED).all()
        assert (drawn.first != drawn.second).all()
