"""Entailment, statements about two images, and the text assignment before them equal the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import Fixture, assert_gradients, assert_teacher, load_fixture, load_student, load_task_with_head

from tercet.config import ObjectivesConfig
from tercet.model.names import published_to_state
from tercet.objectives.matching import Assignment, assignment_similarity
from tercet.tasks.classification import (
    ENTAILMENT,
    NLVR,
    AssignmentBatch,
    ClassBatch,
    ClassHead,
    ClassificationTask,
    TextAssignment,
    select_images,
)

HEADS = {"ve": ENTAILMENT, "nlvr": NLVR}


@pytest.fixture(params=HEADS)
def fixture(request: pytest.FixtureRequest, parity_dir: Path) -> tuple[Fixture, ClassHead]:
    return load_fixture(parity_dir, request.param), HEADS[request.param]


def load(fixture: Fixture, head: ClassHead, **settings: float) -> ClassificationTask:
    config = ObjectivesConfig.model_validate({"momentum": fixture.about["model_config"]["momentum"], **settings})
    return load_task_with_head(fixture, head.name, lambda student: ClassificationTask(student, head, config))


def read(fixture: Fixture) -> tuple[ClassBatch, float]:
    part = fixture.part("in.")
    images = part["image"] if "image" in part else torch.stack([part["image0"], part["image1"]], dim=1).flatten(0, 1)
    mask = part["attention_mask"].bool()
    return ClassBatch(images, None, part["input_ids"], mask, part["targets"]), part["alpha"].item()


def test_loss_logits_gradients_and_teacher(fixture: tuple[Fixture, ClassHead]) -> None:
    published, head = fixture
    task = load(published, head)
    batch, alpha = read(published)
    task.begin_step()
    output = task(batch, alpha)
    output.losses[head.name].backward()
    out = published.part("out.")
    assert output.losses[head.name].item() == pytest.approx(out["loss"].item(), rel=1e-5)
    torch.testing.assert_close(output.logits, out["logits"], rtol=1e-5, atol=1e-5)
    assert output.teacher_logits is not None
    torch.testing.assert_close(output.teacher_logits, out["logits_m"], rtol=1e-5, atol=1e-5)
    assert_gradients(published, task.student)
    assert_teacher(published, task.teacher)


@pytest.mark.parametrize("settings", [{}, {"teacher": False, "imc": 0, "lmi": 0, "queue_size": 0}])
def test_loss_without_distillation(fixture: tuple[Fixture, ClassHead], settings: dict[str, float]) -> None:
    published, head = fixture
    task = load(published, head, **settings)
    task.begin_step()
    output = task(read(published)[0], 0.0)
    expected = published.tensors["out_nodistill.loss"].item()
    assert output.losses[head.name].item() == pytest.approx(expected, rel=1e-5)
    assert output.teacher_logits is None


@torch.no_grad()
def test_entailment_logits_in_evaluation_mode_and_of_shared_images(parity_dir: Path) -> None:
    """Evaluation sends each image once, with the row of each sample's image."""
    published = load_fixture(parity_dir, "ve")
    student, batch = load(published, ENTAILMENT).eval().student, read(published)[0]
    logits = ENTAILMENT.logits(student, batch)
    torch.testing.assert_close(logits, published.tensors["out.eval_logits"], rtol=1e-5, atol=1e-5)
    order, texts = torch.tensor([2, 0, 1, 2, 0]), (batch.input_ids, batch.attention_mask, batch.labels)
    repeated = ENTAILMENT.logits(student, ClassBatch(batch.images[order], None, *texts))
    once = ENTAILMENT.logits(student, ClassBatch(batch.images[:3], order[:, None], *texts))
    torch.testing.assert_close(once, repeated, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tokens_fused_with_two_images(parity_dir: Path) -> None:
    published = load_fixture(parity_dir, "nlvr")
    model, (batch, _) = load(published, NLVR).student.eval(), read(published)
    kv = model.project_kv(model.encode_image(batch.images))
    first, second = (select_images(kv, None, position, 2) for position in (0, 1))
    text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
    assert model.second_fusion is not None
    mask = batch.attention_mask
    fused = model.second_fusion(model.fusion, text_embeds, mask, first, second)
    torch.testing.assert_close(fused[mask], published.tensors["out.last_hidden_state"][mask], rtol=1e-5, atol=1e-5)


def test_text_assignment_and_the_weights_of_its_negatives(parity_dir: Path) -> None:
    published = load_fixture(parity_dir, "nlvr_pretrain")
    part, out = published.part("in."), published.part("out.")
    task = TextAssignment(load_student(published, ["assignment"]), ObjectivesConfig()).train()
    ids = torch.arange(len(part["labels"]))
    batch = AssignmentBatch(part["image"], part["input_ids"], part["attention_mask"].bool(), ids)
    output = task(batch, 0.4, Assignment(part["slot0_image_idx"], part["slot1_image_idx"], part["labels"]))
    output.losses["assignment"].backward()
    assert output.losses["assignment"].item() == pytest.approx(out["loss"].item(), rel=1e-5)
    torch.testing.assert_close(output.logits, out["logits"], rtol=1e-5, atol=1e-5)
    assert_gradients(published, task.student)
    frozen = {name: published.tensors[f"state.{name}"] for name in published.about["parameters_without_gradient"]}
    assert all(not task.student.get_parameter(name).requires_grad for name in published_to_state(frozen))

    with torch.no_grad():
        feats = task.student.project_image(task.student.encode_image(batch.images)[:, 0])
    torch.testing.assert_close(feats, out["image_feat"], rtol=1e-5, atol=1e-5)
    same = torch.eye(len(feats), dtype=torch.bool)
    weights = assignment_similarity(feats).masked_fill(same, float("-inf")).softmax(dim=1)
    recorded = out["weights"] / out["weights"].sum(1, keepdim=True)
    torch.testing.assert_close(weights, recorded, rtol=1e-4, atol=1e-6)
