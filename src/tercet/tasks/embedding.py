"""How good the shared space is, beyond retrieval: alignment, uniformity, and whether near images have near captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.device import cosines

NEIGHBOURS = 10
_ROWS = 1024  # rows of a pairwise matrix that are in memory at a time


def alignment(image_feats: Tensor, text_feats: Tensor, image_of_text: Tensor) -> float:
    """Mean squared distance of a text to its image; 0 is best, 2 is chance (arXiv 2005.10242, equation 1).

    Args:
        image_feats: unit vectors `[images, embed_dim]`.
        text_feats: unit vectors `[texts, embed_dim]`.
        image_of_text: index of each text's image `[texts]`.
    """
    return (image_feats[image_of_text] - text_feats).double().square().sum(dim=1).mean().item()


def uniformity(feats: Tensor) -> float:
    """Log of the mean Gaussian potential of pairs of unit vectors `[points, embed_dim]`; lower is more spread.

    Arxiv 2005.10242, equation 2, with t = 2: 0 when all points are one, about -4 when they fill the sphere.

    Raises:
        ValueError: fewer than two points.
    """
    points = feats.shape[0]
    if points < 2:
        raise ValueError("uniformity is of two points at least")
    feats = feats.double()
    total = 0.0
    for rows in feats.split(_ROWS):
        squared = 2 - 2 * cosines(rows, feats)
        total += torch.exp(-2 * squared.clamp(min=0)).sum().item()
    return math.log((total - points) / (points * (points - 1)))


def modality_gap(image_feats: Tensor, text_feats: Tensor) -> float:
    """Distance between the means of the images' and of the texts' unit vectors (arXiv 2203.02053)."""
    return (image_feats.double().mean(dim=0) - text_feats.double().mean(dim=0)).norm().item()


def caption_vectors(captions: Sequence[str], image_of_text: Tensor, images: int) -> Tensor:
    """What each image's captions say: unit vectors of word counts, rare words weighing more, `[images, words]`.

    Their products tell how alike two images are described, without asking any model.  A word weighs the logarithm of
    images over images that have it; words of one image alone are left out, being shared with none.
    """
    counts: list[Counter[str]] = [Counter() for _ in range(images)]
    for caption, image in zip(captions, image_of_text.tolist(), strict=True):
        # Each word of a caption once, in the caption's order: the order of a set differs from process to process.
        counts[image].update(list(dict.fromkeys(caption.split())))
    frequency = Counter(word for own in counts for word in own)
    words = {word: index for index, word in enumerate(word for word, times in frequency.items() if times > 1)}
    vectors = torch.zeros(images, max(1, len(words)))
    for image, own in enumerate(counts):
        for word, times in own.items():
            if word in words:
                vectors[image, words[word]] = times * math.log(images / frequency[word])
    return F.normalize(vectors, dim=1)


def neighbourhood(image_feats: Tensor, vectors: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Whether near images have near captions: how alike the nearest images are described.

    Args:
        image_feats: unit vectors `[images, embed_dim]`.
        vectors: `caption_vectors` of the same images.
        neighbours: how many nearest images are looked at.

    Returns:
        In percent: `overlap`, the mean likeness of an image's captions to those of its nearest images; `chance`, to
        those of any other; `best`, to the `neighbours` most alike; and `kept`, where `overlap` lies between chance (0)
        and best (100).
    """
    images = image_feats.shape[0]
    neighbours = min(neighbours, images - 1)
    found, best, total = 0.0, 0.0, 0.0
    for start in range(0, images, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, images))
        itself = (torch.arange(len(rows)), rows)
        alike = cosines(vectors[rows], vectors)
        near = cosines(image_feats[rows], image_feats)
        alike[itself] = 0.0
        total += alike.double().sum().item()
        alike[itself] = near[itself] = float("-inf")
        nearest = near.topk(neighbours, dim=1).indices
        found += alike.gather(1, nearest).double().sum().item()
        best += alike.topk(neighbours, dim=1).values.double().sum().item()
    overlap, best = found / (images * neighbours), best / (images * neighbours)
    chance = total / (images * (images - 1))
    kept = (overlap - chance) / (best - chance) if best > chance else 0.0
    return {
        name: 100 * value
        for name, value in zip(("overlap", "chance", "best", "kept"), (overlap, chance, best, kept), strict=True)
    }


def caption_recall(text_feats: Tensor, image_of_text: Tensor) -> float:
    """Share of texts, in percent, whose nearest other text is of the same image; of images with several texts."""
    several = image_of_text.bincount()[image_of_text] > 1
    found = []
    for rows in several.nonzero().squeeze(1).split(_ROWS):
        near = cosines(text_feats[rows], text_feats)
        near[torch.arange(len(rows)), rows] = float("-inf")
        found.append(image_of_text[near.argmax(dim=1)] == image_of_text[rows])
    return 100.0 * torch.cat(found).double().mean().item() if found else float("nan")


def shared_space(image_feats: Tensor, text_feats: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """How images and texts lie in the shared space; arguments as of `alignment`.

    Returns:
        `alignment`, `image_uniformity`, `text_uniformity` (of two points at least) and `modality_gap`.
    """
    space = {"alignment": alignment(image_feats, text_feats, image_of_text)}
    for name, feats in (("image_uniformity", image_feats), ("text_uniformity", text_feats)):
        if feats.shape[0] > 1:
            space[name] = uniformity(feats)
    return space | {"modality_gap": modality_gap(image_feats, text_feats)}


def embedding_quality(
    image_feats: Tensor, text_feats: Tensor, image_of_text: Tensor, captions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Everything above, of images and their texts.

    Args:
        image_feats: unit vectors `[images, embed_dim]`.
        text_feats: unit vectors `[texts, embed_dim]`.
        image_of_text: index of each text's image `[texts]`.
        captions: the texts, cleaned.

    Returns:
        `{"space": {...}, "neighbourhood": {...}}`.
    """
    vectors = caption_vectors(captions, image_of_text, image_feats.shape[0])
    near = neighbourhood(image_feats, vectors)
    recall = caption_recall(text_feats, image_of_text)
    if not math.isnan(recall):
        near["caption_r1"] = recall
    return {"space": shared_space(image_feats, text_feats, image_of_text), "neighbourhood": near}
