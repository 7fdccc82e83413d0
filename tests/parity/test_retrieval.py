"""Retrieval equals the published: the fine-tuning step, similarities, re-ranking scores and recall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import FP32_EPS, assert_gradients, load_fixture, load_student, load_task, read_batch, teacher_state

from tercet.config import ObjectivesConfig
from tercet.objectives.loss import total
from tercet.tasks.encoding import EncodedTexts
from tercet.tasks.rerank import candidate_pairs
from tercet.tasks.retrieval import RANKS, Scores, recall, rerank

FILL = -100.0


def published_metrics(metrics: dict[str, float]) -> dict[str, float]:
    renamed = {f"{ours}_r{rank}": metrics[f"{theirs}_r{rank}"] for ours, theirs in NAMES for rank in RANKS}
    renamed |= {f"{ours}_r_mean": metrics[f"{theirs}_r_mean"] for ours, theirs in NAMES}
    return renamed | {"r_mean": metrics["r_mean"]}


NAMES = (("text", "txt"), ("image", "img"))


@pytest.mark.parametrize("distill", [True, False])
def test_fine_tuning_step(parity_dir: Path, distill: bool) -> None:
    fixture = load_fixture(parity_dir, "retrieval_train")
    settings = fixture.about["model_config"]
    config = ObjectivesConfig(
        mlm=0, queue_size=settings["queue_size"], momentum=settings["momentum"], temperature_max=10.0
    )
    task = load_task(fixture, config, match_ids=True)
    batch, negatives, alpha = read_batch(fixture, "in.")
    task.begin_step()
    output = task(batch, alpha if distill else 0.0, negatives)
    loss = total(output.losses, config)
    loss.backward()

    out = fixture.part("out." if distill else "out_nodistill.")
    assert loss.item() == pytest.approx(out["loss_total"].item(), rel=1e-5)
    assert output.losses["itm"].item() == pytest.approx(out["loss_itm"].item(), rel=1e-5)
    for name, first, second in (
        ("cma", "loss_i2t", "loss_t2i"),
        ("imc", "loss_i2i", "loss_t2t"),
        ("lmi", "loss_i2i_inMod_l", "loss_t2t_inMod_l"),
    ):
        expected = (out[first] + out[second]).item() / 2
        assert output.losses[name].item() == pytest.approx(expected, rel=1e-5), name

    if distill:
        assert_gradients(fixture, task.student)
    seen = dict(task.student.named_parameters())
    recorded = fixture.part("grad." if distill else "grad_nodistill.")
    for name, theirs in (
        ("temperature", "temp"),
        ("text_projection.weight", "text_proj.weight"),
        ("vision_projection.weight", "vision_proj.weight"),
        ("vision.position_embed", "visual_encoder.pos_embed"),
    ):
        actual, bound = seen[name].grad, 10 * fixture.precision("grad", theirs)
        assert actual is not None and bound > 0
        torch.testing.assert_close(actual, recorded[theirs], rtol=FP32_EPS, atol=bound, msg=name)
    if not distill:
        return
    task.enqueue(batch, output)
    after = fixture.part("after_fwd.")
    assert task.queue is not None and task.teacher is not None
    torch.testing.assert_close(task.queue.image_feats, after["image_queue"].T, rtol=0, atol=1e-5)
    torch.testing.assert_close(task.queue.text_feats, after["text_queue"].T, rtol=0, atol=1e-5)
    assert torch.equal(task.queue.image_ids, after["idx_queue"][0])
    teacher = task.teacher.model.state_dict()
    for name, value in teacher_state(task, after).items():
        torch.testing.assert_close(teacher[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_evaluation_with_reranking(parity_dir: Path) -> None:
    fixture = load_fixture(parity_dir, "retrieval_eval")
    inputs, out = fixture.part("in."), fixture.part("out.")
    model = load_student(fixture).eval()
    count = fixture.about["k_test"]
    with torch.no_grad():
        image_embeds = model.encode_image(inputs["image"])
        mask = inputs["attention_mask"].bool()
        text_embeds = model.encode_text(inputs["input_ids"], mask)
        image_feats = model.project_image(image_embeds[:, 0])
        texts = EncodedTexts(
            model.project_text(text_embeds[:, 0]),
            [embeds[: int(own.sum())] for embeds, own in zip(text_embeds, mask, strict=True)],
        )
        similarities = image_feats @ texts.text_feats.T
        scores = rerank(model, list(image_embeds), texts, similarities, count, torch.device("cpu"))
    torch.testing.assert_close(similarities, out["sims_matrix"], rtol=0, atol=1e-5)

    by_image, by_text = candidate_pairs(similarities, count)
    assert torch.equal(by_image, out["score_i2t"] != FILL)
    assert torch.equal(by_text.T, out["score_t2i"] != FILL)
    torch.testing.assert_close(scores.image_to_text[by_image], out["score_i2t"][by_image], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.text_to_image[by_text.T], out["score_t2i"][by_text.T], rtol=1e-5, atol=1e-5)

    expected = published_metrics(fixture.about["metrics"])
    assert recall(scores, inputs["txt2img"]) == pytest.approx(expected, abs=1e-9)


def test_recall_alone(parity_dir: Path) -> None:
    fixture = load_fixture(parity_dir, "retrieval_metrics")
    inputs = fixture.part("in.")
    scores = Scores(inputs["score_i2t"], inputs["score_t2i"])
    expected = published_metrics(fixture.about["metrics"])
    assert recall(scores, inputs["txt2img"]) == pytest.approx(expected, abs=1e-9)
