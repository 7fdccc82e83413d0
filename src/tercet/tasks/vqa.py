"""Visual question answering: a decoder writes answers from the question fused with its image (section 4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config, DataConfig, ObjectivesConfig
from tercet.data.batches import SampleBatch
from tercet.data.sample_loader import sample_batches
from tercet.data.samples import SampleSource
from tercet.data.tokenizer import Tokenizer, clean_question
from tercet.data.vqa_files import (
    Gold,
    QuestionId,
    common_answers,
    open_questions,
    read_answer_list,
    weighted_answers,
)
from tercet.distributed import RankLayout, Ranks, rank_layout
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.objectives.loss import distilled_cross_entropy
from tercet.objectives.state import Teacher
from tercet.tasks.answering import Answer, Answerer, decoder_of, encode_answers, question_states
from tercet.tasks.encoding import evaluating
from tercet.tasks.task import Task, TaskKind
from tercet.tasks.vqa_score import VqaScore, score

READ = ("vision", "text", "fusion", "answer_decoder")


@dataclass
class AnswerBatch:
    """Questions and their answers on the device.

    Attributes:
        images: `[images, 3, height, width]`.
        input_ids: the questions, `[questions, tokens]`.
        attention_mask: bool `[questions, tokens]`.
        answer_ids: `[answers, answer_tokens]`; `[CLS]`, an answer, `[SEP]`, padding.
        owners: the question of each answer, `[answers]`.
        chosen: places `[guesses]`, in the flattened `[answers * (answer_tokens - 1)]`, behind which a word piece or
            `[SEP]` is guessed.
        labels: what stands there, `[guesses]`.
        weights: weight of the answer that each guess belongs to, `[guesses]`.
        image_rows: the image of each question, `[questions]`; None: each has its own.
        spread: how the questions of the whole batch are spread over the ranks; None: all of them are here.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    answer_ids: Tensor
    owners: Tensor
    chosen: Tensor
    labels: Tensor
    weights: Tensor
    image_rows: Tensor | None = None
    spread: RankLayout | None = None

    def to(self, device: torch.device) -> AnswerBatch:
        """The same on another device."""
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **{name: part.to(device, non_blocking=True) for name, part in tensors.items()})


def lay_out(
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    answers: Sequence[Mapping[str, float]],
    words: Tokenizer,
    image_rows: Tensor | None = None,
) -> AnswerBatch:
    """A batch of questions with their weighted answers, on the host.

    Args:
        images: `[images, 3, height, width]`.
        input_ids: the questions, `[questions, tokens]`.
        attention_mask: `[questions, tokens]`.
        answers: for each question, its answers and their weights.
        words: turns answers to ids.
        image_rows: the image of each question, `[questions]`; None: each has its own.
    """
    texts = [text for group in answers for text in group]
    weights = torch.tensor([weight for group in answers for weight in group.values()])
    owners = torch.repeat_interleave(torch.tensor([len(group) for group in answers]))
    encoded = encode_answers(words, texts)
    guessed = torch.arange(1, encoded.input_ids.shape[1]) < encoded.lengths[:, None]
    return AnswerBatch(
        images=images,
        input_ids=input_ids,
        attention_mask=attention_mask,
        answer_ids=encoded.input_ids,
        owners=owners,
        chosen=guessed.flatten().nonzero().squeeze(1),
        labels=encoded.input_ids[:, 1:][guessed],
        weights=weights[:, None].expand_as(guessed)[guessed],
        image_rows=image_rows,
    )


@dataclass
class AnswerOutput:
    """What a step gives: `losses` is `{"answer": loss}`."""

    losses: dict[str, Tensor] = field(default_factory=dict)


class QuestionAnswering(Task):
    """Student, teacher, and the loss of weighted answers.

    The teacher's guesses soften the targets, as the method means it.  In the published code they never reach the loss,
    so `published` does without a teacher, which is the same.
    """

    def __init__(self, student: Tercet, config: ObjectivesConfig, published: bool = False) -> None:
        """Build the teacher for `student`.

        Args:
            student: a model with the head `answer`.
            config: the teacher's settings.
            published: keep the published defects (see `docs/parity.md`).
        """
        super().__init__()
        self.student = student
        self.momentum = config.momentum
        teaches = config.teacher and config.alpha > 0 and not published
        self.teacher = Teacher(student, parts=READ) if teaches else None
        for name, part in student.named_children():
            if name not in READ:
                part.requires_grad_(False)
        student.temperature.requires_grad_(False)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The one loss of answers."""
        return ("answer",)

    def prepare(self, batch: SampleBatch, device: torch.device, seed: int) -> AnswerBatch:
        """Lay the answers of `batch` out and send all to `device`; nothing is drawn, so `seed` is not read."""
        answers = [weighted_answers(target) for target in batch.targets]
        words = require_tokenizer(self.student)
        rows = None if batch.image_rows is None else batch.image_rows[:, 0]
        laid_out = lay_out(batch.images, batch.input_ids, batch.attention_mask, answers, words, rows)
        return replace(laid_out, spread=rank_layout(len(batch))).to(device)

    def begin_step(self) -> None:
        """Move the teacher towards the student."""
        if self.teacher is not None:
            self.teacher.update(self.student, self.momentum)

    def forward(self, batch: AnswerBatch, alpha: float) -> AnswerOutput:
        """The loss of a batch; `alpha` is the weight of the teacher's soft targets now."""
        logits = guess(self.student, batch)
        guesses = None
        if self.teacher is not None and alpha > 0:
            with torch.no_grad():
                guesses = guess(self.teacher.model, batch)
        with torch.autocast(logits.device.type, enabled=False):
            questions = len(batch.input_ids) if batch.spread is None else batch.spread.mean
            loss = distilled_cross_entropy(logits, batch.labels, guesses, alpha, questions or 1, batch.weights)
        return AnswerOutput({"answer": loss})


def guess(model: Tercet, batch: AnswerBatch) -> Tensor:
    """Vocabulary logits `[guesses, vocabulary]` of `batch.labels`, by student or teacher."""
    decoder = decoder_of(model)
    states = question_states(model, batch.images, batch.input_ids, batch.attention_mask, batch.image_rows)
    memory = decoder.project_kv(states, batch.attention_mask).select(batch.owners)
    answer_states = decoder(batch.answer_ids[:, :-1], memory)
    return decoder.logits(answer_states.flatten(0, 1)[batch.chosen])


def _build(config: Config, student: Tercet) -> Task:
    return QuestionAnswering(student, config.objectives, config.compat == "published")


def adopt(student: Tercet, source: SampleSource, config: Config) -> list[str]:
    """Give the student the answers that it will choose from: those of `vqa.answers`, or the commonest of its training.

    Returns:
        What the user should know.

    Raises:
        TercetError: the list cannot be read, or lacks the answers to a question; see `check_list`.
    """
    if config.vqa.answers is not None:
        student.answers = read_answer_list(config.vqa.answers)
        if not config.vqa.open_list:
            check_list(config.vqa.answers, student.answers, source)
        return [f"answers are chosen from the {len(student.answers)} of {config.vqa.answers}"]
    student.answers = common_answers(source, config.vqa.answer_count)
    return [f"answers are chosen from the {len(student.answers)} commonest of the training data"]


def check_list(file: str, answers: Sequence[str], source: SampleSource) -> None:
    """Refuse a list of answers without any right one for a question.

    Raises:
        TercetError: names the question's file and row.
    """
    there = set(answers)
    for index in range(source.sample_count):
        sample = source.sample(index)
        given = sample.target["answers"]
        if given and not there.intersection(given):
            common = max(given, key=given.count)
            raise TercetError(
                f"{sample.key}: the answer {common!r} is not among the {len(answers)} of {file}; add it, or set "
                "vqa.open_list to count such questions as wrong"
            )


def words(source: SampleSource, data: DataConfig) -> Iterator[str]:
    """Questions and answers: what a tokenizer is trained on."""
    for index in range(source.sample_count):
        sample = source.sample(index)
        yield clean_question(sample.text, data.max_words)
        yield from sample.target["answers"] or ()


@dataclass
class VqaResult:
    """An evaluation.

    Attributes:
        question_ids: of the answered questions.
        answers: the answer to each, with those that came next.
        score: the official accuracy; None where the data has no annotators.
        covered: percent of the questions with a right answer in the list; None without list or annotators.
        problems: why samples were left out.
    """

    question_ids: list[QuestionId]
    answers: list[Answer]
    score: VqaScore | None
    covered: float | None
    problems: list[str]

    def metrics(self) -> dict[str, dict[str, float]]:
        """`{"accuracy": {"all", <answer type>...}, "list": {"covered"}}`, in percent; what there is of it."""
        scored = {} if self.score is None else self.score.metrics()
        return scored if self.covered is None else scored | {"list": {"covered": self.covered}}

    @property
    def sizes(self) -> dict[str, int]:
        """Questions that were answered, and those among them that annotators answered."""
        scored = 0 if self.score is None else self.score.questions
        return {"questions": len(self.answers), "scored": scored}

    def predictions(self) -> list[dict[str, Any]]:
        """The result file of the evaluation server."""
        pairs = zip(self.question_ids, self.answers, strict=True)
        return [{"question_id": question, "answer": answer.text} for question, answer in pairs]


def evaluate(model: Tercet, source: SampleSource, config: Config) -> VqaResult:
    """Answer the questions of a source, and score the answers where it has annotators.

    Args:
        model: with the head `answer` and its tokenizer; its mode is kept.
        source: questions; those whose image is broken are left out.
        config: `data`, `evaluate`, `vqa` and `compat` are read.

    Raises:
        TercetError: no image can be read, the model has no tokenizer, or the named list of answers lacks the answers
            to a question.
    """
    answers = model.answers if config.vqa.answers is None else read_answer_list(config.vqa.answers)
    if config.vqa.answers is not None and answers is not None and not config.vqa.open_list:
        check_list(config.vqa.answers, answers, source)
    answerer = Answerer(model, config.vqa, answers, config.compat == "published")
    limits = {"max_words": config.vqa.max_words, "max_tokens": model.config.text.max_positions}
    result = VqaResult([], [], None, None, [])
    targets: list[dict[str, Any]] = []
    ranks = Ranks()
    own: list[tuple[list[Answer], list[Any], list[str]]] = []
    with evaluating(model):
        for batch in sample_batches(
            source,
            require_tokenizer(model),
            config.data.model_copy(update=limits),
            model.config.vision.image_size,
            config.evaluate.batch_size,
            config.evaluate.limit,
            clean_question,
            ranks,
        ):
            said: list[Answer] = []
            if len(batch):
                said = answerer.answer(batch.images, batch.input_ids, batch.attention_mask, batch.image_rows)
            own.append((said, batch.targets, batch.problems))
    for said, asked, problems in ranks.gather_interleaved(own):
        result.answers += said
        targets += asked
        result.problems += problems
    if not targets:
        raise TercetError(f"none of {source.sample_count} questions has a readable image: {result.problems[0]}")
    result.question_ids = [target["question_id"] for target in targets]
    _score(result, targets, answerer.texts)
    return result


def _score(result: VqaResult, targets: Sequence[Mapping[str, Any]], answers: Sequence[str] | None) -> None:
    """Put accuracy and coverage into `result`, as far as there are annotators."""
    judged = [
        (answer.text, Gold(tuple(target["answers"]), target["answer_type"], str(target["question_id"])))
        for answer, target in zip(result.answers, targets, strict=True)
        if target["answers"]
    ]
    if not judged:
        return
    result.score = score(judged)
    if answers is not None:
        there = set(answers)
        found = sum(not there.isdisjoint(gold.answers) for _, gold in judged)
        result.covered = 100 * found / len(judged)


VQA = TaskKind(
    open=open_questions,
    build=_build,
    evaluate=evaluate,
    judged_by=("accuracy.all",),
    heads=("answer",),
    clean=clean_question,
    words=words,
    adopt=adopt,
)
