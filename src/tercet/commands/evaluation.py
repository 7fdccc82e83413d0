"""Commands that measure: `evaluate`, `score` and `report`."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from tercet.arguments import DataKeys, EvaluateKeys
from tercet.commands.models import model_and_config
from tercet.commands.terminal import print_metrics, print_problems
from tercet.config_io import default_config
from tercet.errors import TercetError


def evaluate(
    model: str,
    *,
    data: list[str],
    task: str | None = None,
    predictions: Path | None = None,
    json: bool = False,
    **overrides: EvaluateKeys,
) -> None:
    """Measure a model on held-out data: retrieval, by recall of the dual encoder and re-ranked, or a task.

    Args:
        model: model folder, run folder, or hub id.
        data: annotation files of the task; for retrieval also folders and tar shards.
        task: what is measured; default: what the model's run trained, else retrieval.
        predictions: write the prediction for each sample to this JSON file.
        json: print the numbers as one JSON object.
    """
    folder, config = model_and_config(model, overrides)

    from tercet.device import resolve_device
    from tercet.distributed import Ranks, init_distributed
    from tercet.files import write_atomic
    from tercet.model.hub import load_model
    from tercet.model.int8 import quantise_encoders
    from tercet.tasks.task import evaluate_task, open_data

    task = task or config.task
    with init_distributed(config.train.device):
        first = Ranks().first
        loaded = load_model(folder, resolve_device(config.train.device).device)
        if config.evaluate.int8:
            quantise_encoders(loaded)
        result = evaluate_task(task, loaded, open_data(task, data, config.data, "test"), config)
    if not first:
        return
    print_problems("skipped", result.problems, 5)
    if predictions is not None:
        write_atomic(predictions, json_format.dumps(result.predictions) + "\n")
    _print(result.metrics, json)


def score(predictions: str, gold: str, *, task: str, json: bool = False, **overrides: DataKeys) -> None:
    """Score a file of predictions against annotations, without a model and without images.

    Args:
        predictions: what `tercet evaluate --predictions` wrote, or the official evaluation's own form.
        gold: the annotations, as `tercet evaluate --data` takes them.
        task: retrieval, vqa, entailment, nlvr or grounding.
        json: print the numbers as one JSON object.
    """
    from tercet.tasks.score import score_predictions

    _print(score_predictions(task, predictions, gold, default_config(overrides).data), json)


def _print(metrics: dict, json: bool) -> None:
    if json:
        print(json_format.dumps(metrics))
    else:
        print_metrics(metrics)


def report(runs: list[Path], *, output: Path | None = None) -> None:
    """Write a run's report.html again, or compare several runs on one page.

    Args:
        runs: run folders; several are compared on one page.
        output: the page that compares several runs; default: comparison.html in the current folder.
    """
    for run in runs:
        if not run.is_dir():
            raise TercetError(f"no run folder {run}; check the path")
    if len(runs) == 1:
        if output is not None:
            raise TercetError("--output names the page of several runs; the page of one is RUN/report.html")
        from tercet.report.page import write_report

        print(f"The report is {write_report(runs[0])}.")
        return
    from tercet.report.compare import write_comparison

    print(f"The comparison is {write_comparison(runs, output or 'comparison.html')}.")
