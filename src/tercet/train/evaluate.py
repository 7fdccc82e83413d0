"""What a run measures and writes: checkpoints, evaluations, the files of its report, and the model."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import torch

from tercet.data.augment import Pixels
from tercet.data.table import SampleTable
from tercet.distributed import is_sharded
from tercet.files import write_atomic
from tercet.model.hub import CARD, empty_model, save_model
from tercet.model.tercet import Tercet
from tercet.predictor import Predictor
from tercet.tasks.evaluation import TaskResult
from tercet.tasks.explaining import Explanation, fit
from tercet.tasks.retrieval import RetrievalResult, query_ranks
from tercet.tasks.task import evaluate_task, get_task
from tercet.train.checkpoint import Best
from tercet.train.log import NullLogger
from tercet.train.model_card import run_card
from tercet.train.setup import TrainState

MODEL = "model"
BEST_MODEL = "best-model"
# Files that the report draws.
GALLERY, SIMILARITY, HEATMAPS = "gallery.json", "similarity.json", "heatmaps.json"
GALLERY_QUERIES = 24
GALLERY_RESULTS = 5
MATRIX_PAIRS = 16
HEATMAP_PAIRS = 6
THUMBNAIL_SIDE, MATRIX_SIDE, HEATMAP_SIDE = 112, 56, 160

Json = dict[str, Any]


def save_checkpoint(state: TrainState, wait: bool = False) -> None:
    """Write a checkpoint while training continues, or `wait` until it is written."""
    state.checkpoints.save(state.task, state.optimizer, state.position)
    if wait:
        state.checkpoints.wait()


def finish_run(state: TrainState, logger: NullLogger) -> None:
    """Save the model, evaluate it on the held-out sources, and complete the model card."""
    save_student(state, MODEL)
    skipped = sum(state.ranks.gather(state.loader.report.count))
    if skipped:
        logger.event(state.step, f"{skipped} samples could not be read and were skipped")
        for message in state.loader.report.messages:
            logger.event(state.step, f"skipped: {message}")
    validate(state, logger, gallery=True)
    evaluate_split(state, logger, "test", gallery=True)
    if state.ranks.first:
        card = run_card(state.task.student, state.config, state.folder)
        write_atomic(state.folder / MODEL / CARD, card)
    state.loader.close()


def save_student(state: TrainState, name: str) -> None:
    """Write the model as a folder of the run, with a card that reports what was measured so far."""
    student = whole_model(state.task.student)
    if state.config.task in ("pretrain", "retrieval"):
        student.objectives = list(state.config.objectives.enabled)
    if state.ranks.first:
        card = run_card(student, state.config, state.folder)
        save_model(student, state.folder / name, card)


def validate(state: TrainState, logger: NullLogger, gallery: bool = False) -> None:
    """Evaluate on the validation source, and keep checkpoint and model where they are the best so far."""
    result = evaluate_split(state, logger, "validation", gallery)
    judged = None if result is None else headline(result, get_task(state.config.task).selection_metrics)
    if judged is None:
        return
    best, (metric, value) = state.checkpoints.best, judged
    if best is not None and best.metric == metric and best.value >= value:
        return
    save_checkpoint(state)
    state.checkpoints.keep_best(Best(state.step, metric, value))
    if state.config.train.evaluate_every:
        save_student(state, BEST_MODEL)
    logger.event(state.step, f"best so far: {metric} {value:.1f}")


def headline(result: TaskResult, judged_by: Sequence[str]) -> tuple[str, float] | None:
    """Name and value of the first of the metrics `judged_by`, such as `reranked.r_mean`, that the result has."""
    metrics = result.metrics
    for name in judged_by:
        group, _, metric = name.partition(".")
        if metric in metrics.get(group, {}):
            return name, metrics[group][metric]
    return None


def evaluate_split(
    state: TrainState, logger: NullLogger, split: Literal["validation", "test"], gallery: bool = False
) -> TaskResult | None:
    """Evaluate the task on a held-out source; None where the config names none, or the run is asked to stop."""
    config, source = state.config, state.held_out.get(split)
    if source is None:
        return None
    logger.status(f"evaluating on {split}")
    student = whole_model(state.task.student)
    result = state.stop.run_unless_stopped(lambda: evaluate_task(config.task, student, source, config))
    if result is None:
        return None
    metrics = result.metrics
    embeddings = {"embeddings": result.embeddings} if isinstance(result, RetrievalResult) else {}
    logger.log_evaluation(state.step, split, metrics | embeddings | {"size": result.sizes})
    for name, group in metrics.items():
        numbers = " ".join(f"{key} {value:.1f}" for key, value in group.items())
        logger.event(state.step, f"{split}, {name}: {numbers}")
    for problem in result.problems[:5]:
        logger.event(state.step, f"skipped in {split}: {problem}")
    if gallery and state.ranks.first and isinstance(result, RetrievalResult):
        limit = config.data.pixel_limit
        write_atomic(state.folder / GALLERY, json.dumps(gallery_entries(result, source, limit)))
        write_atomic(state.folder / SIMILARITY, json.dumps(similarity_matrix(result, source, limit)))
        entries = heatmap_entries(student, result, source, limit, fused=config.objectives.itm > 0)
        write_atomic(state.folder / HEATMAPS, json.dumps(entries))
    return result


@torch.no_grad()
def whole_model(model: Tercet) -> Tercet:
    """`model` itself, or where it is sharded an unsharded copy on every rank, to evaluate or to save."""
    if not any(map(is_sharded, model.parameters())):
        return model
    copy = empty_model(model.config)
    weights = {name: value.full_tensor() if is_sharded(value) else value for name, value in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    copy.to(next(model.parameters()).device)
    copy.tokenizer, copy.answers, copy.objectives = model.tokenizer, model.answers, model.objectives
    return copy.train(model.training)


def gallery_entries(result: RetrievalResult, source: SampleTable, pixel_limit: int) -> list[Json]:
    """Queries spread over the captions, each with its best images and the rank of the right one."""
    _, image_ranks = query_ranks(result.scores, result.image_of_text)
    entries: list[Json] = []
    for text in _evenly(len(result.captions), GALLERY_QUERIES):
        right = int(result.image_of_text[text])
        scores = result.scores.text_to_image[text]
        best = torch.topk(scores, min(GALLERY_RESULTS, len(scores))).indices.tolist()
        results = [
            {
                "key": result.images.keys[image],
                "score": float(scores[image]),
                "right": image == right,
                "thumbnail": thumbnail(_pixels(result, source, image, pixel_limit)),
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
        "thumbnails": [thumbnail(_pixels(result, source, image, pixel_limit), MATRIX_SIDE) for image in images],
        "cosines": [[round(value, 4) for value in row] for row in cosines.tolist()],
    }


def heatmap_entries(
    model: Tercet, result: RetrievalResult, source: SampleTable, pixel_limit: int, fused: bool
) -> list[Json]:
    """Where the model sees the words of some captions in their images.

    Args:
        model: with its tokenizer.
        result: an evaluation of the model.
        source: what was evaluated on.
        pixel_limit: of images.
        fused: read the cross-attention of the fusion encoder, word by word; where that was not trained, the image's own
            attention, for the whole sentence alone.
    """
    predictor = Predictor(model)
    entries: list[Json] = []
    for text in _one_of_each_image(result, HEATMAP_PAIRS):
        image = _pixels(result, source, int(result.image_of_text[text]), pixel_limit)
        side = min(HEATMAP_SIDE, max(image.shape[:2]))
        seen = predictor.ground(image, result.captions[text], "itm" if fused else "itc")
        assert isinstance(seen, Explanation)
        words = [
            {"word": heat.word, "overlay": _data_url(seen.overlay(index, side))}
            for index, heat in enumerate(seen.words)
        ]
        entries.append(
            {
                "query": result.captions[text],
                "thumbnail": thumbnail(image, side),
                "overlay": _data_url(seen.overlay(side=side)),
                "words": words,
            }
        )
    return entries


def thumbnail(pixels: Pixels, side: int = THUMBNAIL_SIDE) -> str:
    """An image as a small JPEG in a data URL."""
    return _data_url(fit(pixels, side) if max(pixels.shape[:2]) > side else pixels)


def _data_url(pixels: Pixels) -> str:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")


def _pixels(result: RetrievalResult, source: SampleTable, image: int, pixel_limit: int) -> Pixels:
    return source.pixels(int(result.images.index[image]), pixel_limit)


def _evenly(total: int, count: int) -> range:
    return range(0, total, max(1, total // count))[:count]


def _one_of_each_image(result: RetrievalResult, count: int) -> list[int]:
    """Captions spread over all, of `count` different images."""
    first: dict[int, int] = {}
    for text, image in enumerate(result.image_of_text.tolist()):
        first.setdefault(image, text)
    texts = list(first.values())
    return [texts[index] for index in _evenly(len(texts), count)]
