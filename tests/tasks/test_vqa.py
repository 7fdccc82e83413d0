"""Question answering from data to result file: batches, the loss, training through the loop, evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tercet.config import Config, ModelConfig, ObjectivesConfig
from tercet.config_io import load_config
from tercet.data.loader import TrainLoader
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer, clean_question
from tercet.data.vqa_files import draw_questions, open_questions
from tercet.errors import TercetError
from tercet.model.hub import load_model, save_model
from tercet.model.tercet import Tercet
from tercet.objectives.loss import distilled_cross_entropy
from tercet.tasks.score import score_predictions
from tercet.tasks.task import build_task, evaluate_task, open_data, tokenizer_texts
from tercet.tasks.vqa import QuestionAnswering, answer_logits, collate_answers, prepare_student
from tercet.train.loop import train

TINY: dict[str, Any] = {
    "vision": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2},
    "text": {"width": 32, "mlp_width": 64, "depth": 4, "fusion_layer": 2, "heads": 2, "max_positions": 32},
    "embed_dim": 16,
}


def config(**sections: dict[str, Any]) -> Config:
    plain: dict[str, Any] = {
        "task": "vqa",
        "model": TINY,
        "objectives": {"queue_size": 0},
        "data": {"train": ["scenes"], "scenes": 12, "augment": "none", "workers": 0, "tokenizer_size": 200},
        "optim": {"lr": 2e-3, "warmup_steps": 0},
        "train": {"batch_size": 8, "max_steps": 6, "log_every": 2, "device": "cpu"},
    }
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return Config.model_validate(plain)


@pytest.fixture(scope="module")
def source() -> SampleTable:
    return open_data("vqa", ["scenes"], config().data, "train")


@pytest.fixture(scope="module")
def words(source: SampleTable) -> Tokenizer:
    return Tokenizer.train(tokenizer_texts("vqa", source, config().data), 200)


@pytest.fixture
def model(words: Tokenizer) -> Tercet:
    torch.manual_seed(0)
    ids = {name: getattr(words, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id", "vocabulary_size")}
    built = Tercet(ModelConfig.model_validate({**TINY, "text": {**TINY["text"], **ids, "dropout": 0.0}}))
    built.add_heads(["answer"])
    built.tokenizer = words
    return built


def test_answers_are_laid_out_piece_by_piece(words: Tokenizer) -> None:
    images, (input_ids, mask) = torch.zeros(2, 3, 32, 32), words.encode(["what colour?", "how many?"], None)
    batch = collate_answers(images, input_ids, mask, [{"red": 0.75, "green blue": 0.25}, {"two": 0.5}], words)
    assert batch.owners.tolist() == [0, 0, 1]
    behind = batch.answer_ids[:, 1:].flatten()
    assert torch.equal(behind[batch.positions], batch.labels)
    assert (batch.answer_ids[:, 0] == words.cls_id).all()
    assert (batch.labels == words.sep_id).sum() == 3 and (batch.labels != words.pad_id).all()
    # Each piece of an answer, its [SEP] among them, carries the answer's weight.
    per_answer = [len(words.encode([text], None)[0][0]) for text in ("red", "green blue", "two")]
    assert batch.weights.tolist() == [0.75] * per_answer[0] + [0.25] * per_answer[1] + [0.5] * per_answer[2]


def test_the_loss_sums_over_pieces_and_answers_and_averages_over_questions() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    labels, weights = torch.tensor([1, 3, 0, 6, 2]), torch.tensor([0.6, 0.6, 0.4, 1.0, 1.0])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert distilled_cross_entropy(logits, labels, count=2, weights=weights).item() == pytest.approx(
        (each * weights).sum().item() / 2
    )
    teacher = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    soft = torch.nn.functional.cross_entropy(logits, teacher.softmax(-1), reduction="none")
    mixed = 0.7 * each + 0.3 * soft
    found = distilled_cross_entropy(logits, labels, teacher, 0.3, 2, weights)
    assert found.item() == pytest.approx((mixed * weights).sum().item() / 2, rel=1e-6)
    # A teacher that is sure of the labels changes nothing.
    sure = torch.nn.functional.one_hot(labels, 7) * 100.0
    assert distilled_cross_entropy(logits, labels, sure, 0.3, 2, weights).item() == pytest.approx(
        (each * weights).sum().item() / 2
    )


def test_a_question_s_loss_does_not_depend_on_its_batch(model: Tercet, source: SampleTable) -> None:
    loader = loader_of(model, source, 6)
    batch = next(loader.batches(0))
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0)).eval()
    together = task(task.prepare(batch, torch.device("cpu"), 0), 0.0).losses["answer"].item()
    alone: list[float] = []
    for place in range(6):
        length = int(batch.attention_mask[place].sum())
        targets = [dict.fromkeys(set(batch.targets[place]["answers"]), 1.0)]
        one = collate_answers(
            batch.images[place : place + 1],
            batch.input_ids[place : place + 1, :length],
            batch.attention_mask[place : place + 1, :length],
            targets,
            task_words(model),
        )
        alone.append(task(one, 0.0).losses["answer"].item())
    assert together == pytest.approx(sum(alone) / 6, rel=1e-5)


def test_questions_that_share_an_image_have_the_loss_that_they_have_alone(model: Tercet, source: SampleTable) -> None:
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0)).eval()
    data = config().data.model_copy(update={"share_images": True})
    shared = next(TrainLoader(source, task_words(model), data, 32, 3, seed=0, clean=clean_question).batches(0))
    assert shared.image_rows is not None and len(shared.images) == 3 < len(shared)
    alone = replace(shared, images=shared.images[shared.image_rows[:, 0]], image_rows=None)
    losses = [task(task.prepare(batch, torch.device("cpu"), 0), 0.4).losses["answer"] for batch in (shared, alone)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


def task_words(model: Tercet) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer


def loader_of(model: Tercet, source: SampleTable, batch_size: int) -> TrainLoader:
    data = config().data
    return TrainLoader(source, task_words(model), data, 32, batch_size, seed=0, clean=clean_question)


def test_what_the_task_does_not_read_takes_no_gradient(model: Tercet, source: SampleTable) -> None:
    task = build_task(config(), model)
    assert isinstance(task, QuestionAnswering) and task.teacher is not None
    assert {name.split(".")[0] for name in task.teacher.model.state_dict()} == {
        "vision",
        "text",
        "fusion",
        "answer_decoder",
    }
    prepared = task.prepare(next(loader_of(model, source, 4).batches(0)), torch.device("cpu"), 0)
    task.begin_step()
    task(prepared, 0.4).losses["answer"].backward()
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    reached = {name for name, value in model.named_parameters() if value.grad is not None}
    assert learns == reached
    unread = {name.split(".")[0] for name, value in model.named_parameters() if not value.requires_grad}
    assert unread == {"vision_projection", "text_projection", "itm_head", "mlm_head", "temperature"}
    assert all(value.grad is None for value in task.teacher.model.parameters())


@pytest.mark.parametrize("section", [{"teacher": False, "imc": 0, "lmi": 0}, {"alpha": 0.0}])
def test_no_teacher_is_kept_that_nobody_reads(model: Tercet, section: dict[str, Any]) -> None:
    assert QuestionAnswering(model, ObjectivesConfig(queue_size=0, **section)).teacher is None
    assert QuestionAnswering(model, ObjectivesConfig(queue_size=0), published=True).teacher is None


def test_training_learns_its_questions_by_heart(model: Tercet) -> None:
    few = draw_questions(1, "train")
    assert prepare_student(model, few, config()) == ["answers are chosen from the 2 commonest of the training data"]
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0, momentum=0.9)).train()
    batch = next(loader_of(model, few, few.sample_count).batches(0))
    prepared = task.prepare(batch, torch.device("cpu"), 0)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=2e-3)
    losses: list[float] = []
    for _ in range(100):
        task.begin_step()
        loss = task(prepared, 0.1).losses["answer"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    for inference, others in (("rank", {"list": {"covered": 100.0}}), ("generate", {})):
        result = evaluate_task("vqa", model, few, config(vqa={"inference": inference}))
        assert model.training
        assert result.metrics == {"accuracy": {"all": 100.0, "count": 100.0, "yes/no": 100.0}, **others}
        assert result.sizes == {"questions": 3, "scored": 3}


def test_scenes_through_the_loop_to_a_result_file(tmp_path: Path) -> None:
    settings = config(data={"test": ["scenes:test"], "scenes": 60}, evaluate={"limit": 16})
    folder = train(settings.model_copy(update={"output": str(tmp_path / "run")}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [2, 4, 6]
    assert all(np.isfinite(line["answer"]) and line["loss"] == line["answer"] for line in steps)
    assert steps[-1]["answer"] < steps[0]["answer"]
    measured = next(line for line in lines if line["kind"] == "evaluate")
    assert 0 <= measured["accuracy"]["all"] <= 100 and measured["list"]["covered"] == 100
    assert {"colour", "count", "position", "shape", "yes/no"} <= set(measured["accuracy"])
    assert any("commonest of the training data" in line.get("message", "") for line in lines)

    model = load_model(folder)
    assert model.config.heads == ["answer"] and model.answers
    source = open_data("vqa", ["scenes:test"], settings.data, "test")
    result = evaluate_task("vqa", model, source, settings)
    assert result.metrics == {name: measured[name] for name in ("accuracy", "list")}
    # Without a model: the predictions against the annotators, from files.
    predictions, gold = tmp_path / "results.json", tmp_path / "gold.json"
    predictions.write_text(json.dumps(result.predictions))
    targets = [source.sample(index).target for index in range(16)]
    names = {"question_id": "question_id", "answer": "answers", "answer_type": "answer_type"}
    rows = [{theirs: target[ours] for theirs, ours in names.items()} for target in targets]
    gold.write_text(json.dumps(rows))
    scored = score_predictions("vqa", str(predictions), str(gold), settings.data)
    assert scored["accuracy"] == pytest.approx(measured["accuracy"])


def test_a_model_without_decoder_starts_one_and_cannot_answer(tmp_path: Path, model: Tercet) -> None:
    sizes = model.config.model_copy(update={"heads": []})
    plain = Tercet(sizes)
    plain.tokenizer = model.tokenizer
    save_model(plain, tmp_path / "model")
    with pytest.raises(TercetError, match="no head for answer; fine-tune it first: tercet train vqa"):
        evaluate_task("vqa", plain, open_questions(["scenes"], config().data, "train"), config())
    settings = config(train={"max_steps": 1})
    update = {"init": str(tmp_path / "model"), "output": str(tmp_path / "run")}
    folder = train(settings.model_copy(update=update))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    messages = [line["message"] for line in lines if line["kind"] == "event"]
    assert any("new in it: answer_decoder" in message for message in messages)
    assert load_model(folder).answer_decoder is not None


def files(folder: Path, answers: list[str]) -> tuple[Path, Path]:
    """An ALBEF file of three questions, one with a broken image, and a list of answers."""
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((32, 32, 3), 80 * number, np.uint8))
    (folder / "1.png").write_bytes(b"not an image")
    rows = [
        {"question_id": number, "question": "What colour?", "image": f"{number}.png", "answer": [gold] * 10}
        for number, gold in enumerate(["red", "blue", "green"])
    ]
    (folder / "vqa.json").write_text(json.dumps(rows))
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder / "vqa.json", folder / "answers.json"


def test_a_list_without_the_right_answer_is_refused_unless_it_is_open(tmp_path: Path, model: Tercet) -> None:
    file, answers = files(tmp_path, ["red", "blue"])
    source = open_questions([str(file)], config().data, "train")
    settings = config(vqa={"answers": str(answers)})
    message = (
        r"vqa\.json row 3: the answer 'green' is not among the 2 of .*answers\.json; add it, or set vqa\.open_list"
    )
    with pytest.raises(TercetError, match=message):
        prepare_student(model, source, settings)
    with pytest.raises(TercetError, match=message):
        evaluate_task("vqa", model, source, settings)
    opened = config(vqa={"answers": str(answers), "open_list": True})
    assert prepare_student(model, source, opened) == [f"answers are chosen from the 2 of {answers}"]
    assert model.answers == ["red", "blue"]
    result = evaluate_task("vqa", model, source, opened)
    assert result.metrics["list"] == {"covered": 50.0}


def test_broken_images_are_left_out_and_named(tmp_path: Path, model: Tercet) -> None:
    file, _ = files(tmp_path, [])
    source = open_questions([str(file)], config().data, "test")
    model.answers = ["red", "green"]
    result = evaluate_task("vqa", model, source, config())
    assert [entry["question_id"] for entry in result.predictions] == [0, 2]
    assert len(result.problems) == 1 and "vqa.json row 2" in result.problems[0]
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(TercetError, match=r"none of 3 .*vqa\.json row 1"):
        evaluate_task("vqa", model, source, config())


def test_questions_without_annotators_are_answered_alone(tmp_path: Path, model: Tercet) -> None:
    file, _ = files(tmp_path, [])
    rows = json.loads(file.read_text())
    for row in rows:
        del row["answer"]
    file.write_text(json.dumps(rows[::2]))
    model.answers = ["red", "green"]
    result = evaluate_task("vqa", model, open_questions([str(file)], config().data, "test"), config())
    assert result.metrics == {} and result.sizes == {"questions": 2, "scored": 0}
    assert [entry["answer"] in ("red", "green") for entry in result.predictions] == [True, True]


def test_long_questions_are_kept_in_evaluation_and_cut_in_training(tmp_path: Path, model: Tercet) -> None:
    file, _ = files(tmp_path, [])
    rows = json.loads(file.read_text())[:1]
    rows[0]["question"] = "what colour is the figure " + "to the left of the red circle " * 20 + "?"
    file.write_text(json.dumps(rows))
    source = open_questions([str(file)], config().data, "test")
    model.answers = ["red"]
    lengths: list[int] = []

    def note(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lengths.append(inputs[0].shape[1])

    handle = model.text.register_forward_pre_hook(note)
    evaluate_task("vqa", model, source, config())
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0, alpha=0))
    answer_logits(model, task.prepare(next(loader_of(model, source, 1).batches(0)), torch.device("cpu"), 0))
    handle.remove()
    assert lengths == [32, 25]  # the model's positions; data.max_tokens


def test_the_recipe_has_the_published_settings() -> None:
    settings = load_config("vqa")
    assert settings.task == "vqa" and settings.model.size == "base"
    assert settings.model.vision.image_size == 384
    assert (settings.train.epochs, settings.train.batch_size, settings.evaluate.batch_size) == (8, 8 * 32, 16)
    optim = settings.optim
    assert (optim.lr, optim.min_lr, optim.warmup_lr, optim.weight_decay) == (2e-5, 1e-6, 1e-5, 0.02)
    assert optim.warmup_epochs == 4
    objectives = settings.objectives
    assert (objectives.teacher, objectives.alpha, objectives.momentum, objectives.alpha_warmup) == (
        True,
        0.4,
        0.995,
        1.0,
    )
    assert settings.data.crop_scale == (0.5, 1.0)
    assert (settings.data.max_words, settings.data.max_tokens, settings.vqa.max_words) == (30, 25, 50)
    assert settings.vqa.candidates == 128
