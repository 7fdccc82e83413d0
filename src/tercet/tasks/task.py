"""What a task is, and the tasks by name."""

from __future__ import annotations

import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tercet.config import Config, DataConfig, HeadName, ObjectivesConfig
from tercet.data.loader import TrainLoader, cleaned_captions
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer, clean_caption
from tercet.device import autocast, resolve_precision
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.objectives.state import Teacher
from tercet.tasks.evaluation import TaskResult, evaluating

# The module of `tercet.tasks` that defines each task, imported when the task is asked for.
MODULES = {
    "pretrain": "retrieval",
    "retrieval": "retrieval",
    "vqa": "vqa",
    "entailment": "classification",
    "nlvr_pretrain": "classification",
    "nlvr": "classification",
    "grounding": "grounding",
    "classify": "zero_shot",
    "embedding": "zero_shot",
    "probes": "probes",
}
# Word pieces hardly change with more texts of a further task than these.
MAX_FURTHER_TEXTS = 20_000


@dataclass
class TaskOutput:
    """What `Task.forward` gives.

    Attributes:
        losses: `{name: loss}`, `[]` each; a name that is no objective of pre-training counts with weight 1.
    """

    losses: dict[str, Tensor]


class Task(nn.Module, ABC):
    """A model in training: the student, whatever follows it, and the losses of a batch.

    A step is `begin_step`; for each of its batches `prepare` and `forward`; and, with the gradients at hand, `enqueue`.
    Parameters that no loss of the task reaches take no gradient.

    Attributes:
        student: the model that learns.
    """

    student: Tercet

    @property
    @abstractmethod
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses of a step."""

    @abstractmethod
    def prepare(self, batch: Any, device: torch.device, seed: int) -> Any:
        """The host's part of a step: `batch` of the task's loader, on `device`; random choices follow from `seed`.

        The result has a `layout` (`tercet.distributed.RankLayout`), the layout of the batch over the ranks.
        """

    def begin_step(self) -> None:
        """What comes once before the batches of a step, such as moving the teacher."""

    @abstractmethod
    def forward(self, prepared: Any, alpha: float, /) -> TaskOutput:
        """Losses of what `prepare` gave; `alpha` is the weight of the teacher's soft targets now."""

    def is_sound(self, output: Any, /) -> Tensor:
        """Bool `[]`, whether what `forward` computed on this rank is finite, whatever it gathered from others."""
        return torch.stack([loss.detach().isfinite() for loss in output.losses.values()]).all()

    def enqueue(self, prepared: Any, output: Any, taken: Tensor | None = None, /) -> None:
        """Keep what later steps read, such as features for the queue.

        Args:
            prepared: the input of `forward`.
            output: its result.
            taken: bool `[]`, on the device; nothing is kept where it is false.  None is true.
        """


class FineTuning(Task):
    """Trains parts of a student by one loss, softened by a teacher that follows it and sees the same images."""

    def __init__(
        self,
        student: Tercet,
        config: ObjectivesConfig,
        loss_name: str,
        parts: Collection[str],
        teach: bool = True,
        fresh_teacher: bool = False,
    ) -> None:
        """Make the teacher and freeze what is not trained, so that no optimizer waits for its gradients.

        Args:
            student: the model to train.
            config: `teacher`, `momentum` and `alpha` are read.
            loss_name: name of the loss.
            parts: of the student, which the loss needs; the others are frozen.
            teach: whether the loss reads a teacher at all.
            fresh_teacher: start the teacher from new random weights instead of the student's.
        """
        super().__init__()
        self.student = student
        self.loss_name = loss_name
        self.momentum = config.momentum
        self.teacher: Teacher | None = None
        if teach and config.teacher and config.alpha > 0:
            self.teacher = Teacher(Tercet(student.config) if fresh_teacher else student, parts=parts)
        for name, part in student.named_children():
            if name not in parts:
                part.requires_grad_(False)
        student.temperature.requires_grad_(False)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The one loss."""
        return (self.loss_name,)

    def begin_step(self) -> None:
        """Move the teacher towards the student."""
        if self.teacher is not None:
            self.teacher.update(self.student, self.momentum)

    @torch.no_grad()
    def teacher_logits(self, logits: Callable[[Tercet, Any], Tensor], batch: Any, alpha: float) -> Tensor | None:
        """`logits(teacher, batch)` where a teacher has a weight."""
        return None if self.teacher is None or alpha == 0 else logits(self.teacher.model, batch)


def sample_texts(source: SampleTable, data: DataConfig) -> Iterator[str]:
    """The cleaned texts of all samples, for training a tokenizer."""
    for index in range(source.sample_count):
        yield clean_caption(source.sample(index).text, data.max_words)


@dataclass(frozen=True)
class TaskSpec:
    """How a task opens its data, trains and evaluates.

    Attributes:
        open: opens data: (specifications, data config, split).
        evaluate: measures a model, in evaluation mode and without gradients, on the result of `open`.
        selection_metrics: metrics as `group.name`; the first that an evaluation has decides which model is better
            (higher is better).
        build: makes the task that trains a student; None for what is only measured.
        heads: optional parts of the model that the task needs.
        samples: whether `open` gives samples; else images with captions.
        second_views: whether training on images with captions reads a second view of each where there is a teacher.
        clean: cleans a sample's text and cuts it to a number of words.
        texts: the texts of a source of samples that a new tokenizer is trained on.
        prepare_student: gives a student something of its training data, such as the answers that occur in it; returns
            messages for the user.
    """

    open: Callable[[Sequence[str], DataConfig, str], Any]
    evaluate: Callable[[Tercet, Any, Config], TaskResult]
    selection_metrics: tuple[str, ...] = ()
    build: Callable[[Config, Tercet], Task] | None = None
    heads: tuple[HeadName, ...] = ()
    samples: bool = True
    second_views: bool = True
    clean: Callable[[str, int], str] = clean_caption
    texts: Callable[[Any, DataConfig], Iterator[str]] = sample_texts
    prepare_student: Callable[[Tercet, Any, Config], list[str]] | None = None


def get_task(name: str) -> TaskSpec:
    """The task of a name.

    Raises:
        TercetError: there is no such task.
    """
    if name not in MODULES:
        raise TercetError(f"no task {name!r}; the tasks are {', '.join(MODULES)}")
    return importlib.import_module(f"tercet.tasks.{MODULES[name]}").TASKS[name]


def open_data(task: str, specs: Sequence[str], data: DataConfig, split: str) -> Any:
    """What the specifications name, as `task` reads it.

    Raises:
        TercetError: a file is missing or wrong; names file and row.
    """
    return get_task(task).open(specs, data, split)


def build_task(config: Config, student: Tercet) -> Task:
    """The task that `config.task` names, over a student that has its heads.

    Raises:
        TercetError: nothing is trained by that name.
    """
    build = get_task(config.task).build
    if build is None:
        raise TercetError(f"{config.task} is measured, not trained; see tercet evaluate --task {config.task}")
    return build(config, student)


def build_loader(config: Config, source: Any, tokenizer: Tokenizer, image_size: int) -> TrainLoader:
    """Training batches of `source`, this rank's part of each."""
    spec, train, ranks = get_task(config.task), config.train, Ranks()
    return TrainLoader(
        source,
        tokenizer,
        config.data,
        image_size,
        train.batch_size,
        train.seed,
        config.compat,
        ranks.rank,
        ranks.world,
        views=2 if spec.second_views and config.objectives.teacher else 1,
        as_pairs=not spec.samples,
        clean=spec.clean,
    )


def tokenizer_texts(task: str, source: Any, data: DataConfig) -> Iterator[str]:
    """The cleaned texts that a new tokenizer for `task` is trained on."""
    spec = get_task(task)
    return spec.texts(source, data) if spec.samples else cleaned_captions(source, data.max_words)


def further_texts(data: DataConfig) -> Iterator[str]:
    """The cleaned texts that `data.tokenizer_texts` names, the first `MAX_FURTHER_TEXTS` of each entry.

    Raises:
        TercetError: an entry is not TASK=SOURCE, nothing is trained by that name, or the source is missing or wrong.
    """
    for entry in data.tokenizer_texts:
        task, given, spec = entry.partition("=")
        if not given or task not in MODULES or get_task(task).build is None:
            raise TercetError(
                f"data.tokenizer_texts: {entry!r} is not TASK=SOURCE, such as vqa=questions.json; "
                f"the tasks are {', '.join(name for name in MODULES if get_task(name).build)}"
            )
        texts = tokenizer_texts(task, open_data(task, [spec], data, "train"), data)
        yield from itertools.islice(texts, MAX_FURTHER_TEXTS)


def evaluate_task(task: str, model: Tercet, source: Any, config: Config) -> TaskResult:
    """Measure `model` on what `open_data` gave for `task`; the model's mode is kept.

    Raises:
        TercetError: the model lacks a head of the task or its tokenizer, or no sample can be read.
    """
    spec = get_task(task)
    model.require_heads(spec.heads, task)
    with evaluating(model) as device, autocast(device, resolve_precision(device, config.evaluate.precision)):
        return spec.evaluate(model, source, config)
