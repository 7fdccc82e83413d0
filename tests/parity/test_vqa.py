"""Question answering equals the published numbers: loss, gradients, teacher, ranking, and how the decoder starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures import Fixture, assert_gradients, assert_teacher, load_fixture, load_student, load_task_with_head
from torch import Tensor

from tercet.config import ModelConfig, ObjectivesConfig
from tercet.model.names import published_to_state, state_to_published
from tercet.model.tercet import Tercet
from tercet.tasks.answering import AnswerList, decoder_of, fuse_questions, rank_answers
from tercet.tasks.vqa import AnswerBatch, QuestionAnswering, answer_logits

CONFIG = ObjectivesConfig(queue_size=0, momentum=0.995)
# A fixture is fp32 on both sides; these are five to ten times what the reference's own rounding amounts to.
STATES, LOGITS = 3e-5, 6e-5


@pytest.fixture(scope="module")
def fixture(parity_dir: Path) -> Fixture:
    return load_fixture(parity_dir, "vqa")


def load_model(fixture: Fixture) -> Tercet:
    return load_student(fixture, ["answer"])


def load_task(fixture: Fixture, published: bool) -> QuestionAnswering:
    return load_task_with_head(fixture, "answer", lambda student: QuestionAnswering(student, CONFIG, published))


def read_batch(fixture: Fixture) -> AnswerBatch:
    part = fixture.part("in.")
    guessed = part["answer_mask"][:, 1:].bool()
    return AnswerBatch(
        images=part["image"],
        input_ids=part["question_ids"],
        attention_mask=part["question_mask"].bool(),
        answer_ids=part["answer_ids"],
        owners=torch.repeat_interleave(part["k"]),
        positions=guessed.flatten().nonzero().squeeze(1),
        labels=part["answer_ids"][:, 1:][guessed],
        weights=part["weights"][:, None].expand_as(guessed)[guessed],
    )


def answer_list(fixture: Fixture) -> AnswerList:
    part = fixture.part("in.")
    lengths = part["rank_answer_mask"].sum(dim=1)
    return AnswerList([str(index) for index in range(len(lengths))], part["rank_answer_ids"], lengths)


@torch.no_grad()
def fused_questions(fixture: Fixture, model: Tercet) -> Tensor:
    batch = read_batch(fixture)
    return fuse_questions(model, batch.images, batch.input_ids, batch.attention_mask)


@torch.no_grad()
def test_questions_and_answers_give_the_published_logits(fixture: Fixture) -> None:
    model, batch, out = load_model(fixture), read_batch(fixture), fixture.part("out.")
    assert (model.encode_image(batch.images) - out["image_embeds"]).abs().max() < STATES
    assert (fused_questions(fixture, model) - out["question_states"]).abs().max() < STATES
    expected = out["answer_logits"][:, :-1].flatten(0, 1)[batch.positions]
    assert (answer_logits(model, batch) - expected).abs().max() < LOGITS


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_published_loss_and_gradients_without_a_teacher(fixture: Fixture, alpha: float) -> None:
    task = load_task(fixture, published=True)
    assert task.teacher is None
    task.begin_step()
    loss = task(read_batch(fixture), alpha).losses["answer"]
    assert loss.item() == pytest.approx(fixture.tensors["out.loss"].item(), rel=1e-5)
    assert loss.item() == pytest.approx(fixture.tensors["out_nodistill.loss"].item(), rel=1e-5)
    loss.backward()
    assert_gradients(fixture, task.student)


def test_the_teacher_softens_the_targets(fixture: Fixture) -> None:
    """The published code computes the teacher's logits and throws them away; here they do what the method says."""
    task, batch, out = load_task(fixture, published=False), read_batch(fixture), fixture.part("out.")
    assert task.teacher is not None
    task.begin_step()
    assert_teacher(fixture, task.teacher)
    teacher_logits = out["logits_m"].flatten(0, 1)[batch.positions]
    with torch.no_grad():
        assert (answer_logits(task.teacher.model, batch) - teacher_logits).abs().max() < LOGITS
    logits = out["answer_logits"][:, :-1].flatten(0, 1)[batch.positions].double().log_softmax(-1)
    hard = -logits.gather(1, batch.labels[:, None]).squeeze(1)
    soft = -(logits * teacher_logits.double().softmax(-1)).sum(-1)
    for alpha in (0.0, 0.4, 1.0):
        expected = (batch.weights * ((1 - alpha) * hard + alpha * soft)).sum() / 3
        assert task(batch, alpha).losses["answer"].item() == pytest.approx(expected.item(), rel=1e-5)
    loss = task(batch, 0.4).losses["answer"]
    loss.backward()
    published = published_to_state(fixture.part("grad."))["answer_decoder.head.bias"]
    assert task.student.answer_decoder is not None
    gradient = task.student.answer_decoder.head.bias.grad
    assert gradient is not None and (gradient - published).abs().max() > 1e-2


def test_published_ranking_counts_the_first_token_twice(fixture: Fixture) -> None:
    model, out = load_model(fixture).eval(), fixture.part("out.")
    mask = fixture.tensors["in.question_mask"]
    k = int(fixture.tensors["in.rank_k"])
    states = fused_questions(fixture, model)
    ranked = rank_answers(decoder_of(model), states, mask, answer_list(fixture), k, published=True)
    assert torch.equal(ranked.indices, out["rank_topk_ids"])
    assert torch.equal(ranked.indices[:, 0], out["rank_prediction"])
    assert (ranked.probabilities - out["rank_topk_probs"]).abs().max() < 1e-5
    candidates = out["rank_candidate_ids_before_rerank"]
    expected = torch.zeros(3, 24).scatter(1, candidates, out["rank_log_probs_sum"]).gather(1, ranked.indices)
    assert (ranked.log_probabilities - expected).abs().max() < LOGITS


def test_default_ranking_is_by_the_probability_of_the_answer(fixture: Fixture) -> None:
    model, out = load_model(fixture).eval(), fixture.part("out.")
    mask = fixture.tensors["in.question_mask"]
    states, decoder, answers = fused_questions(fixture, model), decoder_of(model), answer_list(fixture)
    ranked = rank_answers(decoder, states, mask, answers, 8)
    candidates = out["rank_candidate_ids_before_rerank"]
    assert [set(row) for row in ranked.indices.tolist()] == [set(row) for row in candidates.tolist()]
    expected = torch.zeros(3, 24).scatter(1, candidates, -out["rank_answer_loss"])
    assert (ranked.log_probabilities - expected.gather(1, ranked.indices)).abs().max() < LOGITS
    assert (ranked.log_probabilities.diff(dim=1) <= 0).all()
    # The two ways of counting do not agree here, so neither test can pass by the other's rule.
    assert not torch.equal(ranked.indices, out["rank_topk_ids"])
    # With every answer scored in full, no better one can have been missed by its first token.
    every = rank_answers(decoder, states, mask, answers, 1000)
    assert every.indices.shape == (3, 24)
    assert (every.log_probabilities.exp().sum(dim=1) <= 1 + 1e-5).all()


def test_the_decoder_starts_as_published(parity_dir: Path) -> None:
    """Each tensor of a new decoder is the one that the published renaming puts there."""
    renamed = json.loads((parity_dir / "official_key_remap.json").read_text())["remap"]["vqa"][
        "loaded_target_to_source"
    ]
    text = {"width": 8, "mlp_width": 16, "heads": 2, "vocabulary_size": 150, "max_positions": 8}
    vision = {"image_size": 16, "patch_size": 8, "width": 8, "depth": 1, "heads": 2}
    model = Tercet(ModelConfig.model_validate({"text": text, "vision": vision}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    source = state_to_published(model.state_dict(), "pretraining")
    assert model.add_heads(["answer"]) == ["answer_decoder"]
    target = state_to_published(model.state_dict(), "downstream")
    started = [name for name in renamed if name.startswith("text_decoder.")]
    assert set(started) == {name for name in target if name.startswith("text_decoder.")}
    for name in started:
        assert torch.equal(target[name], source[renamed[name]]), name
