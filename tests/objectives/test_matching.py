"""Hard negatives: drawn in proportion to their softmax, never the own image, never failing."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tercet.objectives.matching import matching, sample_negatives


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


def test_rows_without_any_negative_are_left_out_of_the_loss() -> None:
    ids = torch.tensor([4, 4, 4])
    same = ids[:, None] == ids
    negatives = sample_negatives(torch.randn(3, 3), torch.randn(3, 3), same)
    assert not negatives.valid.any()
    logits = torch.randn(9, 2, requires_grad=True)
    loss = matching(logits, negatives.valid)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:3], torch.ones(3, dtype=torch.long)))
    loss.backward()
    assert logits.grad is not None and (logits.grad[3:] == 0).all()


def test_a_batch_of_one() -> None:
    negatives = sample_negatives(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert matching(torch.randn(3, 2), negatives.valid).isfinite()


def test_other_captions_of_the_same_image_are_never_drawn() -> None:
    torch.manual_seed(1)
    ids = torch.tensor([1, 2, 1, 3])
    same = ids[:, None] == ids
    for _ in range(200):
        negatives = sample_negatives(torch.randn(4, 4) * 5, torch.randn(4, 4) * 5, same)
        assert not same[torch.arange(4), negatives.images].any()
        assert not same[torch.arange(4), negatives.texts].any()
