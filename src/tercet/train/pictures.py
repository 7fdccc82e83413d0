"""What a run leaves behind for its report to draw: searches, a matrix of similarities, and heatmaps of words."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from tercet.data.augment import Pixels
from tercet.data.images import resize
from tercet.data.table import SampleTable
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.evaluation import evaluating
from tercet.tasks.heatmaps import average_words, contrast_heatmaps, match_heatmaps, to_grid
from tercet.tasks.retrieval import RetrievalResult, query_ranks

GALLERY, SIMILARITY, HEATMAPS = "gallery.json", "similarity.json", "heatmaps.json"
GALLERY_QUERIES = 24
GALLERY_RESULTS = 5
MATRIX_PAIRS = 16
HEATMAP_PAIRS = 6
THUMBNAIL_SIDE = 112
HEATMAP_SIDE = 160

Json = dict[str, Any]


def gallery_entries(result: RetrievalResult, source: SampleTable, pixel_limit: int) -> list[Json]:
    """Queries spread over the captions, each with its best images and where the right one came."""
    _, image_ranks = query_ranks(result.scores, result.image_of_text)
    entries: list[Json] = []
    for text in _spread(len(result.captions), GALLERY_QUERIES):
        right = int(result.image_of_text[text])
        scores = result.scores.text_to_image[text]
        best = torch.topk(scores, min(GALLERY_RESULTS, len(scores))).indices.tolist()
        results = [
            {
                "key": result.images.keys[image],
                "score": float(scores[image]),
                "right": image == right,
                "thumbnail": thumbnail(_picture(result, source, image, pixel_limit)),
            }
            for image in best
        ]
        entries.append({"query": result.captions[text], "rank": int(image_ranks[text]) + 1, "results": results})
    return entries


def similarity_matrix(result: RetrievalResult, source: SampleTable, pixel_limit: int) -> Json:
    """Cosines of pairs spread over the captions, every caption with every image: the diagonal should stand out."""
    texts = _one_of_each_image(result, MATRIX_PAIRS)
    images = [int(result.image_of_text[text]) for text in texts]
    cosines = result.similarities[images][:, texts].T
    return {
        "captions": [result.captions[text] for text in texts],
        "thumbnails": [thumbnail(_picture(result, source, image, pixel_limit), 56) for image in images],
        "cosines": [[round(value, 4) for value in row] for row in cosines.tolist()],
    }


def heatmaps(model: Tercet, result: RetrievalResult, source: SampleTable, pixel_limit: int, fused: bool) -> list[Json]:
    """Where the model sees the words of some captions in their images.

    Args:
        model: with its tokenizer.
        result: an evaluation of the model.
        source: what was evaluated on.
        pixel_limit: of images.
        fused: read the cross-attention of the fusion encoder, word by word; where that was not trained, the image's own
            attention, for the sentence alone.
    """
    entries: list[Json] = []
    size = model.config.vision.image_size
    tokenizer = require_tokenizer(model)
    with evaluating(model) as device:
        for text in _one_of_each_image(result, HEATMAP_PAIRS):
            image = _picture(result, source, int(result.image_of_text[text]), pixel_limit)
            pixels = torch.from_numpy(resize(image, size)).permute(2, 0, 1)[None].to(device)
            input_ids, mask = tokenizer.encode([result.captions[text]], model.config.text.max_positions)
            mask = mask.to(device)
            text_embeds = model.encode_text(input_ids.to(device), mask)
            words: list[Json] = []
            if fused:
                maps, _ = match_heatmaps(model, model.encode_image(pixels), text_embeds, mask)
                whole = average_words(maps, mask)[0]
                words = [
                    {"word": word, "overlay": overlay(image, to_grid(own.cpu(), size, size))}
                    for word, own in _whole_words(tokenizer.tokens(input_ids[0, 1:]), maps[0, 1:])
                ]
            else:
                whole = contrast_heatmaps(model, pixels, model.project_text(text_embeds[:, 0]))[0]
            entries.append(
                {
                    "query": result.captions[text],
                    "thumbnail": thumbnail(image, HEATMAP_SIDE),
                    "overlay": overlay(image, to_grid(whole.cpu(), size, size)),
                    "words": words,
                }
            )
    return entries


def overlay(image: Pixels, heatmap: Tensor) -> str:
    """A map `[rows, columns]` over its image, each map from its own least to its own greatest value, as a data URL."""
    shown = _shrunk(image, HEATMAP_SIDE)
    height, width = shown.shape[:2]
    low, high = float(heatmap.min()), float(heatmap.max())
    strength = ((heatmap - low) / max(high - low, 1e-12)).numpy().astype(np.float32)
    strength = cv2.resize(strength, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    colours = cv2.applyColorMap((strength * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    grey = cv2.cvtColor(cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _data_url((0.45 * grey + 0.55 * colours).astype(np.uint8))


def thumbnail(pixels: Pixels, side: int = THUMBNAIL_SIDE) -> str:
    """An image as a small JPEG in a data URL."""
    return _data_url(_shrunk(pixels, side))


def _shrunk(pixels: Pixels, side: int) -> Pixels:
    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _data_url(pixels: Pixels) -> str:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")


def _picture(result: RetrievalResult, source: SampleTable, image: int, pixel_limit: int) -> Pixels:
    return source.pixels(int(result.images.index[image]), pixel_limit)


def _spread(total: int, count: int) -> range:
    return range(0, total, max(1, total // count))[:count]


def _one_of_each_image(result: RetrievalResult, count: int) -> list[int]:
    """Captions spread over all, none of an image that another has."""
    first: dict[int, int] = {}
    for text, image in enumerate(result.image_of_text.tolist()):
        first.setdefault(image, text)
    texts = list(first.values())
    return [texts[index] for index in _spread(len(texts), count)]


def _whole_words(pieces: list[str], maps: Tensor) -> list[tuple[str, Tensor]]:
    """Word pieces put together, their maps averaged."""
    words: list[tuple[str, list[Tensor]]] = []
    for piece, own in zip(pieces, maps, strict=True):
        if piece.startswith("##") and words:
            word, parts = words[-1]
            words[-1] = (word + piece.removeprefix("##"), [*parts, own])
        else:
            words.append((piece, [own]))
    return [(word, torch.stack(parts).mean(dim=0)) for word, parts in words]
