"""What a run leaves behind: evaluations, a gallery of searches, and the model."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

import cv2
import torch

from tercet.data.loader import picture
from tercet.data.sources import Source
from tercet.files import write_atomic
from tercet.model.folder import model_card, save_model
from tercet.tasks.build import evaluate_task, open_data
from tercet.tasks.retrieval import RetrievalResult, ranks
from tercet.train.session import Session
from tercet.train.track import Tracker

GALLERY = "gallery.json"
MODEL = "model"
GALLERY_QUERIES = 24
GALLERY_RESULTS = 5
THUMBNAIL_SIDE = 112


def finish_run(session: Session, tracker: Tracker) -> None:
    """Save the model, evaluate it on the held-out sources, and write the gallery of the last of them."""
    card = model_card(session.task.student)
    save_model(session.task.student, session.folder / MODEL, session.tokenizer, card)
    report = session.loader.report
    if report.count:
        tracker.event(session.step, f"{report.count} samples could not be read and were left out")
    for split in ("validation", "test"):
        evaluate_split(session, tracker, split, gallery=True)
    session.loader.close()


def evaluate_split(
    session: Session, tracker: Tracker, split: Literal["validation", "test"], gallery: bool = False
) -> None:
    """Evaluate the task on a held-out source, where the config names one."""
    config = session.config
    specs = config.data.validation if split == "validation" else config.data.test
    if not specs:
        return
    with tracker.waiting(f"evaluating on {split}"):
        source = open_data(config.task, specs, config.data, split)
        student = session.task.student
        student.tokenizer = session.tokenizer
        result = evaluate_task(config.task, student, source, config)
    tracker.log_evaluation(session.step, split, result.metrics() | {"size": result.sizes})
    for name, metrics in result.metrics().items():
        words = " ".join(f"{key} {value:.1f}" for key, value in metrics.items())
        tracker.event(session.step, f"{split}, {name}: {words}")
    for problem in result.problems[:5]:
        tracker.event(session.step, f"left out of {split}: {problem}")
    if gallery and isinstance(result, RetrievalResult):
        entries = gallery_entries(result, source, config.data.pixel_limit)
        write_atomic(session.folder / GALLERY, json.dumps(entries))


def gallery_entries(result: RetrievalResult, source: Source, pixel_limit: int) -> list[dict[str, Any]]:
    """Queries spread over the captions, each with its best images and where the right one came."""
    _, image_ranks = ranks(result.scores, result.image_of_text)
    texts = len(result.captions)
    stride = max(1, texts // GALLERY_QUERIES)
    entries: list[dict[str, Any]] = []
    for text in range(0, texts, stride)[:GALLERY_QUERIES]:
        right = int(result.image_of_text[text])
        scores = result.scores.text_to_image[text]
        best = torch.topk(scores, min(GALLERY_RESULTS, len(scores))).indices.tolist()
        results = [
            {
                "key": result.images.keys[image],
                "score": float(scores[image]),
                "right": image == right,
                "thumbnail": thumbnail(source, int(result.images.index[image]), pixel_limit),
            }
            for image in best
        ]
        entries.append({"query": result.captions[text], "rank": int(image_ranks[text]) + 1, "results": results})
    return entries


def thumbnail(source: Source, index: int, pixel_limit: int) -> str:
    """Image `index` as a small JPEG in a data URL."""
    pixels = picture(source, index, pixel_limit)
    scale = THUMBNAIL_SIDE / max(pixels.shape[:2])
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")
