"""What a run leaves behind: checkpoints, evaluations, a gallery of searches, and the model."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import torch

from tercet.data.loader import picture
from tercet.data.sources import Source
from tercet.files import write_atomic
from tercet.model.folder import model_card, save_model
from tercet.tasks.build import evaluate_task, kind_of, open_data
from tercet.tasks.retrieval import RetrievalResult, ranks
from tercet.tasks.task import TaskResult
from tercet.train.checkpoint import Best
from tercet.train.session import Session
from tercet.train.track import Tracker

GALLERY = "gallery.json"
MODEL = "model"
BEST_MODEL = "best-model"
GALLERY_QUERIES = 24
GALLERY_RESULTS = 5
THUMBNAIL_SIDE = 112


def finish_run(session: Session, tracker: Tracker) -> None:
    """Save the model, evaluate it on the held-out sources, and write the gallery of the last of them."""
    save_student(session, MODEL)
    report = session.loader.report
    if report.count:
        tracker.event(session.step, f"{report.count} samples could not be read and were left out")
    validate(session, tracker, gallery=True)
    evaluate_split(session, tracker, "test", gallery=True)
    session.loader.close()


def save(session: Session, wait: bool = False) -> None:
    """Write a checkpoint beside the training; `wait` until it is there."""
    session.checkpoints.save(session.task, session.optimizer, session.position)
    if wait:
        session.checkpoints.wait()


def save_student(session: Session, name: str) -> None:
    """Write the model as a folder of the run."""
    student = session.task.student
    save_model(student, session.folder / name, session.tokenizer, model_card(student))


def validate(session: Session, tracker: Tracker, gallery: bool = False) -> None:
    """Evaluate on the validation source, and keep checkpoint and model where they are the best so far."""
    result = evaluate_split(session, tracker, "validation", gallery)
    judged = None if result is None else headline(result, kind_of(session.config.task).judged_by)
    if judged is None:
        return
    best, (metric, value) = session.checkpoints.best, judged
    if best is not None and best.metric == metric and best.value >= value:
        return
    save(session)
    session.checkpoints.keep_best(Best(session.step, metric, value))
    if session.config.train.evaluate_every:
        save_student(session, BEST_MODEL)
    tracker.event(session.step, f"best so far: {metric} {value:.1f}")


def headline(result: TaskResult, judged_by: Sequence[str]) -> tuple[str, float] | None:
    """Name and value of the first of `judged_by` that there is, such as `reranked.r_mean`."""
    metrics = result.metrics()
    for name in judged_by:
        group, _, metric = name.partition(".")
        if metric in metrics.get(group, {}):
            return name, metrics[group][metric]
    return None


def evaluate_split(
    session: Session, tracker: Tracker, split: Literal["validation", "test"], gallery: bool = False
) -> TaskResult | None:
    """Evaluate the task on a held-out source; None where the config names none."""
    config = session.config
    specs = config.data.validation if split == "validation" else config.data.test
    if not specs:
        return None
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
    return result


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
