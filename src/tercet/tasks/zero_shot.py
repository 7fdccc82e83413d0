"""Evaluations that read frozen features alone: classification by the names of classes and by linear probes, and the
quality of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.config import ClassifyConfig, Config, DataConfig
from tercet.data.class_readers import labels_of, open_labelled
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable
from tercet.device import cosines
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.embedding import embedding_quality
from tercet.tasks.encoding import encode_sentences
from tercet.tasks.evaluation import Metrics, TaskResult, map_over_ranks
from tercet.tasks.retrieval import TEXT_WINDOW, encode_captions, encode_images
from tercet.tasks.task import TaskSpec

TEMPLATES = tuple(ClassifyConfig().templates)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
TOP = 5


def class_feats(model: Tercet, labels: Sequence[str], templates: Sequence[str], data: DataConfig) -> Tensor:
    """A feature for each class, the mean over its sentences by every template: unit vectors `[classes, embed_dim]`.

    Raises:
        TercetError: a label is given twice, or a template has no slot for the label.
    """
    twice = next((label for index, label in enumerate(labels) if label in labels[:index]), None)
    if twice is not None:
        raise TercetError(f"the label {twice!r} is given twice; give each class once")
    for template in templates:
        if template.count("{}") != 1:
            raise TercetError(f"the template {template!r} needs one {{}} where the label goes, as in 'a photo of {{}}'")
    sentences = [template.replace("{}", label) for label in labels for template in templates]
    windows = [sentences[start : start + TEXT_WINDOW] for start in range(0, len(sentences), TEXT_WINDOW)]
    feats = torch.cat([encode_sentences(model, window, data).text_feats for window in windows])
    by_class = feats.unflatten(0, (len(labels), len(templates)))
    return F.normalize(by_class.mean(dim=1), dim=-1)


def zero_shot(image_feats: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """Probabilities `[images, classes]` by similarity to the classes' features `[classes, embed_dim]`."""
    return (cosines(image_feats, classes) / temperature).softmax(dim=-1)


def accuracy(scores: Tensor, labels: Tensor, rank: int = 1) -> float:
    """Percentage of images whose class is among the `rank` best of `scores` `[images, classes]`.

    A tie counts against the right class.
    """
    right = scores.gather(1, labels[:, None])
    return 100.0 * ((scores >= right).sum(dim=1) <= rank).double().mean().item()


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on standardised features.

    Attributes:
        weight: `[classes, width]`.
        bias: `[classes]`.
        mean: of the training features `[width]`.
        scale: their standard deviation `[width]`.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def __call__(self, feats: Tensor) -> Tensor:
        """Logits `[images, classes]` of features `[images, width]`."""
        return F.linear((feats.double() - self.mean) / self.scale, self.weight, self.bias)


def fit_probe(feats: Tensor, labels: Tensor, classes: int, penalty: float) -> LinearProbe:
    """Multinomial logistic regression, to its optimum.

    Args:
        feats: frozen features `[images, width]`.
        labels: class numbers `[images]`.
        classes: how many classes there are.
        penalty: weight of half the squared norm of the weights, beside the mean cross-entropy.
    """
    # Double precision, so that the line search ends at the optimum and not at rounding noise.
    feats = feats.double()
    mean = feats.mean(dim=0)
    scale = feats.std(dim=0, correction=0).clamp(min=1e-6)
    standardised = (feats - mean) / scale
    weight = torch.zeros(classes, feats.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(standardised, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach(), mean, scale)


def choose_penalty(feats: Tensor, labels: Tensor, classes: int) -> float:
    """The penalty with the lowest cross-entropy on held-out folds; the middle one where a class has a single image."""
    fewest = int(labels.bincount(minlength=classes).min())
    if fewest < 2:
        return PENALTIES[len(PENALTIES) // 2]
    folds = assign_folds(labels, min(FOLDS, fewest))

    def loss(penalty: float) -> float:
        total = 0.0
        for fold in range(int(folds.max()) + 1):
            held = folds == fold
            probe = fit_probe(feats[~held], labels[~held], classes, penalty)
            total += F.cross_entropy(probe(feats[held]), labels[held], reduction="sum").item()
        return total

    return min(PENALTIES, key=loss)


def assign_folds(labels: Tensor, folds: int) -> Tensor:
    """A fold for each image `[images]`, every class spread over all of them."""
    result = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        result[rows] = torch.arange(len(rows)) % folds
    return result


def sample_shots(labels: Tensor, classes: int, shots: int, seed: int) -> Tensor:
    """Indices of `shots` images of every class, drawn by `seed`.

    Raises:
        TercetError: a class has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(classes):
        rows = (labels == label).nonzero().squeeze(1)
        if len(rows) < shots:
            raise TercetError(f"class {label} has {len(rows)} training images, fewer than {shots} shots; ask for fewer")
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:shots]])
    return torch.cat(chosen)


@dataclass
class LabelledFeats:
    """Class tokens of images with their labels.

    Attributes:
        feats: the summary token before its projection, which a probe reads `[images, width]`.
        labels: class numbers `[images]`.
    """

    feats: Tensor
    labels: Tensor


def probe_accuracy(train: LabelledFeats, test: LabelledFeats, classes: int, shots: int | None, seed: int = 0) -> float:
    """Accuracy in percent, on `test`, of a probe fitted on `train`, or on `shots` images of each class drawn by `seed`.

    Raises:
        TercetError: a class has fewer than `shots`.
    """
    rows = slice(None) if shots is None else sample_shots(train.labels, classes, shots, seed)
    feats, labels = train.feats[rows], train.labels[rows]
    probe = fit_probe(feats, labels, classes, choose_penalty(feats, labels, classes))
    return accuracy(probe(test.feats), test.labels)


def evaluate_classes(model: Tercet, source: SampleTable, config: Config) -> TaskResult:
    """Accuracy without training and, where `config.classify.train` names images, of linear probes.

    Args:
        model: with its tokenizer, in evaluation mode.
        source: labelled images; the classes are the labels that occur among them.
        config: `classify`, `data` and `evaluate` are read.

    Raises:
        TercetError: no image can be read, fewer than two classes, or training images without one of them.
    """
    labels = labels_of(source)
    names = sorted(set(labels))
    if len(names) < 2:
        raise TercetError(f"all images have the label {names[0]!r}; a classification needs at least two classes")
    images = encode_images(model, source, config)
    test = _labelled(images.class_tokens, images.index, labels, names)
    classes = class_feats(model, names, config.classify.templates, config.data)
    probabilities = zero_shot(images.image_feats, classes, model.temperature.item())
    metrics = {"zero-shot": {"r1": accuracy(probabilities, test.labels)}}
    if len(names) > TOP:
        metrics["zero-shot"][f"r{TOP}"] = accuracy(probabilities, test.labels, TOP)
    if config.classify.train:
        metrics["linear probe"] = _evaluate_probes(model, test, names, config)
    chosen = probabilities.argmax(dim=1).tolist()
    predictions = [
        {"image": key, "label": names[label], "gold": names[gold]}
        for key, label, gold in zip(images.keys, chosen, test.labels.tolist(), strict=True)
    ]
    problems = [*source.rejected, *images.problems]
    return TaskResult(metrics, {"images": len(chosen), "classes": len(names)}, problems, predictions)


def _labelled(feats: Tensor, index: Tensor, labels: list[str], names: list[str]) -> LabelledFeats:
    """`feats` `[images, width]` of the images `index` whose label is among `names`."""
    numbers = {name: number for number, name in enumerate(names)}
    found = torch.tensor([numbers.get(labels[image], -1) for image in index.tolist()])
    return LabelledFeats(feats[found >= 0], found[found >= 0])


def _evaluate_probes(model: Tercet, test: LabelledFeats, names: list[str], config: Config) -> dict[str, float]:
    """Accuracies in percent of probes on a few images a class (mean and deviation over draws), and on all of them."""
    source = open_labelled(config.classify.train, config.data, "train")
    images = encode_images(model, source, config)
    train = _labelled(images.class_tokens, images.index, labels_of(source), names)
    counts = train.labels.bincount(minlength=len(names))
    if int(counts.min()) == 0:
        raise TercetError(
            f"classify.train has no image of {names[int(counts.argmin())]!r}, which the test images have; "
            "give some of every class"
        )
    due: list[tuple[int | None, int]] = [
        (shots, seed)
        for shots in config.classify.shots
        if shots <= int(counts.min())
        for seed in range(config.classify.draws)
    ]
    due.append((None, 0))
    found = map_over_ranks(lambda own: probe_accuracy(train, test, len(names), *own[0]), due, 1)
    numbers: dict[str, float] = {}
    for shots in dict.fromkeys(shots for shots, _ in due[:-1]):
        draws = torch.tensor([value for (own, _), value in zip(due, found, strict=True) if own == shots]).double()
        numbers[f"{shots} shots"] = draws.mean().item()
        numbers[f"{shots} shots, deviation"] = draws.std(correction=0).item()
    return numbers | {"all": found[-1]}


def evaluate_embedding(model: Tercet, source: SampleTable, config: Config) -> TaskResult:
    """Alignment, uniformity and neighbourhoods of images and captions; see `embedding_quality`.

    Raises:
        TercetError: fewer than two images can be read, or the model has no tokenizer.
    """
    images = encode_images(model, source, config)
    if len(images.keys) < 2:
        why = f"; the first problem: {images.problems[0]}" if images.problems else ""
        raise TercetError(f"the quality of embeddings is measured on at least two images{why}")
    texts, captions, owners = encode_captions(model, source, config, images)
    metrics: Metrics = embedding_quality(images.image_feats, texts.text_feats, owners, captions)
    return TaskResult(metrics, {"images": len(images.keys), "texts": len(captions)}, images.problems, [])


TASKS = {
    "classify": TaskSpec(open=open_labelled, evaluate=evaluate_classes, samples=False),
    "embedding": TaskSpec(open=open_sources, evaluate=evaluate_embedding, samples=False),
}
