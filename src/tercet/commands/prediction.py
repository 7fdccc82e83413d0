"""Commands that read one image: `match`, `classify`, `ask` and `explain`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tercet.arguments import ImageArgument, ModelFlag, Switch, parse
from tercet.commands.models import load_chosen, warn_untrained_matching
from tercet.commands.printing import print_table
from tercet.errors import TercetError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MatchArguments:
    """How well texts fit an image: the probability of a match (fusion encoder) and the cosine (dual encoder)."""

    image: ImageArgument
    """path or URL of an image"""
    texts: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """one or more texts, each in quotes"""
    model: ModelFlag = None
    """model folder, run folder, or hub id; default: runs/demo/model"""
    json: Switch = False
    """print the numbers as one JSON object"""


@dataclass(frozen=True)
class ClassifyArguments:
    """Choose the label that fits an image best, among labels that the model was never trained on."""

    image: ImageArgument
    """path or URL of an image"""
    labels: Annotated[list[str], tyro.conf.arg(metavar="LABEL")]
    """two or more labels, each of several words in quotes"""
    templates: Annotated[list[str], tyro.conf.arg(metavar="TEMPLATE")] = field(default_factory=list)
    """sentences with {} where the label goes; default: {}, a photo of {}, a picture of {}"""
    model: ModelFlag = None
    """model folder, run folder, or hub id; default: runs/demo/model"""
    json: Switch = False
    """print the numbers as one JSON object"""


@dataclass(frozen=True)
class AskArguments:
    """Answer a question about an image, by a model fine-tuned for that (`tercet train vqa --init MODEL`)."""

    image: ImageArgument
    """path or URL of an image"""
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")]
    """the question, in quotes"""
    answers: Annotated[list[str], tyro.conf.arg(metavar="ANSWER")] = field(default_factory=list)
    """answers to choose from; default: the model's own list, or else it writes freely"""
    model: ModelFlag = None
    """model folder, run folder, or hub id; default: runs/demo/model"""
    json: Switch = False
    """print the answer as one JSON object"""


@dataclass(frozen=True)
class ExplainArguments:
    """Draw where in an image each word of a text is seen: gradient-weighted cross-attention of the fusion encoder."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """model folder, run folder, or hub id"""
    image: ImageArgument
    """path or URL of an image"""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """the text, in quotes"""
    to: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """the PNG to write"""
    layer: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """which layer of the fusion encoder, counted from 0 in the whole text stack; default two thirds up, as published;
    for an answer the last"""
    answer: bool = False
    """TEXT is a question: show what the model's answer to it rests on"""


def match(arguments: list[str]) -> None:
    """Tell how well texts fit an image."""
    options = parse(MatchArguments, "match", arguments)
    if not options.texts:
        raise TercetError('give a text: tercet match IMAGE "a dog in the snow"')
    model = load_chosen(options.model)
    warn_untrained_matching(model, "look at the cosine alone")
    # Lists in, so that the results are lists as well.
    chances = model.match([options.image], options.texts)
    cosines = model.similarity([options.image], options.texts)
    rows = list(zip(options.texts, _numbers(chances), _numbers(cosines), strict=True))
    if options.json:
        print(json.dumps([{"text": text, "match": chance, "cosine": cosine} for text, chance, cosine in rows]))
        return
    print_table(
        ["text", "match", "cosine"], [[text, f"{100 * chance:.1f} %", f"{cosine:.3f}"] for text, chance, cosine in rows]
    )


def classify(arguments: list[str]) -> None:
    """Choose the label that fits an image best."""
    options = parse(ClassifyArguments, "classify", arguments)
    chances = load_chosen(options.model).classify(options.image, options.labels, options.templates or None)
    assert isinstance(chances, dict)
    if options.json:
        print(json.dumps(chances))
    else:
        print_table(["label", "probability"], [[label, f"{100 * value:.1f} %"] for label, value in chances.items()])


def ask(arguments: list[str]) -> None:
    """Answer a question about an image."""
    options = parse(AskArguments, "ask", arguments)
    found = load_chosen(options.model).answer(options.image, options.question, options.answers or None)
    assert not isinstance(found, list)
    if options.json:
        others = [{"answer": text, "score": score} for text, score in found.others]
        print(json.dumps({"answer": found.text, "score": found.score, "others": others}))
        return
    rows = [(found.text, found.score), *found.others]
    print_table(["answer", "score"], [[text, f"{100 * score:.1f} %"] for text, score in rows])


def explain(arguments: list[str]) -> None:
    """Draw where in an image each word of a text is seen."""
    options = parse(ExplainArguments, "explain", arguments)
    from tercet.report.explain import draw_explanation

    model = load_chosen(options.model)
    if not options.answer:
        warn_untrained_matching(model, "the heatmaps mean nothing")
    found = model.explain(options.image, options.text, options.layer, "answer" if options.answer else "itm")
    assert not isinstance(found, list)
    print(draw_explanation(found, options.to))


def _numbers(values: Tensor | float) -> list[float]:
    """Results of one image with several texts."""
    assert not isinstance(values, int | float)
    return values.flatten().tolist()
