"""Question answering: the loss, training through the loop, evaluation, and the official accuracy."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from task_runs import logged, run_task, write_image
from tercet.config import Config, DataConfig, ObjectivesConfig
from tercet.config_io import default_config
from tercet.data.loader import TrainLoader
from tercet.data.task_readers import Gold, results_json
from tercet.data.tokenizer import Tokenizer, clean_question
from tercet.errors import TercetError
from tercet.model.hub import load_model
from tercet.model.tercet import Tercet
from tercet.tasks.score import score_predictions
from tercet.tasks.task import evaluate_task, open_data, tokenizer_texts
from tercet.tasks.vqa import (
    CONTRACTIONS,
    PARTS,
    QuestionAnswering,
    answer_accuracy,
    answer_logits,
    collate_answers,
    normalise,
    prepare_student,
    vqa_accuracy,
)
from tiny_model import make_model

CPU = torch.device("cpu")


def config(**overrides: Any) -> Config:
    return default_config({"data.workers": 0, **{name.replace("__", "."): value for name, value in overrides.items()}})


@pytest.fixture
def source(files: dict[str, str]) -> Any:
    return open_data("vqa", [files["vqa"]], DataConfig(), "train")


@pytest.fixture
def model(source: Any) -> Tercet:
    """Without dropout, reading questions and answers in whole words."""
    plain = make_model()
    tokenizer = Tokenizer.train(tokenizer_texts("vqa", source, DataConfig()), 100)
    sizes = {"vocabulary_size": tokenizer.vocabulary_size, "dropout": 0.0, "max_positions": 32}
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
    made = Tercet(plain.config.model_copy(update={"text": plain.config.text.model_copy(update=sizes | ids)}))
    made.add_heads(["answer"])
    made.tokenizer = tokenizer
    return made


def first_batch(model: Tercet, source: Any, size: int, **data: Any) -> Any:
    assert model.tokenizer is not None
    settings = DataConfig(workers=0, augment="none", **data)
    return next(TrainLoader(source, model.tokenizer, settings, 32, size, seed=0, clean=clean_question).batches(0))


def test_each_piece_of_an_answer_is_predicted_with_the_weight_of_its_answer(model: Tercet) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    images, (input_ids, mask) = torch.zeros(2, 3, 32, 32), tokenizer.encode(["what colour?", "how many?"], None)
    batch = collate_answers(images, input_ids, mask, [{"red": 0.75, "green blue": 0.25}, {"yes": 0.5}], tokenizer)
    assert batch.owners.tolist() == [0, 0, 1]
    assert torch.equal(batch.answer_ids[:, 1:].flatten()[batch.positions], batch.labels)
    assert (batch.labels == tokenizer.sep_id).sum() == 3 and (batch.labels != tokenizer.pad_id).all()
    pieces = [len(tokenizer.encode([text], None)[0][0]) for text in ("red", "green blue", "yes")]
    assert batch.weights.tolist() == [0.75] * pieces[0] + [0.25] * pieces[1] + [0.5] * pieces[2]


def test_a_question_s_loss_does_not_depend_on_its_batch(model: Tercet, source: Any) -> None:
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0)).eval()
    batch = first_batch(model, source, 6)
    together = task(task.prepare(batch, CPU, 0), 0.0).losses["answer"].item()
    alone: list[float] = []
    for row in range(6):
        length = int(batch.attention_mask[row].sum())
        rows = slice(row, row + 1)
        text = {name: getattr(batch, name)[rows, :length] for name in ("input_ids", "attention_mask")}
        own = replace(batch, images=batch.images[rows], targets=batch.targets[rows], keys=batch.keys[rows], **text)
        alone.append(task(task.prepare(own, CPU, 0), 0.0).losses["answer"].item())
    assert together == pytest.approx(sum(alone) / 6, rel=1e-5)


def test_questions_that_share_an_image_have_the_loss_that_they_have_alone(model: Tercet, source: Any) -> None:
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0)).eval()
    shared = first_batch(model, source, 3, share_images=True)
    assert shared.image_rows is not None and len(shared.images) == 3 < len(shared)
    alone = replace(shared, images=shared.images[shared.image_rows[:, 0]], image_rows=None)
    losses = [task(task.prepare(batch, CPU, 0), 0.4).losses["answer"] for batch in (shared, alone)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


def test_what_the_task_does_not_read_takes_no_gradient(model: Tercet, source: Any) -> None:
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0))
    assert task.teacher is not None
    assert {name.split(".")[0] for name in task.teacher.model.state_dict()} == set(PARTS)
    task.begin_step()
    task(task.prepare(first_batch(model, source, 4), CPU, 0), 0.4).losses["answer"].backward()
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learns == {name for name, value in model.named_parameters() if value.grad is not None}
    assert {name.split(".")[0] for name in learns} == set(PARTS)
    assert all(value.grad is None for value in task.teacher.model.parameters())


def test_no_teacher_exists_that_nothing_reads(model: Tercet) -> None:
    for section in ({"teacher": False, "imc": 0, "lmi": 0}, {"alpha": 0.0}):
        assert QuestionAnswering(model, ObjectivesConfig.model_validate(section | {"queue_size": 0})).teacher is None
    assert QuestionAnswering(model, ObjectivesConfig(queue_size=0), published=True).teacher is None


def test_it_learns_its_questions_and_answers_them_both_ways(tmp_path: Path, files: dict[str, str]) -> None:
    file = files["vqa"]
    settings = {"optim__schedule": "constant", "train__checkpoint_every": 1000, "data__test": [file]}
    run = run_task("vqa", file, tmp_path / "run", train__max_steps=150, objectives__alpha=0, **settings)
    losses = [line["answer"] for line in logged(run, "train")]
    assert sum(losses[-5:]) < sum(losses[:5]) / 5
    measured = logged(run, "evaluate")[-1]
    assert measured["accuracy"]["all"] > 85 and measured["list"]["covered"] == 100
    assert any("5 commonest of the training data" in line["message"] for line in logged(run, "event"))
    model = load_model(run / "model")
    assert model.config.heads == ["answer"] and set(model.answers or ()) == {"red", "green", "blue", "yes", "no"}
    source = open_data("vqa", [file], DataConfig(), "test")
    for inference in ("rank", "generate"):
        result = evaluate_task("vqa", model, source, config(vqa__inference=inference))
        assert result.metrics["accuracy"]["all"] > 85
        assert result.sizes == {"questions": 16, "scored": 16}
        # Without a model: the predictions against the annotators, from files.
        (tmp_path / "results.json").write_text(json.dumps(result.predictions))
        scored = score_predictions("vqa", str(tmp_path / "results.json"), file, DataConfig())
        assert scored["accuracy"] == pytest.approx(result.metrics["accuracy"])


def write_questions(folder: Path, **others: Any) -> str:
    """Three questions, the second with a broken image."""
    for number in range(3):
        write_image(folder / f"{number}.png", number)
    (folder / "1.png").write_bytes(b"not an image")
    rows = [
        {"question_id": number, "question": "What colour?", "image": f"{number}.png", "answer": [gold] * 10} | others
        for number, gold in enumerate(["red", "blue", "green"])
    ]
    (folder / "vqa.json").write_text(json.dumps(rows))
    return str(folder / "vqa.json")


def test_a_list_without_the_right_answer_is_refused_unless_it_is_open(tmp_path: Path, model: Tercet) -> None:
    source = open_data("vqa", [write_questions(tmp_path)], DataConfig(), "train")
    (tmp_path / "answers.json").write_text(json.dumps(["red", "blue"]))
    named = {"vqa__answers": str(tmp_path / "answers.json")}
    message = r"vqa\.json row 3: the answer 'green' .* vqa\.open_list"
    with pytest.raises(TercetError, match=message):
        prepare_student(model, source, config(**named))
    with pytest.raises(TercetError, match=message):
        evaluate_task("vqa", model, source, config(**named))
    prepare_student(model, source, config(**named, vqa__open_list=True))
    assert model.answers == ["red", "blue"]
    result = evaluate_task("vqa", model, source, config(**named, vqa__open_list=True))
    assert result.metrics["list"] == {"covered": 50.0}


def test_broken_images_are_skipped_and_named(tmp_path: Path, model: Tercet) -> None:
    source = open_data("vqa", [write_questions(tmp_path)], DataConfig(), "test")
    model.answers = ["red", "green"]
    result = evaluate_task("vqa", model, source, config())
    assert [row["question_id"] for row in result.predictions] == [0, 2]
    assert len(result.problems) == 1 and "vqa.json row 2" in result.problems[0]
    for number in (0, 2):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(TercetError, match=r"none of 3 .*vqa\.json row 1"):
        evaluate_task("vqa", model, source, config())


def test_questions_without_annotators_are_only_answered(tmp_path: Path, model: Tercet) -> None:
    file = Path(write_questions(tmp_path))
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in json.loads(file.read_text())]
    file.write_text(json.dumps(rows[::2]))
    model.answers = ["red", "green"]
    result = evaluate_task("vqa", model, open_data("vqa", [str(file)], DataConfig(), "test"), config())
    assert result.metrics == {} and result.sizes == {"questions": 2, "scored": 0}
    assert all(row["answer"] in ("red", "green") for row in result.predictions)


def test_long_questions_are_kept_in_evaluation_and_cut_in_training(tmp_path: Path, model: Tercet) -> None:
    file = write_questions(tmp_path, question="which is left of " + "the red one " * 30)
    source = open_data("vqa", [file], DataConfig(), "test")
    model.answers = ["red"]
    lengths: list[int] = []

    def note(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lengths.append(inputs[0].shape[1])

    handle = model.text.register_forward_pre_hook(note)
    evaluate_task("vqa", model, source, config())
    task = QuestionAnswering(model, ObjectivesConfig(queue_size=0, alpha=0))
    answer_logits(model, task.prepare(first_batch(model, source, 3), CPU, 0))
    handle.remove()
    assert lengths == [32, 25]  # the model's positions; data.max_tokens


def test_a_model_without_decoder_starts_one_and_cannot_answer(tmp_path: Path, files: dict[str, str]) -> None:
    source = open_data("vqa", [files["vqa"]], DataConfig(), "test")
    with pytest.raises(TercetError, match="no head for answer; fine-tune it first"):
        evaluate_task("vqa", make_model(), source, config())
    before = run_task("retrieval", files["retrieval"], tmp_path / "before", train__max_steps=1)
    run = run_task("vqa", files["vqa"], tmp_path / "run", init=str(before / "model"), train__max_steps=1)
    assert any("new in it: answer_decoder" in line["message"] for line in logged(run, "event"))
    assert load_model(run / "model").answer_decoder is not None


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("the red  one", "red 1"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("A man and an apple", "man and apple"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets go", "lets go"),
        ("Im", "im"),
        # A mark beside a space is removed; one inside a word becomes a space.
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("wii-mote -", "wiimote"),
        # A comma inside a number removes every mark.
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        # A period stays only in front of a digit.
        ("3.5", "3.5"),
        ("10:30 a.m.", "10:30 am"),
        ("st. louis.", "st louis"),
        ("2. ", "2"),
        ("'ows'at", "'ow's'at"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_officially(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_every_contraction_differs_from_its_right_form_by_an_apostrophe() -> None:
    assert len(CONTRACTIONS) == 114  # of the official list, those that are not capitalised
    for wrong, right in CONTRACTIONS.items():
        assert abs(len(wrong) - len(right)) == 1
        assert wrong.replace("'", "") == right.replace("'", "")


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_number_of_agreeing_annotators(agreeing: int, expected: float) -> None:
    annotators = ["red"] * agreeing + [f"other {index}" for index in range(10 - agreeing)]
    assert answer_accuracy("red", annotators) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["red", "blue", "The red", "2", "two"]), min_size=2, max_size=10), st.data())
def test_accuracy_is_the_mean_over_all_but_one_annotator(annotators: list[str], data: st.DataObject) -> None:
    found = data.draw(st.sampled_from(["red", "two", "green"]))
    # Answers that all annotators share are compared unchanged.
    change = normalise if len(set(annotators)) > 1 else str
    right = [change(annotator) == change(found) for annotator in annotators]
    each = [min(1.0, sum(others) / 3) for others in itertools.combinations(right, len(right) - 1)]
    assert answer_accuracy(found, annotators) == pytest.approx(sum(each) / len(each))


def test_one_annotator_is_right_or_wrong_and_line_ends_do_not_count() -> None:
    assert answer_accuracy("The Dog", ["dog"]) == 1.0
    assert answer_accuracy("cat", ["dog"]) == 0.0
    assert answer_accuracy("red\n", ["red"] * 10) == 1.0


def test_accuracy_by_answer_type() -> None:
    golds = [Gold((text,) * 10, kind, "") for text, kind in (("yes", "yes/no"), ("2", "number"), ("no", "yes/no"))]
    accuracy = vqa_accuracy(zip(["yes", "3", "yes"], golds, strict=True))
    assert accuracy == {"all": pytest.approx(100 / 3), "number": 0.0, "yes/no": 50.0}


def test_an_official_annotation_is_scored_from_files(data_dir: Path, tmp_path: Path) -> None:
    gold = data_dir / "format_samples" / "vqav2" / "v2_mscoco_annotations.one_row.json"
    found = {}
    for answer in ("white", "light blue", "Light-Blue", "black"):
        (tmp_path / "results.json").write_text(results_json({393714000: answer}))
        scored = score_predictions("vqa", str(tmp_path / "results.json"), str(gold), DataConfig())
        found[answer] = scored["accuracy"]["all"]
    assert found == pytest.approx({"white": 100.0, "light blue": 30.0, "Light-Blue": 30.0, "black": 0.0})


def test_missing_and_unknown_questions_are_named(tmp_path: Path) -> None:
    gold, predictions = tmp_path / "gold.json", tmp_path / "results.json"
    gold.write_text(json.dumps([{"question_id": 7 + index, "answer": ["red"] * 10} for index in range(3)]))
    for answered, message in (([7], r"results\.json: .* question 8 \(2 of 3"), ([7, 8, 9, 10], "question 10 is not")):
        predictions.write_text(results_json(dict.fromkeys(answered, "red")))
        with pytest.raises(TercetError, match=message):
            score_predictions("vqa", str(predictions), str(gold), DataConfig())
