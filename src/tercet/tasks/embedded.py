"""Evaluations that read frozen features alone: classification and the quality of the shared space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config
from tercet.data.class_folders import labels_of, open_labelled
from tercet.data.loader import caption_owners, image_batches
from tercet.data.sources import Source
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.classify import accuracy, choose_penalty, class_feats, few_shot, fit_probe, zero_shot
from tercet.tasks.embedding import embedding_quality
from tercet.tasks.encoding import evaluating
from tercet.tasks.retrieval import encode_source_images, encode_source_texts, of_readable_images

TOP = 5


@dataclass
class FeatureResult:
    """An evaluation of frozen features.

    Attributes:
        numbers: by group.
        counted: what was counted.
        problems: why images were left out.
        rows: what was said of each image, where anything was.
    """

    numbers: dict[str, dict[str, float]]
    counted: dict[str, int]
    problems: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self) -> dict[str, dict[str, float]]:
        """The numbers by group."""
        return self.numbers

    @property
    def sizes(self) -> dict[str, int]:
        """What was counted."""
        return self.counted

    def predictions(self) -> list[dict[str, Any]]:
        """What was said of each image; nothing where the numbers are of all together."""
        return self.rows


@dataclass
class LabelledFeats:
    """Images with their labels, out of the image encoder.

    Attributes:
        image_feats: unit vectors in the shared space `[images, embed_dim]`.
        hidden: the class token before its projection, what a probe reads `[images, width]`.
        labels: class numbers `[images]`.
        keys: names of the images.
        problems: why others were left out.
    """

    image_feats: Tensor
    hidden: Tensor
    labels: Tensor
    keys: list[str]
    problems: list[str]


def evaluate_classes(model: Tercet, source: Source, config: Config) -> FeatureResult:
    """Accuracy without training and, where `config.classify.train` names images, of linear probes.

    Args:
        model: with its tokenizer; its mode is kept.
        source: labelled images; the classes are the labels that occur among them.
        config: `classify`, `data` and `evaluate` are read.

    Raises:
        TercetError: no image can be read, fewer than two classes, or training images without one of them.
    """
    names = sorted(set(labels_of(source)))
    if len(names) < 2:
        raise TercetError(f"all images have the label {names[0]!r}; a classification has two classes at least")
    with evaluating(model):
        test = _labelled_feats(model, source, names, config)
        classes = class_feats(model, names, config.classify.templates, config.data, Ranks())
        chances = zero_shot(test.image_feats, classes, model.temperature.item())
        numbers = {"zero-shot": _ranks(chances, test.labels)}
        if config.classify.train:
            train = open_labelled(config.classify.train, config.data, "train")
            numbers["linear probe"] = _probes(_labelled_feats(model, train, names, config), test, names, config)
    rows = [
        {"image": key, "label": names[chosen], "gold": names[label]}
        for key, chosen, label in zip(test.keys, chances.argmax(dim=1).tolist(), test.labels.tolist(), strict=True)
    ]
    return FeatureResult(numbers, {"images": len(test.keys), "classes": len(names)}, test.problems, rows)


def evaluate_embedding(model: Tercet, source: Source, config: Config) -> FeatureResult:
    """Alignment, uniformity and neighbourhoods of images and captions; see `embedding_quality`.

    Raises:
        TercetError: fewer than two images can be read, or the model has no tokenizer.
    """
    limit = config.evaluate.limit
    with evaluating(model):
        images = encode_source_images(model, source, config, keep_tokens=False)
        if len(images.keys) < 2:
            why = f"; the first problem: {images.problems[0]}" if images.problems else ""
            raise TercetError(f"the quality of a space is measured on two images at least{why}")
        texts, captions = encode_source_texts(model, source, config, require_tokenizer(model))
    texts, captions, owners = of_readable_images(texts, captions, images, caption_owners(source, limit))
    numbers = embedding_quality(images.image_feats, texts.text_feats, owners, captions)
    return FeatureResult(numbers, {"images": len(images.keys), "texts": len(captions)}, images.problems)


def _labelled_feats(model: Tercet, source: Source, names: Sequence[str], config: Config) -> LabelledFeats:
    """Features of the images whose label is among `names`, encoded by all ranks."""
    places = {name: place for place, name in enumerate(names)}
    labels = labels_of(source)
    problems = list(source.problems)
    ranks, device = Ranks(), next(model.parameters()).device
    size, limit = config.evaluate.batch_size, config.evaluate.limit
    own: list[tuple[Tensor, Tensor, list[int], list[str], list[str]]] = []
    for batch in image_batches(source, config.data, model.config.vision.image_size, size, limit, ranks=ranks):
        known = [(row, index) for row, index in enumerate(batch.indices.tolist()) if labels[index] in places]
        rows = [row for row, _ in known]
        feats = hidden = torch.empty(0)
        if rows:
            tokens = model.encode_image(batch.images[rows].to(device))[:, 0]
            feats, hidden = model.project_image(tokens).cpu(), tokens.float().cpu()
        numbers = [places[labels[index]] for _, index in known]
        own.append((feats, hidden, numbers, [batch.keys[row] for row in rows], batch.problems))
    parts = ranks.gather_interleaved(own)
    problems += [problem for *_, told in parts for problem in told]
    filled = [part for part in parts if part[2]]
    if not filled:
        why = f"; the first problem: {problems[0]}" if problems else ""
        raise TercetError(f"none of {source.image_count} labelled images can be read{why}")
    return LabelledFeats(
        image_feats=torch.cat([feats for feats, *_ in filled]),
        hidden=torch.cat([hidden for _, hidden, *_ in filled]),
        labels=torch.tensor([number for _, _, numbers, *_ in filled for number in numbers]),
        keys=[key for *_, keys, _ in filled for key in keys],
        problems=problems,
    )


def _probes(train: LabelledFeats, test: LabelledFeats, names: Sequence[str], config: Config) -> dict[str, float]:
    """Accuracies of probes on a few images a class, and on all of them, in percent."""
    classes = len(names)
    counts = train.labels.bincount(minlength=classes)
    if int(counts.min()) == 0:
        raise TercetError(
            f"classify.train has no image of {names[int(counts.argmin())]!r}, which the test images have; "
            "give some of every class"
        )
    numbers: dict[str, float] = {}
    ranks = Ranks()
    for shots in config.classify.shots:
        if shots <= int(counts.min()):
            draws = config.classify.draws
            found = few_shot(train.hidden, train.labels, test.hidden, test.labels, shots, draws, ranks)
            numbers[f"{shots} shots"], numbers[f"{shots} shots, deviation"] = found
    penalty = choose_penalty(train.hidden, train.labels, classes, ranks)
    probe = fit_probe(train.hidden, train.labels, classes, penalty)
    numbers["all"] = accuracy(probe(test.hidden), test.labels)
    return numbers


def _ranks(scores: Tensor, labels: Tensor) -> dict[str, float]:
    ranks = {"r1": accuracy(scores, labels)}
    return ranks | ({f"r{TOP}": accuracy(scores, labels, TOP)} if scores.shape[1] > TOP else {})
