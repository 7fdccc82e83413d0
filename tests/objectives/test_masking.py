"""Masked language modelling: which tokens are masked, how, and losses that stay finite."""

from __future__ import annotations

import pytest
import torch

from tercet.config import TextConfig
from tercet.objectives.loss import distilled_cross_entropy
from tercet.objectives.masking import IGNORED, mask_tokens, masked_positions

TEXT = TextConfig(vocabulary_size=1000, pad_id=0, cls_id=2, sep_id=3, mask_id=4)


def texts(batch: int = 400, tokens: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 1000, (batch, tokens), generator=generator)
    ids[:, 0] = TEXT.cls_id
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    return ids.masked_fill(~mask, TEXT.pad_id), mask


def test_rates_of_chosen_masked_random_and_kept_tokens() -> None:
    ids, mask = texts()
    masked = mask_tokens(ids, mask, 0.15, TEXT, torch.Generator().manual_seed(0))
    maskable = int(mask[:, 1:].sum())
    rows = torch.arange(len(ids)).repeat_interleave(masked.rows.shape[1])[masked.chosen]
    columns = masked.rows.flatten()[masked.chosen]
    assert (columns > 0).all()
    assert mask[rows, columns].all()
    assert torch.equal(ids[rows, columns], masked.labels)
    chosen = len(masked.labels)
    assert chosen / maskable == pytest.approx(0.15, abs=0.02)
    now = masked.input_ids[rows, columns]
    assert (now == TEXT.mask_id).float().mean().item() == pytest.approx(0.8, abs=0.04)
    kept = (now == masked.labels).float().mean().item()
    assert kept == pytest.approx(0.1, abs=0.03)
    changed = (masked.input_ids != ids).sum().item()
    assert changed == chosen - round(kept * chosen)


def test_the_same_generator_state_masks_the_same_tokens() -> None:
    ids, mask = texts(8)
    first, second = (mask_tokens(ids, mask, 0.3, TEXT, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_captions_of_cls_alone_and_batches_with_nothing_masked(probability: float) -> None:
    ids = torch.tensor([[2, 0], [2, 11]])
    mask = torch.tensor([[True, False], [True, True]])
    masked = mask_tokens(ids, mask, probability, TEXT, torch.Generator().manual_seed(0))
    assert len(masked.labels) == probability
    logits = torch.randn(len(masked.labels), 1000, requires_grad=True)
    loss = distilled_cross_entropy(logits, masked.labels, torch.randn(len(masked.labels), 1000), 0.4)
    assert loss.isfinite()
    loss.backward()
    if probability == 0:
        assert loss.item() == 0


def test_each_label_is_found_in_its_row() -> None:
    labels = torch.full((3, 5), IGNORED)
    labels[0, 2], labels[0, 4], labels[2, 1] = 7, 8, 9
    masked = masked_positions(torch.zeros(3, 5, dtype=torch.long), labels)
    assert masked.rows.tolist() == [[2, 4], [0, 0], [1, 0]]
    assert masked.labels.tolist() == [7, 8, 9]
    assert masked.chosen.tolist() == [0, 1, 4]
