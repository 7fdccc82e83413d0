"""Quality of the shared space beyond retrieval: alignment, uniformity, and whether near images have like captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.device import cosines

NEIGHBOURS = 10
CHUNK = 1024  # rows of a pairwise matrix in memory at a time


def alignment(image_feats: Tensor, text_feats: Tensor, image_of_text: Tensor) -> float:
    """Mean squared distance of a text to its image; 0 is best, 2 is chance (arXiv 2005.10242, equation 1).

    Args:
        image_feats: unit vectors `[images, embed_dim]`.
        text_feats: unit vectors `[texts, embed_dim]`.
        image_of_text: index of each text's image `[texts]`.
    """
    return (image_feats[image_of_text] - text_feats).double().square().sum(dim=1).mean().item()


def uniformity(feats: Tensor) -> float:
    """Log of the mean Gaussian potential of pairs of unit vectors `[points, embed_dim]`; lower is more uniform.

    arXiv 2005.10242, equation 2, with t = 2: 0 when all points coincide, about -4 when they fill the sphere.

    Raises:
        ValueError: fewer than two points.
    """
    points = feats.shape[0]
    if points < 2:
        raise ValueError("uniformity needs two points")
    feats = feats.double()
    total = 0.0
    for rows in feats.split(CHUNK):
        squared = 2 - 2 * cosines(rows, feats)
        total += torch.exp(-2 * squared.clamp(min=0)).sum().item()
    return math.log((total - points) / (points * (points - 1)))


def modality_gap(image_feats: Tensor, text_feats: Tensor) -> float:
    """Distance between the means of the images' and of the texts' unit vectors (arXiv 2203.02053)."""
    return (image_feats.double().mean(dim=0) - text_feats.double().mean(dim=0)).norm().item()


def caption_vectors(captions: Sequence[str], image_of_text: Tensor, images: int) -> Tensor:
    """TF-IDF of each image's captions as unit vectors `[images, words]`: their cosines compare what images show without
    a model.  Words of a single image are dropped, since no other shares them."""
    counts: list[Counter[str]] = [Counter() for _ in range(images)]
    for caption, image in zip(captions, image_of_text.tolist(), strict=True):
        # Each word once a caption, in the caption's order: the order of a set differs between processes.
        counts[image].update(dict.fromkeys(caption.split(), 1))
    frequency = Counter(word for own in counts for word in own)
    words = {word: index for index, word in enumerate(word for word, times in frequency.items() if times > 1)}
    vectors = torch.zeros(images, max(1, len(words)))
    for image, own in enumerate(counts):
        for word, times in own.items():
            if word in words:
                vectors[image, words[word]] = times * math.log(images / frequency[word])
    return F.normalize(vectors, dim=1)


def neighbourhood(image_feats: Tensor, vectors: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Whether near images have similar captions.

    Args:
        image_feats: unit vectors `[images, embed_dim]`.
        vectors: `caption_vectors` of the same images.
        neighbours: how many nearest images are compared.

    Returns:
        In percent: `overlap`, the mean similarity of an image's captions to those of its nearest images; `chance`, to
        those of any other; `best`, to the `neighbours` most similar; and `kept`, where `overlap` lies between chance
        (0) and best (100).
    """
    images = image_feats.shape[0]
    neighbours = min(neighbours, images - 1)
    found = best = total = 0.0
    for start in range(0, images, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, images))
        itself = (torch.arange(len(rows)), rows)
        similar, near = cosines(vectors[rows], vectors), cosines(image_feats[rows], image_feats)
        similar[itself] = 0.0
        total += similar.double().sum().item()
        similar[itself] = near[itself] = float("-inf")
        nearest = near.topk(neighbours, dim=1).indices
        found += similar.gather(1, nearest).double().sum().item()
        best += similar.topk(neighbours, dim=1).values.double().sum().item()
    overlap, best = found / (images * neighbours), best / (images * neighbours)
    chance = total / (images * (images - 1))
    kept = (overlap - chance) / (best - chance) if best > chance else 0.0
    return {"overlap": 100 * overlap, "chance": 100 * chance, "best": 100 * best, "kept": 100 * kept}


def caption_recall(text_feats: Tensor, image_of_text: Tensor) -> float:
    """Percentage of texts, of images with several, whose nearest other text belongs to the same image."""
    several = image_of_text.bincount()[image_of_text] > 1
    found = []
    for rows in several.nonzero().squeeze(1).split(CHUNK):
        near = cosines(text_feats[rows], text_feats)
        near[torch.arange(len(rows)), rows] = float("-inf")
        found.append(image_of_text[near.argmax(dim=1)] == image_of_text[rows])
    return 100.0 * torch.cat(found).double().mean().item() if found else float("nan")


def embedding_metrics(image_feats: Tensor, text_feats: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """`alignment`, `image_uniformity`, `text_uniformity` (of two points at least) and `modality_gap`; arguments as of
    `alignment`."""
    metrics = {"alignment": alignment(image_feats, text_feats, image_of_text)}
    for name, feats in (("image_uniformity", image_feats), ("text_uniformity", text_feats)):
        if feats.shape[0] > 1:
            metrics[name] = uniformity(feats)
    return metrics | {"modality_gap": modality_gap(image_feats, text_feats)}


def embedding_quality(
    image_feats: Tensor, text_feats: Tensor, image_of_text: Tensor, captions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """All of the above.

    Args:
        image_feats: unit vectors `[images, embed_dim]`.
        text_feats: unit vectors `[texts, embed_dim]`.
        image_of_text: index of each text's image `[texts]`.
        captions: the texts, cleaned.

    Returns:
        `{"embeddings": {...}, "neighbourhood": {...}}`.
    """
    near = neighbourhood(image_feats, caption_vectors(captions, image_of_text, image_feats.shape[0]))
    recall = caption_recall(text_feats, image_of_text)
    if not math.isnan(recall):
        near["caption_r1"] = recall
    return {"embeddings": embedding_metrics(image_feats, text_feats, image_of_text), "neighbourhood": near}
