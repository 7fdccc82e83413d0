"""Tasks that choose one of a few labels for a text and its images: what entailment and statements about pairs share."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config, ObjectivesConfig
from tercet.data.batches import SampleBatch
from tercet.data.sample_loader import sample_batches
from tercet.data.samples import SampleSource
from tercet.distributed import RankLayout, Ranks, rank_layout
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.objectives.loss import distilled_cross_entropy
from tercet.objectives.state import Teacher
from tercet.tasks.encoding import evaluating
from tercet.tasks.task import Task, within_positions


@dataclass
class LabelledBatch:
    """Samples on the device.

    Attributes:
        images: `[images, 3, height, width]`.
        image_rows: `[batch, images_per_sample]` or None, as in `SampleBatch`.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        labels: `[batch]`.
        spread: how the whole batch is spread over the ranks; None: all of it is here.
    """

    images: Tensor
    image_rows: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    spread: RankLayout | None = None


@dataclass
class LabelledOutput:
    """What a step gives.

    Attributes:
        losses: the one loss under its name.
        logits: `[batch, classes]`.
        teacher_logits: `[batch, classes]`; None where nothing reads them.
    """

    losses: dict[str, Tensor]
    logits: Tensor
    teacher_logits: Tensor | None = None


class Labelling(Task):
    """A student that learns labels, softened by a teacher that follows it and sees the same images."""

    def __init__(
        self, student: Tercet, config: ObjectivesConfig, name: str, parts: Collection[str], fresh_teacher: bool = False
    ) -> None:
        """Train `parts` of a student.

        Args:
            student: the model to train.
            config: `teacher`, `momentum` and `alpha` are read.
            name: of the loss.
            parts: of the student, which the logits need; the others are frozen.
            fresh_teacher: start the teacher from new random weights instead of the student's.
        """
        super().__init__()
        self.student = student
        self.config = config
        self.name = name
        self.teacher: Teacher | None = None
        if config.teacher and config.alpha > 0:
            self.teacher = Teacher(Tercet(student.config) if fresh_teacher else student, parts=parts)
        freeze_others(student, parts)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The one loss."""
        return (self.name,)

    @abstractmethod
    def logits(self, model: Tercet, batch: LabelledBatch) -> Tensor:
        """Logits `[batch, classes]` of student or teacher."""

    def prepare(self, batch: SampleBatch, device: torch.device, seed: int) -> LabelledBatch:
        """Send a batch to `device`; nothing is drawn."""
        return dataclasses.replace(labelled(batch, device), spread=rank_layout(len(batch)))

    def begin_step(self) -> None:
        """Move the teacher towards the student, once before the batches of a step."""
        if self.teacher is not None:
            self.teacher.update(self.student, self.config.momentum)

    def forward(self, batch: LabelledBatch, alpha: float, /) -> LabelledOutput:
        """The loss of a batch; `alpha` is the teacher's share of the targets now."""
        logits = self.logits(self.student, batch)
        believed = None
        if self.teacher is not None and alpha > 0:
            with torch.no_grad():
                believed = self.logits(self.teacher.model, batch)
        with torch.autocast(logits.device.type, enabled=False):
            count = None if batch.spread is None else batch.spread.mean
            loss = distilled_cross_entropy(logits, batch.labels, believed, alpha, count)
        return LabelledOutput({self.name: loss}, logits, believed)


def labelled(batch: SampleBatch, device: torch.device) -> LabelledBatch:
    """The tensors of `batch` on `device`, with the labels of its targets."""
    labels = torch.tensor([target["label"] for target in batch.targets], dtype=torch.int64)
    batch = batch.to(device)
    return LabelledBatch(
        images=batch.images,
        image_rows=batch.image_rows,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=labels.to(device, non_blocking=True),
    )


def freeze_others(student: Tercet, parts: Collection[str]) -> None:
    """Let no part of `student` but `parts` take a gradient, so that no optimizer waits for it."""
    for name, part in student.named_children():
        if name not in parts:
            part.requires_grad_(False)
    if "temperature" not in parts:
        student.temperature.requires_grad_(False)


@dataclass
class Guesses:
    """What a model chose for every sample that could be read.

    Attributes:
        probabilities: `[samples, classes]`.
        labels: the right classes `[samples]`.
        targets: of the samples, as their source gave them.
        keys: names of the samples.
        problems: why others were left out.
    """

    probabilities: Tensor
    labels: Tensor
    targets: list[Any]
    keys: list[str]
    problems: list[str]

    @property
    def chosen(self) -> Tensor:
        """The likeliest class of each sample, `[samples]`."""
        return self.probabilities.argmax(dim=1)

    @property
    def right(self) -> Tensor:
        """Bool `[samples]`: whether that is the right one."""
        return self.chosen == self.labels


def guess_labels(
    model: Tercet, source: SampleSource, config: Config, logits: Callable[[Tercet, LabelledBatch], Tensor]
) -> Guesses:
    """Ask a model for the label of every sample of a source.

    Args:
        model: with its tokenizer; its mode is kept.
        source: the samples; those whose image is broken are left out.
        config: `data` and `evaluate` are read.
        logits: gives `[batch, classes]`.

    Raises:
        TercetError: no sample can be read, or the model has no tokenizer.
    """
    ranks = Ranks()
    own: list[tuple[Tensor, list[Any], list[str], list[str]]] = []
    guesses = Guesses(torch.empty(0), torch.empty(0, dtype=torch.int64), [], [], list(source.problems))
    with evaluating(model) as device:
        for batch in sample_batches(
            source,
            require_tokenizer(model),
            within_positions(config.data, model),
            model.config.vision.image_size,
            config.evaluate.batch_size,
            config.evaluate.limit,
            ranks=ranks,
        ):
            chances = torch.empty(0, 0)
            if len(batch):
                chances = logits(model, labelled(batch, device)).softmax(dim=1).cpu()
            own.append((chances, batch.targets, batch.keys, batch.problems))
    found = ranks.gather_interleaved(own)
    for _, targets, keys, problems in found:
        guesses.targets += targets
        guesses.keys += keys
        guesses.problems += problems
    if not guesses.keys:
        raise TercetError(f"none of {source.sample_count} samples can be read; the first: {guesses.problems[0]}")
    guesses.probabilities = torch.cat([chances for chances, _, keys, _ in found if keys])
    guesses.labels = torch.tensor([target["label"] for target in guesses.targets], dtype=torch.int64)
    return guesses
