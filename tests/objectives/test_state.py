"""The queue as a ring of any size, and the teacher as a moving average."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.config import ModelConfig
from tercet.model.tercet import Tercet
from tercet.objectives.state import EMPTY_ID, FeatureQueue, Teacher
from tercet.tasks.pretrain import ENCODERS


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 13), batches=st.lists(st.integers(0, 20), max_size=8))
def test_queue_holds_the_newest_features_for_any_batch_and_queue_size(size: int, batches: list[int]) -> None:
    queue = FeatureQueue(size, 2)
    written: list[int] = []
    for batch in batches:
        ids = torch.arange(len(written), len(written) + batch)
        feats = ids[:, None].float().expand(-1, 2)
        queue.enqueue(feats, -feats, ids)
        written += ids.tolist()
        assert queue.pointer.item() == len(written) % size
    held = queue.image_ids[queue.image_ids != EMPTY_ID]
    assert sorted(held.tolist()) == written[-size:]
    filled = queue.image_ids != EMPTY_ID
    assert torch.equal(queue.image_feats[filled, 0], queue.image_ids[filled].float())
    assert torch.equal(queue.text_feats[filled, 0], -queue.image_ids[filled].float())


def test_a_skipped_step_leaves_the_queue_unchanged() -> None:
    queue = FeatureQueue(5, 2)
    ids = torch.arange(3)
    queue.enqueue(ids[:, None].float().expand(-1, 2), torch.ones(3, 2), ids, torch.tensor(True))
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    assert before["pointer"] == 3 and before["image_ids"].tolist() == [0, 1, 2, EMPTY_ID, EMPTY_ID]
    broken = torch.full((4, 2), float("nan"))
    queue.enqueue(broken, broken, torch.arange(3, 7), torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_teacher_follows_and_takes_no_gradient(momentum: float) -> None:
    student = Tercet(ModelConfig(size="tiny"))
    teacher = Teacher(student, (*ENCODERS, "fusion", "mlm_head"))
    before = {name: value.clone() for name, value in teacher.model.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    teacher.update(student, momentum)
    for name, value in teacher.model.named_parameters():
        torch.testing.assert_close(value, before[name] + (1 - momentum), rtol=0, atol=1e-6)
        if momentum in (0.0, 1.0):
            assert torch.equal(value, before[name] if momentum else student.get_parameter(name))
        assert not value.requires_grad


def test_teacher_keeps_only_what_is_read() -> None:
    student = Tercet(ModelConfig(size="tiny"))
    names = {name for name, _ in Teacher(student, ENCODERS).model.named_parameters()}
    assert not any(name.startswith(("fusion", "mlm_head", "itm_head", "temperature")) for name in names)
    fused = {name for name, _ in Teacher(student, (*ENCODERS, "fusion", "mlm_head")).model.named_parameters()}
    assert {name.split(".")[0] for name in fused - names} == {"fusion", "mlm_head"}
