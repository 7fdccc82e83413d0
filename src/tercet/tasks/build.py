"""The tasks by name: the only place that knows them all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tercet.config import Config, DataConfig
from tercet.data.class_folders import open_labelled
from tercet.data.grounding_files import open_expressions
from tercet.data.loader import TrainLoader, cleaned_captions
from tercet.data.sample_loader import SampleLoader
from tercet.data.sources import open_sources
from tercet.data.tokenizer import Tokenizer
from tercet.device import autocast, resolve_precision
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.assignment import ASSIGNMENT
from tercet.tasks.embedded import evaluate_classes, evaluate_embedding
from tercet.tasks.entailment import ENTAILMENT
from tercet.tasks.grounding import evaluate_grounding
from tercet.tasks.nlvr import NLVR
from tercet.tasks.pretrain import Pretraining
from tercet.tasks.probes import evaluate_probes, open_probes
from tercet.tasks.retrieval import evaluate_source
from tercet.tasks.task import Loader, Task, TaskKind, TaskResult
from tercet.tasks.vqa import VQA

# Word pieces hardly change with more: of a further task, so many texts, and so many scenes where they are drawn.
MOST_FURTHER_TEXTS, MOST_FURTHER_SCENES = 20_000, 1_000


def _build_pretraining(config: Config, student: Tercet) -> Task:
    published = config.compat == "published"
    # The published pre-training makes every pair its own only positive; its fine-tuning goes by image ids.
    match_ids = config.task != "pretrain" or not published
    return Pretraining(student, config.objectives, published, match_ids)


_PAIRS = TaskKind(
    open=open_sources,
    build=_build_pretraining,
    evaluate=evaluate_source,
    judged_by=("reranked.r_mean", "dual.r_mean"),
    samples=False,
)

KINDS: dict[str, TaskKind] = {
    "pretrain": _PAIRS,
    "retrieval": _PAIRS,
    "vqa": VQA,
    "entailment": ENTAILMENT,
    "nlvr_pretrain": ASSIGNMENT,
    "nlvr": NLVR,
    # Trained as retrieval is, with expressions for captions; boxes are for measuring alone.
    "grounding": TaskKind(
        open=open_expressions,
        build=_build_pretraining,
        evaluate=evaluate_grounding,
        judged_by=("boxes.all", "pointing.all"),
        samples=False,
    ),
    "classify": TaskKind(open=open_labelled, evaluate=evaluate_classes, samples=False),
    "embedding": TaskKind(open=open_sources, evaluate=evaluate_embedding, samples=False),
    "probes": TaskKind(open=open_probes, evaluate=evaluate_probes),
}


def kind_of(task: str) -> TaskKind:
    """What is known of a task.

    Raises:
        TercetError: there is no such task.
    """
    if task not in KINDS:
        raise TercetError(f"no task {task!r}; the tasks are {', '.join(KINDS)}")
    return KINDS[task]


def open_data(task: str, specs: Sequence[str], data: DataConfig, split: str) -> Any:
    """What the specifications name, as `task` reads it: a `Source` of pairs or a `SampleSource`.

    Raises:
        TercetError: a file is missing or wrong; names file and row.
    """
    return kind_of(task).open(specs, data, split)


def build_task(config: Config, student: Tercet) -> Task:
    """The task that `config.task` names, over a student that has its heads.

    Raises:
        TercetError: nothing is trained by that name.
    """
    build = kind_of(config.task).build
    if build is None:
        raise TercetError(f"{config.task} is measured, not trained; see tercet evaluate --task {config.task}")
    return build(config, student)


def build_loader(config: Config, source: Any, tokenizer: Tokenizer, image_size: int) -> Loader:
    """Training batches of `source`, this rank's share of each."""
    kind, train, ranks = kind_of(config.task), config.train, Ranks()
    if kind.samples:
        return SampleLoader(
            source,
            tokenizer,
            config.data,
            image_size,
            train.batch_size,
            train.seed,
            config.compat,
            ranks.rank,
            ranks.world,
            clean=kind.clean,
        )
    data = config.data
    return TrainLoader(
        source,
        tokenizer,
        data,
        image_size,
        train.batch_size,
        train.seed,
        config.compat,
        ranks.rank,
        ranks.world,
        views=2 if kind.second_views and config.objectives.teacher else 1,
    )


def words_of(task: str, source: Any, data: DataConfig) -> Iterator[str]:
    """The cleaned texts that a new tokenizer for `task` is trained on."""
    kind = kind_of(task)
    return kind.words(source, data) if kind.samples else cleaned_captions(source, data.max_words)


def further_texts(data: DataConfig) -> Iterator[str]:
    """The cleaned texts that `data.tokenizer_texts` names, the first `MOST_FURTHER_TEXTS` of each entry.

    Raises:
        TercetError: an entry is not TASK=SOURCE, nothing is trained by that name, or the source is missing or wrong.
    """
    trained = [task for task, kind in KINDS.items() if kind.build is not None]
    data = data.model_copy(update={"scenes": min(data.scenes, MOST_FURTHER_SCENES)})
    for entry in data.tokenizer_texts:
        task, given, spec = entry.partition("=")
        if not given or task not in trained:
            raise TercetError(
                f"data.tokenizer_texts: {entry!r} is not TASK=SOURCE, such as vqa=questions.json; "
                f"the tasks are {', '.join(trained)}"
            )
        yield from itertools.islice(words_of(task, open_data(task, [spec], data, "train"), data), MOST_FURTHER_TEXTS)


def evaluate_task(task: str, model: Tercet, source: Any, config: Config) -> TaskResult:
    """Measure `model` on what `open_data` gave for `task`.

    Raises:
        TercetError: the model lacks a head of the task or its tokenizer, or no image can be read.
    """
    kind = kind_of(task)
    model.require_heads(kind.heads, task)
    device = next(model.parameters()).device
    with autocast(device, resolve_precision(device, config.evaluate.precision)):
        return kind.evaluate(model, source, config)
