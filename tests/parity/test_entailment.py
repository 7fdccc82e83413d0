"""Visual entailment equals the published: loss with and without the teacher, logits, gradients, the teacher after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import Fixture, assert_gradients, load_fixture, load_labels

from published_names import published_teacher
from tercet.config import ObjectivesConfig
from tercet.tasks.classification import ENTAILMENT, ClassBatch, ClassificationTask


@pytest.fixture(scope="module")
def fixture(parity_dir: Path) -> Fixture:
    return load_fixture(parity_dir, "ve")


def load(fixture: Fixture, momentum: float = 0.995) -> ClassificationTask:
    config = ObjectivesConfig(momentum=momentum)
    return load_labels(fixture, "entailment", lambda student: ClassificationTask(student, ENTAILMENT, config))


def read(fixture: Fixture) -> tuple[ClassBatch, float]:
    part = fixture.part("in.")
    mask = part["attention_mask"].bool()
    return ClassBatch(part["image"], None, part["input_ids"], mask, part["targets"]), part["alpha"].item()


def test_loss_logits_and_gradients(fixture: Fixture) -> None:
    task = load(fixture, fixture.about["model_config"]["momentum"])
    batch, alpha = read(fixture)
    task.begin_step()
    output = task(batch, alpha)
    output.losses["entailment"].backward()
    out = fixture.part("out.")
    assert output.losses["entailment"].item() == pytest.approx(out["loss"].item(), rel=1e-5)
    torch.testing.assert_close(output.logits, out["logits"], rtol=1e-5, atol=1e-5)
    assert output.teacher_logits is not None
    torch.testing.assert_close(output.teacher_logits, out["logits_m"], rtol=1e-5, atol=1e-5)

    assert_gradients(fixture, task.student)


def test_the_teacher_after_the_step(fixture: Fixture) -> None:
    task = load(fixture)
    task.begin_step()
    assert task.teacher is not None
    actual, expected = task.teacher.model.state_dict(), published_teacher(fixture.part("after_fwd."))
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("teacher", [True, False])
def test_loss_without_distillation(fixture: Fixture, teacher: bool) -> None:
    config = ObjectivesConfig() if teacher else ObjectivesConfig(teacher=False, imc=0, lmi=0, queue_size=0)
    task = load_labels(fixture, "entailment", lambda student: ClassificationTask(student, ENTAILMENT, config))
    batch, _ = read(fixture)
    task.begin_step()
    output = task(batch, 0.0)
    assert output.losses["entailment"].item() == pytest.approx(fixture.tensors["out_nodistill.loss"].item(), rel=1e-5)
    assert output.teacher_logits is None


def test_logits_in_evaluation_mode(fixture: Fixture) -> None:
    task = load(fixture).eval()
    batch, _ = read(fixture)
    with torch.no_grad():
        logits = ENTAILMENT.logits(task.student, batch)
    torch.testing.assert_close(logits, fixture.tensors["out.eval_logits"], rtol=1e-5, atol=1e-5)


def test_samples_that_share_an_image_give_the_same_logits(fixture: Fixture) -> None:
    """Evaluation sends each image once and says which sample has which."""
    task = load(fixture).eval()
    batch, _ = read(fixture)
    order = torch.tensor([2, 0, 1, 2, 0])
    repeated = ClassBatch(batch.images[order], None, batch.input_ids, batch.attention_mask, batch.labels)
    once = ClassBatch(batch.images[:3], order[:, None], batch.input_ids, batch.attention_mask, batch.labels)
    with torch.no_grad():
        expected, actual = ENTAILMENT.logits(task.student, repeated), ENTAILMENT.logits(task.student, once)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
