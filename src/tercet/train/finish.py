"""What a run leaves behind: checkpoints, evaluations, a gallery of searches, and the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import torch

from tercet.data.table import SampleTable
from tercet.distributed import is_sharded
from tercet.files import write_atomic
from tercet.model.hub import CARD, empty_model, save_model
from tercet.model.tercet import Tercet
from tercet.tasks.evaluation import TaskResult
from tercet.tasks.retrieval import RetrievalResult
from tercet.tasks.task import evaluate_task, get_task
from tercet.train.card import run_card
from tercet.train.checkpoint import Best
from tercet.train.pictures import GALLERY, HEATMAPS, SIMILARITY, gallery_entries, heatmaps, similarity_matrix
from tercet.train.session import Session
from tercet.train.track import Tracker

MODEL = "model"
BEST_MODEL = "best-model"


def finish_run(session: Session, tracker: Tracker) -> None:
    """Save the model, evaluate it on the held-out sources, draw what the report shows, and complete the model card."""
    save_student(session, MODEL)
    left_out = sum(session.ranks.gather(session.loader.report.count))
    if left_out:
        tracker.event(session.step, f"{left_out} samples could not be read and were left out")
        for message in session.loader.report.messages:
            tracker.event(session.step, f"left out: {message}")
    validate(session, tracker, gallery=True)
    evaluate_split(session, tracker, "test", gallery=True)
    if session.ranks.first:
        card = run_card(session.task.student, session.config, session.folder)
        write_atomic(session.folder / MODEL / CARD, card)
    session.loader.close()


def save(session: Session, wait: bool = False) -> None:
    """Write a checkpoint beside the training; `wait` until it is there."""
    session.checkpoints.save(session.task, session.optimizer, session.position)
    if wait:
        session.checkpoints.wait()


def save_student(session: Session, name: str) -> None:
    """Write the model as a folder of the run, with a card that tells what was measured so far."""
    student = whole_model(session.task.student)
    if session.config.task in ("pretrain", "retrieval"):
        student.objectives = list(session.config.objectives.enabled)
    if session.ranks.first:
        student.tokenizer = session.tokenizer
        save_model(student, session.folder / name, run_card(student, session.config, session.folder))


def validate(session: Session, tracker: Tracker, gallery: bool = False) -> None:
    """Evaluate on the validation source, and keep checkpoint and model where they are the best so far."""
    result = evaluate_split(session, tracker, "validation", gallery)
    judged = None if result is None else headline(result, get_task(session.config.task).selection_metrics)
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
    metrics = result.metrics
    for name in judged_by:
        group, _, metric = name.partition(".")
        if metric in metrics.get(group, {}):
            return name, metrics[group][metric]
    return None


def evaluate_split(
    session: Session, tracker: Tracker, split: Literal["validation", "test"], gallery: bool = False
) -> TaskResult | None:
    """Evaluate the task on a held-out source; None where the config names none, or the run is asked to stop."""
    config, source = session.config, session.held_out.get(split)
    if source is None:
        return None
    with tracker.waiting(f"evaluating on {split}"):
        student = whole_model(session.task.student)
        student.tokenizer = session.tokenizer
        result = session.stop.drop_when_stopped(lambda: evaluate_task(config.task, student, source, config))
    if result is None:
        return None
    space = {"space": result.space} if isinstance(result, RetrievalResult) else {}
    tracker.log_evaluation(session.step, split, result.metrics | space | {"size": result.sizes})
    for name, metrics in result.metrics.items():
        words = " ".join(f"{key} {value:.1f}" for key, value in metrics.items())
        tracker.event(session.step, f"{split}, {name}: {words}")
    for problem in result.problems[:5]:
        tracker.event(session.step, f"left out of {split}: {problem}")
    if gallery and session.ranks.first and isinstance(result, RetrievalResult):
        _draw(session, student, result, source)
    return result


def _draw(session: Session, student: Tercet, result: RetrievalResult, source: SampleTable) -> None:
    """Write what the report shows of an evaluation."""
    limit = session.config.data.pixel_limit
    fused = session.config.objectives.itm > 0
    pictures = {
        GALLERY: gallery_entries(result, source, limit),
        SIMILARITY: similarity_matrix(result, source, limit),
        HEATMAPS: heatmaps(student, result, source, limit, fused),
    }
    for name, content in pictures.items():
        write_atomic(session.folder / name, json.dumps(content))


@torch.no_grad()
def whole_model(model: Tercet) -> Tercet:
    """`model` itself, or where it is sharded a whole copy on every rank, to evaluate or to save."""
    if not any(map(is_sharded, model.parameters())):
        return model
    copy = empty_model(model.config)
    weights = {name: value.full_tensor() if is_sharded(value) else value for name, value in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    copy.to(next(model.parameters()).device)
    copy.tokenizer, copy.answers, copy.objectives = model.tokenizer, model.answers, model.objectives
    copy.train(model.training)
    return copy
