"""Commands that measure: `evaluate` and `score`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from tercet.arguments import FLAT, DataKeys, EvaluateKeys, Switch, parse, split_flags
from tercet.commands.models import model_and_config
from tercet.commands.printing import print_metrics


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure a model on held-out data: in retrieval, by recall of the dual encoder and re-ranked, or in a task."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """model folder, run folder, or hub id"""
    data: Annotated[list[str], tyro.conf.arg(metavar="FILE...")]
    """annotation files of the task (for retrieval also folders and tar shards), or scenes:test"""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """what is measured; default: what the model's run trained, else retrieval"""
    predictions: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write what the model said of each sample to this JSON file"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print the numbers as one JSON object"""
    config: Annotated[EvaluateKeys, FLAT, tyro.conf.FlagConversionOff] = field(default_factory=EvaluateKeys)


@dataclass(frozen=True)
class ScoreArguments:
    """Score a file of predictions against annotations, without a model and without images."""

    task: Annotated[str, tyro.conf.arg(metavar="TASK")]
    """retrieval, vqa, entailment, nlvr or grounding"""
    predictions: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRED")]
    """what `tercet evaluate --predictions` wrote, or the official evaluation's own form"""
    gold: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GOLD")]
    """the annotations, as `tercet evaluate --data` takes them"""
    json: Switch = False
    """print the numbers as one JSON object"""
    config: Annotated[DataKeys, FLAT, tyro.conf.FlagConversionOff] = field(default_factory=DataKeys)


def evaluate(arguments: list[str]) -> None:
    """Measure a model on held-out data, in retrieval or in the task that it was fine-tuned for."""
    overrides, rest = split_flags(arguments, EvaluateArguments)
    options = parse(EvaluateArguments, "evaluate", rest)
    folder, config = model_and_config(options.model, overrides)

    from tercet import load
    from tercet.device import resolve_device
    from tercet.distributed import Ranks, init_distributed
    from tercet.files import write_atomic
    from tercet.model.int8 import quantise_encoders
    from tercet.tasks.build import evaluate_task, open_data

    task = options.task or config.task
    with init_distributed(config.train.device):
        first = Ranks().first
        model = load(folder).to(resolve_device(config.train.device).device)
        if config.evaluate.int8:
            quantise_encoders(model)
        result = evaluate_task(task, model, open_data(task, options.data, config.data, "test"), config)
    if not first:
        return
    for problem in result.problems[:5]:
        print(f"left out: {problem}", file=sys.stderr)
    if len(result.problems) > 5:
        print(f"left out: {len(result.problems) - 5} more", file=sys.stderr)
    if options.predictions is not None:
        write_atomic(options.predictions, json.dumps(result.predictions()) + "\n")
    if options.json:
        print(json.dumps(result.metrics()))
    else:
        print_metrics(result.metrics())


def score(arguments: list[str]) -> None:
    """Score a file of predictions against annotations, without a model."""
    from tercet.config_io import default_config

    overrides, rest = split_flags(arguments, ScoreArguments)
    options = parse(ScoreArguments, "score", rest)

    from tercet.tasks.score import score_predictions

    metrics = score_predictions(options.task, options.predictions, options.gold, default_config(overrides).data)
    if options.json:
        print(json.dumps(metrics))
    else:
        print_metrics(metrics)
