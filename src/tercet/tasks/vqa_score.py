"""The official accuracy of visual question answering: agreement with ten annotators after normalising answers.

The definition is that of the VQA evaluation (Antol et al., arXiv 1505.00468, section 5; https://visualqa.org/evaluation):
an answer is right in the measure in which at least three of any nine of the ten annotators gave it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet.data.vqa_files import Gold, read_gold, read_results
from tercet.errors import TercetError

AGREEING = 3  # annotators whose agreement makes an answer fully right
ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
# The official pattern also means to spare a period behind a digit, and misspells that; 32 is its limit by accident.
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


def _lacking_one_apostrophe() -> dict[str, str]:
    found = {
        word[:place] + word[place + 1 :]: word
        for word in APOSTROPHES.split()
        for place, mark in enumerate(word)
        if mark == "'"
    }
    return found | {"somebody'd": "somebodyd"}  # the one entry that goes the other way


CONTRACTIONS = _lacking_one_apostrophe()


def normalise(answer: str) -> str:
    """An answer as the official accuracy compares it: lower case, digits for number words, no articles, no
    punctuation, apostrophes put back."""
    answer = _without_punctuation(answer)
    words = [DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(answer: str) -> str:
    """A mark with a space beside it anywhere goes; another becomes a space.  A comma within a number removes all."""
    removes_all = DIGITS_AROUND_COMMA.search(answer) is not None
    cleaned = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if removes_all or beside_space else " ")
    return PERIOD.sub("", cleaned, count=PERIODS_REMOVED)


def accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Official accuracy of one answer, 0 to 1.

    Each annotator is left out in turn, and the answer scores a third for every other one who gave it, up to 1.  Answers
    are normalised only where the annotators disagree.  Data with one right answer per question count it as right or
    wrong.

    Args:
        answer: the model's.
        annotators: the answers of all annotators, ten in the official data.
    """
    given, golds = _one_line(answer), [_one_line(gold) for gold in annotators]
    if len(golds) == 1:
        return float(normalise(given) == normalise(golds[0]))
    if len(set(golds)) > 1:
        given, golds = normalise(given), [normalise(gold) for gold in golds]
    matches = golds.count(given)
    left_out_agrees = matches * min(1.0, (matches - 1) / AGREEING)
    left_out_differs = (len(golds) - matches) * min(1.0, matches / AGREEING)
    return (left_out_agrees + left_out_differs) / len(golds)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


@dataclass
class VqaScore:
    """Accuracy over questions, in percent.

    Attributes:
        overall: the mean over all questions.
        by_type: the mean over those of each answer type ("yes/no", "number", "other" in the official data).
        questions: how many questions there are.
        by_question: accuracy of each question, in the order given.
    """

    overall: float
    by_type: dict[str, float]
    questions: int
    by_question: list[float]

    def metrics(self) -> dict[str, dict[str, float]]:
        """`{"accuracy": {"all": ..., "<answer type>": ...}}`."""
        return {"accuracy": {"all": self.overall, **self.by_type}}


def score(pairs: Iterable[tuple[str, Gold]]) -> VqaScore:
    """Score answers, each with what the annotators say.

    Raises:
        TercetError: there are none.
    """
    by_question: list[float] = []
    by_type: dict[str, list[float]] = {}
    for answer, gold in pairs:
        by_question.append(100 * accuracy(answer, gold.answers))
        if gold.answer_type is not None:
            by_type.setdefault(gold.answer_type, []).append(by_question[-1])
    if not by_question:
        raise TercetError("no answered question to score; give at least one")
    means = {name: sum(values) / len(values) for name, values in sorted(by_type.items())}
    return VqaScore(sum(by_question) / len(by_question), means, len(by_question), by_question)


def score_answers(answers: Mapping[int | str, str], golds: Mapping[int | str, Gold], origin: str) -> VqaScore:
    """Score answers by question id.

    Args:
        answers: the answer to each question.
        golds: what the annotators say of each.
        origin: names the answers in messages.

    Raises:
        TercetError: a question of either is missing in the other, as the official evaluation refuses too.
    """
    missing = [question for question in golds if question not in answers]
    if missing:
        raise TercetError(
            f"{origin}: no answer to question {missing[0]} ({len(missing)} of {len(golds)} questions have none); "
            "every question needs one"
        )
    unknown = [question for question in answers if question not in golds]
    if unknown:
        raise TercetError(
            f"{origin}: question {unknown[0]} is not among the annotated ones ({len(unknown)} are not); "
            "give the annotations of the same split"
        )
    return score((answers[question], gold) for question, gold in golds.items())


def score_files(predictions: str | Path, gold: str | Path) -> VqaScore:
    """Score a result file of the evaluation server against annotations, without a model.

    Args:
        predictions: JSON list of `{"question_id", "answer"}`.
        gold: official annotations (or the questions beside them), an ALBEF file with answers, or scenes:SPLIT.

    Raises:
        TercetError: a file cannot be read or parsed, or they speak of different questions; names file and row.
    """
    return score_answers(read_results(str(predictions)), read_gold(str(gold)), str(predictions))
