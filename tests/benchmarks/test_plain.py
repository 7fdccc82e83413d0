"""The plain version that the benchmarks time equals the published numbers, and ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import Fixture, assert_close_to_norm, load_fixture, load_student, load_task, read_batch

from plain import PlainModel, from_plain, plain_scores, to_plain
from plain_step import PlainBatch, PlainPretraining, sum_of_losses
from published_names import published_queues, published_teacher
from tercet.config import ObjectivesConfig
from tercet.model.names import published_to_state
from tercet.objectives.loss import total
from tercet.tasks.pretrain import Pretraining
from tercet.tasks.rerank import match_image

LOSSES = ("cma", "imc", "lmi", "itm", "mlm")


@pytest.fixture(scope="module", params=["pretrain_grid4", "pretrain_grid16"])
def fixture(request: pytest.FixtureRequest, parity_dir: Path) -> Fixture:
    return load_fixture(parity_dir, request.param)


def plain_task(fixture: Fixture, ours: Pretraining) -> PlainPretraining:
    assert ours.teacher is not None
    task = PlainPretraining(PlainModel.of(ours.student), ours.student.config.text, ours.config)
    teacher = published_teacher(fixture.part("state."))
    held = to_plain(teacher, task.teacher)
    missing, unexpected = task.teacher.load_state_dict(held, strict=False)
    assert not unexpected
    assert all(name.startswith(("itm_head", "temperature")) for name in missing)
    queues = published_queues(fixture.part("state."))
    task.image_queue.copy_(queues["image_queue"])
    task.text_queue.copy_(queues["text_queue"])
    task.pointer = int(queues["queue_ptr"][0])
    return task.train()


def test_the_plain_step_equals_the_published_one_and_ours(fixture: Fixture) -> None:
    settings = fixture.about["model_config"]
    config = ObjectivesConfig(queue_size=settings["queue_size"], momentum=settings["momentum"])
    ours = load_task(fixture, config)
    plain = plain_task(fixture, ours)
    batch, negatives, alpha = read_batch(fixture, "in.")
    part = fixture.part("in.")
    losses = plain(
        PlainBatch(
            images=batch.images,
            second_views=batch.second_views,  # type: ignore[arg-type]
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            masked_ids=part["mlm_input_ids"],
            labels=part["mlm_labels"],
            negative_images=negatives.images.tolist(),
            negative_texts=negatives.texts.tolist(),
        ),
        alpha,
    )
    loss = sum_of_losses(losses)
    loss.backward()
    assert loss.item() == pytest.approx(fixture.tensors["out.loss_total"].item(), rel=1e-5)

    ours.begin_step()
    output = ours(batch, alpha, negatives)
    total(output.losses, config).backward()
    for name in LOSSES:
        assert losses[name].item() == pytest.approx(output.losses[name].item(), rel=1e-5), name

    weights = dict(ours.student.named_parameters())
    gradients = {name: value.grad for name, value in plain.student.named_parameters() if value.grad is not None}
    published = published_to_state(fixture.part("grad."))
    for name, gradient in from_plain(gradients, weights).items():
        own = weights[name].grad
        assert own is not None
        assert_close_to_norm(gradient, own, 1e-4, 1e-6, name)
        assert_close_to_norm(gradient, published[name], 1e-4, 1e-6, name)

    assert ours.teacher is not None
    moved = dict(plain.teacher.named_parameters())
    for name, value in from_plain(moved, dict(ours.teacher.model.named_parameters())).items():
        torch.testing.assert_close(value, ours.teacher.model.get_parameter(name), rtol=1e-6, atol=1e-7, msg=name)
    after = fixture.part("after_fwd.")
    torch.testing.assert_close(plain.image_queue, after["image_queue"], rtol=0, atol=1e-5)
    assert plain.pointer == after["queue_ptr"].item()


def test_the_plain_scores_of_a_reranking_equal_ours(parity_dir: Path) -> None:
    fixture = load_fixture(parity_dir, "retrieval_eval")
    inputs = fixture.part("in.")
    model = load_student(fixture).eval()
    plain = PlainModel.of(model).eval()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        image_embeds = model.encode_image(inputs["image"])
        text_embeds = model.encode_text(inputs["input_ids"], mask)
        torch.testing.assert_close(plain.vision(inputs["image"]), image_embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain.encode_text(inputs["input_ids"], mask)[mask], text_embeds[mask])
    own = [embeds[:length] for embeds, length in zip(text_embeds, mask.sum(1).tolist(), strict=True)]
    for image in image_embeds[:3]:
        expected = plain_scores(plain, image, text_embeds, mask, batch=8)
        torch.testing.assert_close(match_image(model, image, own)[:, 1], expected, rtol=1e-5, atol=1e-5)
