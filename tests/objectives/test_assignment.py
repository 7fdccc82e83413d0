"""The draw of text assignment: which images a text is tried with, and how often."""

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
    sample_assignment,
)


def feats(batch: int) -> torch.Tensor:
    return F.normalize(torch.randn(batch, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def draws(image_feats: torch.Tensor, same: torch.Tensor, count: int) -> list[Assignment]:
    torch.manual_seed(0)
    return [sample_assignment(image_feats, same) for _ in range(count)]


def test_labels_tell_where_the_own_image_is() -> None:
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


def test_shares_and_weights_are_the_published_ones() -> None:
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


def test_small_batches() -> None:
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


def test_similar_images_do_not_underflow() -> None:
    """One image nearly the same, and the others opposite: every draw still names another image."""
    image_feats = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1e-4], [-1.0, 0.0], [-1.0, 1e-4]]), dim=-1)
    for drawn in draws(image_feats, torch.eye(4, dtype=torch.bool), 20):
        assert (drawn.labels != IGNORED).all()
        assert (drawn.first != drawn.second).all()
