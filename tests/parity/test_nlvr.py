"""Statements about two images, and the text assignment before them, equal the published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import Fixture, assert_gradients, load_fixture, load_labels, load_student

from published_names import published_teacher
from tercet.config import ObjectivesConfig
from tercet.model.names import published_to_state
from tercet.objectives.matching import Assignment, assignment_similarity
from tercet.tasks.classification import (
    NLVR,
    AssignmentBatch,
    ClassBatch,
    ClassificationTask,
    TextAssignment,
    select_images,
)


@pytest.fixture(scope="module")
def fixture(parity_dir: Path) -> Fixture:
    return load_fixture(parity_dir, "nlvr")


@pytest.fixture(scope="module")
def pretrain(parity_dir: Path) -> Fixture:
    return load_fixture(parity_dir, "nlvr_pretrain")


def load(fixture: Fixture) -> ClassificationTask:
    config = ObjectivesConfig(momentum=fixture.about["model_config"]["momentum"])
    return load_labels(fixture, "nlvr", lambda student: ClassificationTask(student, NLVR, config))


def read(fixture: Fixture) -> tuple[ClassBatch, float]:
    part = fixture.part("in.")
    images = torch.stack([part["image0"], part["image1"]], dim=1).flatten(0, 1)
    mask = part["attention_mask"].bool()
    return ClassBatch(images, None, part["input_ids"], mask, part["targets"]), part["alpha"].item()


def test_loss_logits_and_gradients(fixture: Fixture) -> None:
    task = load(fixture)
    batch, alpha = read(fixture)
    task.begin_step()
    output = task(batch, alpha)
    output.losses["nlvr"].backward()
    out = fixture.part("out.")
    assert output.losses["nlvr"].item() == pytest.approx(out["loss"].item(), rel=1e-5)
    torch.testing.assert_close(output.logits, out["logits"], rtol=1e-5, atol=1e-5)
    assert output.teacher_logits is not None
    torch.testing.assert_close(output.teacher_logits, out["logits_m"], rtol=1e-5, atol=1e-5)
    assert_gradients(fixture, task.student)


def test_loss_without_distillation(fixture: Fixture) -> None:
    task = load(fixture)
    batch, _ = read(fixture)
    loss = task(batch, 0.0).losses["nlvr"].item()
    assert loss == pytest.approx(fixture.tensors["out_nodistill.loss"].item(), rel=1e-5)


def test_the_teacher_after_the_step(fixture: Fixture) -> None:
    task = load(fixture)
    task.begin_step()
    assert task.teacher is not None
    actual, expected = task.teacher.model.state_dict(), published_teacher(fixture.part("after_fwd."))
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_fused_tokens_everywhere(fixture: Fixture) -> None:
    model = load(fixture).student.eval()
    batch, _ = read(fixture)
    with torch.no_grad():
        memory = model.project_kv(model.encode_image(batch.images))
        first, second = (select_images(memory, None, place, 2) for place in (0, 1))
        text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
        assert model.second_fusion is not None
        fused = model.second_fusion(model.fusion, text_embeds, batch.attention_mask, first, second)
    mask = batch.attention_mask
    torch.testing.assert_close(fused[mask], fixture.tensors["out.last_hidden_state"][mask], rtol=1e-5, atol=1e-5)


def load_assignment(pretrain: Fixture) -> tuple[TextAssignment, AssignmentBatch, Assignment]:
    part = pretrain.part("in.")
    task = TextAssignment(load_student(pretrain, ["assignment"]), ObjectivesConfig()).train()
    ids = torch.arange(len(part["labels"]))
    batch = AssignmentBatch(part["image"], part["input_ids"], part["attention_mask"].bool(), ids)
    return task, batch, Assignment(part["slot0_image_idx"], part["slot1_image_idx"], part["labels"])


def test_text_assignment(pretrain: Fixture) -> None:
    task, batch, assignment = load_assignment(pretrain)
    output = task(batch, 0.4, assignment)
    output.losses["assignment"].backward()
    out = pretrain.part("out.")
    assert output.losses["assignment"].item() == pytest.approx(out["loss"].item(), rel=1e-5)
    torch.testing.assert_close(output.logits, out["logits"], rtol=1e-5, atol=1e-5)
    assert_gradients(pretrain, task.student)
    frozen = set(pretrain.about["parameters_without_gradient"])
    ones = {name: torch.ones_like(pretrain.tensors[f"state.{name}"]) for name in frozen}
    assert all(not dict(task.student.named_parameters())[name].requires_grad for name in published_to_state(ones))


def test_chances_of_the_negatives(pretrain: Fixture) -> None:
    task, batch, _ = load_assignment(pretrain)
    out = pretrain.part("out.")
    with torch.no_grad():
        feats = task.student.project_image(task.student.encode_image(batch.images)[:, 0])
    torch.testing.assert_close(feats, out["image_feat"], rtol=1e-5, atol=1e-5)
    weights = (
        assignment_similarity(feats).masked_fill(torch.eye(len(feats), dtype=torch.bool), float("-inf")).softmax(dim=1)
    )
    recorded = out["weights"] / out["weights"].sum(1, keepdim=True)
    torch.testing.assert_close(weights, recorded, rtol=1e-4, atol=1e-6)
