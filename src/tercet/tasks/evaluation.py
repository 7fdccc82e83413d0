"""What an evaluation gives, and the loop over batches and ranks that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from tercet.config import Config, DataConfig
from tercet.data.batch import Batch
from tercet.data.loader import sample_batches
from tercet.data.table import SampleTable
from tercet.data.tokenizer import clean_caption
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet

Value = TypeVar("Value")
Metrics = dict[str, dict[str, float]]


@dataclass
class TaskResult:
    """An evaluation.

    Attributes:
        metrics: numbers by group, such as `{"accuracy": {"all": 81.2}}`.
        sizes: what was counted, such as `{"samples": 500}`.
        problems: why samples were skipped, each naming its file and row.
        predictions: the model's output for each sample, as JSON has it; empty for tasks without one.
    """

    metrics: Metrics
    sizes: dict[str, int]
    problems: list[str]
    predictions: list[dict[str, Any]]


@contextmanager
def evaluating(model: Tercet) -> Iterator[torch.device]:
    """The model in evaluation mode and without gradients; gives its device, and puts its mode back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model.temperature.device
    finally:
        model.train(training)


def gather_batches(results: Iterable[Value]) -> list[Value]:
    """Results of the batches that were dealt to the ranks in turn, in the order of the batches, on every rank.

    Args:
        results: of this rank's batches.

    Raises:
        TercetError: computing a result failed on any rank; of several errors the one of the first batch.
    """
    own: list[Value | TercetError] = []
    try:
        for result in results:
            own.append(result)
    except TercetError as error:
        own.append(error)
    gathered: list[Value] = []
    for each in Ranks().gather_interleaved(own):
        if isinstance(each, TercetError):
            raise each
        gathered.append(each)
    return gathered


def map_over_ranks(compute: Callable[[Sequence[Any]], Value], items: Sequence[Any], batch_size: int) -> list[Value]:
    """`compute` of batches of `items`, each on one rank; the results of all of them, in order, on every rank."""
    ranks = Ranks()
    starts = range(0, len(items), batch_size)[ranks.rank :: ranks.world]
    return gather_batches(compute(items[start : start + batch_size]) for start in starts)


@dataclass
class Outputs(Generic[Value]):
    """What a model gave for every sample that could be read.

    Attributes:
        values: one for each sample.
        targets: of the samples, as their source has them.
        keys: names of the samples.
        problems: why others were skipped.
    """

    values: list[Value]
    targets: list[Any]
    keys: list[str]
    problems: list[str]


def evaluate_samples(
    model: Tercet,
    source: SampleTable,
    config: Config,
    data: DataConfig,
    compute: Callable[[Batch], Sequence[Value]],
    clean: Callable[[str, int], str] = clean_caption,
) -> Outputs[Value]:
    """Run a model over the samples of a source, each batch on one rank.

    Args:
        model: in evaluation mode, with its tokenizer.
        source: the samples; those whose image is broken are skipped.
        config: `evaluate` is read.
        data: how texts are cut.
        compute: gives one plain value for each sample of a batch.
        clean: cleans a text and cuts it to a number of words.

    Raises:
        TercetError: no sample can be read, or the model has no tokenizer.
    """
    size, limit = config.evaluate.batch_size, config.evaluate.limit
    image_size = model.config.vision.image_size
    batches = sample_batches(source, require_tokenizer(model), data, image_size, size, limit, clean, Ranks())
    found: Outputs[Value] = Outputs([], [], [], list(source.rejected))
    parts = gather_batches(
        (compute(batch) if len(batch) else [], batch.targets, batch.keys, batch.skipped) for batch in batches
    )
    for values, targets, keys, problems in parts:
        found.values += values
        found.targets += targets
        found.keys += keys
        found.problems += problems
    require_some(found.keys, source.sample_count, "samples", found.problems)
    return found


def require_some(read: Sequence[Any], count: int, what: str, problems: Sequence[str]) -> None:
    """Refuse an evaluation of nothing.

    Raises:
        TercetError: nothing was read; gives the first reason.
    """
    if not read:
        raise TercetError(f"none of {count} {what} can be read" + (f"; the first: {problems[0]}" if problems else ""))


def within_positions(data: DataConfig, model: Tercet) -> DataConfig:
    """`data`, with texts cut to the positions that `model` has."""
    return data.model_copy(update={"max_tokens": min(data.max_tokens, model.config.text.max_positions)})
