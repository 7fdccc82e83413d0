"""Visual question answering: a decoder generates answers from the question fused with its image (section 4.2).

Accuracy is that of the official evaluation (Antol et al., arXiv 1505.00468, section 5; https://visualqa.org/evaluation):
agreement with ten annotators after normalising answers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tercet.config import Config, DataConfig, ObjectivesConfig
from tercet.data.batch import Batch, HostBatch, to_device
from tercet.data.table import SampleTable
from tercet.data.task_readers import Gold, common_answers, open_questions, read_answer_list, weighted_answers
from tercet.data.tokenizer import Tokenizer, clean_question
from tercet.distributed import RankLayout, rank_layout
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.objectives.loss import distilled_cross_entropy
from tercet.tasks.answering import Answer, Answerer, decoder_of, encode_answers, fuse_questions
from tercet.tasks.evaluation import Metrics, TaskResult, evaluate_samples
from tercet.tasks.task import FineTuning, TaskOutput, TaskSpec

PARTS = ("vision", "text", "fusion", "answer_decoder")


@dataclass
class AnswerBatch(HostBatch):
    """Questions and their answers on the device.

    Attributes:
        images: `[images, 3, height, width]`.
        input_ids: the questions, `[questions, tokens]`.
        attention_mask: bool `[questions, tokens]`.
        answer_ids: `[answers, answer_tokens]`; `[CLS]`, an answer, `[SEP]`, padding.
        owners: the question of each answer, `[answers]`.
        positions: `[predictions]`, in the flattened `[answers * (answer_tokens - 1)]`, of the tokens that predict a
            next word piece or `[SEP]`.
        labels: what they are to predict, `[predictions]`.
        weights: weight of the answer that each belongs to, `[predictions]`.
        image_rows: the image of each question, `[questions]`; None: each has its own.
        layout: layout of the questions of the whole batch over the ranks; None: all of them are here.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    answer_ids: Tensor
    owners: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    image_rows: Tensor | None = None
    layout: RankLayout | None = None


def collate_answers(
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    answers: Sequence[Mapping[str, float]],
    tokenizer: Tokenizer,
    image_rows: Tensor | None = None,
) -> AnswerBatch:
    """A batch of questions with their weighted answers, on the host.

    Args:
        images: `[images, 3, height, width]`.
        input_ids: the questions, `[questions, tokens]`.
        attention_mask: `[questions, tokens]`.
        answers: for each question, its answers and their weights.
        tokenizer: encodes answers.
        image_rows: the image of each question, `[questions]`; None: each has its own.
    """
    encoded = encode_answers(tokenizer, [text for group in answers for text in group])
    predicted = torch.arange(1, encoded.input_ids.shape[1]) < encoded.lengths[:, None]
    weights = torch.tensor([weight for group in answers for weight in group.values()])
    return AnswerBatch(
        images=images,
        input_ids=input_ids,
        attention_mask=attention_mask,
        answer_ids=encoded.input_ids,
        owners=torch.repeat_interleave(torch.tensor([len(group) for group in answers])),
        positions=predicted.flatten().nonzero().squeeze(1),
        labels=encoded.input_ids[:, 1:][predicted],
        weights=weights[:, None].expand_as(predicted)[predicted],
        image_rows=image_rows,
    )


class QuestionAnswering(FineTuning):
    """Student, teacher, and the loss of weighted answers.

    The teacher's probabilities soften the targets, as the method means it.  In the published code they never reach the
    loss, so `published` does without a teacher, which is the same.
    """

    def __init__(self, student: Tercet, config: ObjectivesConfig, published: bool = False) -> None:
        """Train `student`, which has the head `answer`; `published` keeps the published defects (`docs/method.md`)."""
        super().__init__(student, config, "answer", PARTS, teach=not published)

    def prepare(self, batch: Batch, device: torch.device, seed: int) -> AnswerBatch:
        """Encode the answers of `batch` and send all to `device`; nothing is random, so `seed` is not read."""
        answers = [weighted_answers(target) for target in batch.targets]
        rows = None if batch.image_rows is None else batch.image_rows[:, 0]
        tokenizer = require_tokenizer(self.student)
        collated = collate_answers(batch.images, batch.input_ids, batch.attention_mask, answers, tokenizer, rows)
        return to_device(replace(collated, layout=rank_layout(len(batch))), device)

    def forward(self, batch: AnswerBatch, alpha: float, /) -> TaskOutput:
        """The loss of a batch; `alpha` is the teacher's weight in the targets now."""
        logits, teacher_logits = answer_logits(self.student, batch), self.teacher_logits(answer_logits, batch, alpha)
        questions = len(batch.input_ids) if batch.layout is None else batch.layout.mean
        loss = distilled_cross_entropy(logits, batch.labels, teacher_logits, alpha, questions or 1, batch.weights)
        return TaskOutput({self.loss_name: loss})


def answer_logits(model: Tercet, batch: AnswerBatch) -> Tensor:
    """Vocabulary logits `[predictions, vocabulary]` of `batch.labels`, by student or teacher."""
    decoder = decoder_of(model)
    states = fuse_questions(model, batch.images, batch.input_ids, batch.attention_mask, batch.image_rows)
    kv = decoder.project_kv(states, batch.attention_mask).select(batch.owners)
    hidden = decoder(batch.answer_ids[:, :-1], kv)
    return decoder.logits(hidden.flatten(0, 1)[batch.positions])


def prepare_student(student: Tercet, source: SampleTable, config: Config) -> list[str]:
    """Give the student the answers to choose from: those of `vqa.answers`, or the commonest of its training data.

    Returns:
        A message for the user.

    Raises:
        TercetError: the list cannot be read, or lacks the answers to a question; see `check_list`.
    """
    if config.vqa.answers is not None:
        student.answers = read_answers(config, source)
        return [f"answers are chosen from the {len(student.answers)} of {config.vqa.answers}"]
    student.answers = common_answers(source, config.vqa.answer_count)
    return [f"answers are chosen from the {len(student.answers)} commonest of the training data"]


def read_answers(config: Config, source: SampleTable) -> list[str]:
    """The answers in the file `vqa.answers`, checked against `source` unless `vqa.open_list`.

    Raises:
        TercetError: the file cannot be read, or has no right answer to a question; names the question's file and row.
    """
    assert config.vqa.answers is not None
    answers = read_answer_list(config.vqa.answers)
    listed = set(answers)
    for index in range(0 if config.vqa.open_list else source.sample_count):
        sample = source.sample(index)
        given = sample.target["answers"]
        if given and not listed.intersection(given):
            common = max(given, key=given.count)
            raise TercetError(
                f"{sample.key}: the answer {common!r} is not among the {len(answers)} of {config.vqa.answers}; add it, "
                "or set vqa.open_list to count such questions as wrong"
            )
    return answers


def question_texts(source: SampleTable, data: DataConfig) -> Iterator[str]:
    """Questions and answers, for training a tokenizer."""
    for index in range(source.sample_count):
        sample = source.sample(index)
        yield clean_question(sample.text, data.max_words)
        yield from sample.target["answers"] or ()


def evaluate_questions(model: Tercet, source: SampleTable, config: Config) -> TaskResult:
    """Answer the questions of a source, and score the answers where it has annotators.

    Args:
        model: with the head `answer` and its tokenizer, in evaluation mode.
        source: questions; those whose image is broken are skipped.
        config: `data`, `evaluate`, `vqa` and `compat` are read.

    Returns:
        Metrics are `{"accuracy": {"all", <answer type>...}, "list": {"covered"}}` in percent, as far as there are
        annotators and a list of answers; predictions are the result file of the official evaluation server.

    Raises:
        TercetError: no image can be read, the model has no tokenizer, or the named list of answers lacks the answers
            to a question.
    """
    answers = model.answers if config.vqa.answers is None else read_answers(config, source)
    answerer = Answerer(model, config.vqa, answers, config.compat == "published")

    def answer(batch: Batch) -> list[Answer]:
        return answerer.answer(batch.images, batch.input_ids, batch.attention_mask, batch.image_rows)

    limits = {"max_words": config.vqa.max_words, "max_tokens": model.config.text.max_positions}
    data = config.data.model_copy(update=limits)
    found = evaluate_samples(model, source, config, data, answer, clean_question)
    scored = [
        (answer.text, Gold(tuple(target["answers"]), target["answer_type"], str(target["question_id"])))
        for answer, target in zip(found.values, found.targets, strict=True)
        if target["answers"]
    ]
    metrics: Metrics = {}
    if scored:
        metrics["accuracy"] = vqa_accuracy(scored)
        if answerer.texts is not None:
            listed = set(answerer.texts)
            covered = sum(not listed.isdisjoint(gold.answers) for _, gold in scored)
            metrics["list"] = {"covered": 100 * covered / len(scored)}
    predictions = [
        {"question_id": target["question_id"], "answer": answer.text}
        for answer, target in zip(found.values, found.targets, strict=True)
    ]
    return TaskResult(metrics, {"questions": len(predictions), "scored": len(scored)}, found.problems, predictions)


AGREEING = 3  # annotators whose agreement makes an answer fully right
ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
# The official pattern also means to spare a period after a digit, and misspells that; 32 is its limit by accident.
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32

# An answer that lacks one of its apostrophes gets it back.  The list is the official one, gaps and all ("lets" and
# "shes" stay as they are).
APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in APOSTROPHES.split()
    for index, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}  # the one entry that goes the other way


def normalise(answer: str) -> str:
    """An answer as the official accuracy compares it: lower case, digits for number words, no articles, no
    punctuation, apostrophes put back."""
    # A mark with a space beside it anywhere goes; another becomes a space.  A comma within a number removes all.
    removes_all = DIGITS_AROUND_COMMA.search(answer) is not None
    cleaned = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if removes_all or beside_space else " ")
    cleaned = PERIOD.sub("", cleaned, count=PERIODS_REMOVED)
    words = [DIGITS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Official accuracy of one answer, 0 to 1.

    Each annotator is left out in turn, and the answer scores a third for every other one who gave it, up to 1.  Answers
    are normalised only where the annotators disagree.  Data with one right answer per question count it as right or
    wrong.

    Args:
        answer: the model's.
        annotators: the answers of all annotators, ten in the official data.
    """
    given, *golds = [text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *annotators)]
    if len(golds) == 1:
        return float(normalise(given) == normalise(golds[0]))
    if len(set(golds)) > 1:
        given, golds = normalise(given), [normalise(gold) for gold in golds]
    matches = golds.count(given)
    without_agreeing = matches * min(1.0, (matches - 1) / AGREEING)
    without_other = (len(golds) - matches) * min(1.0, matches / AGREEING)
    return (without_agreeing + without_other) / len(golds)


def vqa_accuracy(answers: Iterable[tuple[str, Gold]]) -> dict[str, float]:
    """Official accuracy in percent: `all`, and of each answer type ("yes/no", "number", "other" in official data).

    Args:
        answers: each with what the annotators say.

    Raises:
        TercetError: there are none.
    """
    every: list[float] = []
    by_type: dict[str, list[float]] = defaultdict(list)
    for answer, gold in answers:
        every.append(100 * answer_accuracy(answer, gold.answers))
        if gold.answer_type is not None:
            by_type[gold.answer_type].append(every[-1])
    if not every:
        raise TercetError("no answered question to score; give at least one")
    means = {name: sum(values) / len(values) for name, values in sorted(by_type.items())}
    return {"all": sum(every) / len(every), **means}


TASKS = {
    "vqa": TaskSpec(
        open=open_questions,
        evaluate=evaluate_questions,
        build=lambda config, student: QuestionAnswering(student, config.objectives, config.compat == "published"),
        selection_metrics=("accuracy.all",),
        heads=("answer",),
        clean=clean_question,
        texts=question_texts,
        prepare_student=prepare_student,
    )
}
