"""Classification without training, by the names of the classes, and with a linear probe on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.config import ClassifyConfig, DataConfig
from tercet.data.loader import dealt
from tercet.device import cosines
from tercet.distributed import Ranks, Value
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.encoding import encode_sentences
from tercet.tasks.retrieval import TEXT_WINDOW

TEMPLATES = tuple(ClassifyConfig().templates)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5


def class_feats(
    model: Tercet, labels: Sequence[str], templates: Sequence[str], data: DataConfig, ranks: Ranks | None = None
) -> Tensor:
    """A feature for each class, the mean over its sentences by every template: unit vectors `[classes, embed_dim]`.

    With `ranks` each of them encodes a part of the sentences, and all get the features.

    Raises:
        TercetError: a label stands twice, or a template has no place for the label.
    """
    twice = next((label for index, label in enumerate(labels) if label in labels[:index]), None)
    if twice is not None:
        raise TercetError(f"the label {twice!r} stands twice; give each class once")
    for template in templates:
        if template.count("{}") != 1:
            raise TercetError(f"the template {template!r} needs one {{}} where the label goes, as in 'a photo of {{}}'")
    sentences = [template.replace("{}", label) for label in labels for template in templates]
    windows = [sentences[start : start + TEXT_WINDOW] for start in range(0, len(sentences), TEXT_WINDOW)]
    own = [encode_sentences(model, windows[number], data).text_feats for number in dealt(len(windows), ranks)]
    feats = torch.cat(_together(own, ranks))
    return F.normalize(feats.unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)


def zero_shot(image_feats: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """Probabilities `[images, classes]` by similarity to the classes' features `[classes, embed_dim]`."""
    return (cosines(image_feats, classes) / temperature).softmax(dim=-1)


def accuracy(scores: Tensor, labels: Tensor, rank: int = 1) -> float:
    """Share of images, in percent, whose class is among the `rank` best of `scores` `[images, classes]`.

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


def choose_penalty(feats: Tensor, labels: Tensor, classes: int, ranks: Ranks | None = None) -> float:
    """The penalty with the lowest cross-entropy on held-out folds; the middle one where a class has a single image.

    With `ranks` each of them fits a part of the probes, and all get the penalty.
    """
    fewest = int(labels.bincount(minlength=classes).min())
    if fewest < 2:
        return PENALTIES[len(PENALTIES) // 2]
    folds = assign_folds(labels, min(FOLDS, fewest))
    due = [(penalty, fold) for penalty in PENALTIES for fold in range(int(folds.max()) + 1)]
    own = []
    for penalty, fold in (due[number] for number in dealt(len(due), ranks)):
        held = folds == fold
        probe = fit_probe(feats[~held], labels[~held], classes, penalty)
        own.append(F.cross_entropy(probe(feats[held]), labels[held], reduction="sum").item())
    losses = dict.fromkeys(PENALTIES, 0.0)
    for (penalty, _), loss in zip(due, _together(own, ranks), strict=True):
        losses[penalty] += loss
    return min(losses, key=lambda penalty: losses[penalty])


def assign_folds(labels: Tensor, folds: int) -> Tensor:
    """A fold for each image `[images]`, every class spread over all of them."""
    result = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        result[rows] = torch.arange(len(rows)) % folds
    return result


def draw_shots(labels: Tensor, classes: int, shots: int, seed: int) -> Tensor:
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


def few_shot(
    feats: Tensor,
    labels: Tensor,
    test_feats: Tensor,
    test_labels: Tensor,
    shots: int,
    draws: int = 3,
    ranks: Ranks | None = None,
) -> tuple[float, float]:
    """Accuracy in percent of linear probes fitted on `shots` images a class: mean and standard deviation over draws.

    Args:
        feats: frozen features of the images to draw from `[images, width]`.
        labels: their class numbers `[images]`.
        test_feats: features of the images to classify `[test images, width]`.
        test_labels: their class numbers `[test images]`.
        shots: images of each class.
        draws: how many choices of images are averaged.
        ranks: each of them fits the probes of a part of the draws, and all get the result; None: this process alone.
    """
    classes = int(labels.max()) + 1
    found = []
    for seed in dealt(draws, ranks):
        rows = draw_shots(labels, classes, shots, seed)
        penalty = choose_penalty(feats[rows], labels[rows], classes)
        probe = fit_probe(feats[rows], labels[rows], classes, penalty)
        found.append(accuracy(probe(test_feats), test_labels))
    values = torch.tensor(_together(found, ranks), dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def _together(own: list[Value], ranks: Ranks | None) -> list[Value]:
    """What `dealt` spread over the ranks, in its order again; without ranks it is all here."""
    return own if ranks is None else ranks.gather_interleaved(own)
