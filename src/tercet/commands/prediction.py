"""Commands that read one image: `match`, `classify`, `ask` and `explain`."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from tercet.commands.models import DEMO_MODEL, load_predictor, warn_untrained_matching
from tercet.commands.terminal import print_table


def match(image: str, texts: list[str], *, model: str = DEMO_MODEL, json: bool = False) -> None:
    """Show how well texts fit an image: the probability of a match (fusion encoder) and the cosine (dual encoder).

    Args:
        image: path or URL of an image.
        texts: one or more texts, each in quotes.
        model: model folder, run folder, or hub id.
        json: print the numbers as one JSON object.
    """
    predictor = load_predictor(model)
    warn_untrained_matching(predictor, "look at the cosine alone")
    (scores,) = predictor.match_each([image], [texts])
    rows = list(zip(texts, scores, strict=True))
    if json:
        print(json_format.dumps([{"text": text, "match": one.match, "cosine": one.cosine} for text, one in rows]))
    else:
        table = [[text, f"{100 * one.match:.1f} %", f"{one.cosine:.3f}"] for text, one in rows]
        print_table(["text", "match", "cosine"], table)


def classify(
    image: str, *, labels: list[str], templates: list[str] | None = None, model: str = DEMO_MODEL, json: bool = False
) -> None:
    """Choose the label that fits an image best, among labels that the model was never trained on.

    Args:
        image: path or URL of an image.
        labels: two or more labels, each of several words in quotes.
        templates: sentences with {} where the label goes; default: {}, a photo of {}, a picture of {}.
        model: model folder, run folder, or hub id.
        json: print the numbers as one JSON object.
    """
    probabilities = load_predictor(model).classify(image, labels, templates)
    assert not isinstance(probabilities, list)
    if json:
        print(json_format.dumps(probabilities))
    else:
        print_table(["label", "probability"], [[label, f"{100 * p:.1f} %"] for label, p in probabilities.items()])


def ask(
    image: str, question: str, *, answers: list[str] | None = None, model: str = DEMO_MODEL, json: bool = False
) -> None:
    """Answer a question about an image, by a model fine-tuned for that (`tercet train vqa --init MODEL`).

    Args:
        image: path or URL of an image.
        question: the question, in quotes.
        answers: answers to choose from; default: the model's own list, or else it generates one freely.
        model: model folder, run folder, or hub id.
        json: print the answer as one JSON object.
    """
    found = load_predictor(model).answer(image, question, answers)
    assert not isinstance(found, list)
    if json:
        others = [{"answer": text, "score": score} for text, score in found.others]
        print(json_format.dumps({"answer": found.text, "score": found.score, "others": others}))
    else:
        rows = [(found.text, found.score), *found.others]
        print_table(["answer", "score"], [[text, f"{100 * score:.1f} %"] for text, score in rows])


def explain(model: str, image: str, text: str, *, output: Path, layer: int | None = None, answer: bool = False) -> None:
    """Draw where in an image the model sees each word of a text: gradient-weighted cross-attention.

    Args:
        model: model folder, run folder, or hub id.
        image: path or URL of an image.
        text: the text, in quotes.
        output: the PNG file to write.
        layer: which layer of the fusion encoder, counted from 0 in the whole text stack; default two thirds up, as
            published; for an answer the last.
        answer: TEXT is a question: show what the model's answer to it rests on.
    """
    from tercet.report.figures import draw_explanation

    predictor = load_predictor(model)
    if not answer:
        warn_untrained_matching(predictor, "the heatmaps mean nothing")
    explanation = predictor.explain(image, text, layer, "answer" if answer else "itm")
    assert not isinstance(explanation, list)
    print(draw_explanation(explanation, output))
