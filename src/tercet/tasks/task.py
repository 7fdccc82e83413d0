"""What every task is to the training loop, and what an evaluation gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tercet.config import Config, DataConfig, HeadName
from tercet.data.batches import SkipReport
from tercet.data.samples import SampleSource
from tercet.data.sources import Source
from tercet.data.tokenizer import clean_caption
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttentionKV


class TaskOutput(Protocol):
    """What `forward` gives: at least the losses; what else the task's own `enqueue` reads is its business."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """`{name: loss}`, `[]` each; a name that is no objective of pre-training counts with weight 1."""
        ...


class Task(nn.Module, ABC):
    """A model in training: the student, whatever follows it, and the losses of a batch.

    A step is `begin_step`; for each of its batches `prepare` and `forward`; and, with the gradients at hand,
    `enqueue`.  Parameters that no loss of the task reaches take no gradient.

    Attributes:
        student: the model that learns.
    """

    student: Tercet

    @property
    @abstractmethod
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses that a step gives."""

    @abstractmethod
    def prepare(self, batch: Any, device: torch.device, seed: int) -> Any:
        """The host's part of a step: `batch` of the task's loader, on `device`; random choices follow from `seed`.

        What it gives has a `spread`: the `tercet.distributed.RankLayout` of the batch.
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
            prepared: what `forward` had.
            output: what it gave.
            taken: bool `[]`, on the device; nothing is kept where it is false.  None is true.
        """


class TaskResult(Protocol):
    """An evaluation."""

    def metrics(self) -> dict[str, dict[str, float]]:
        """Numbers by group, such as `{"accuracy": {"all": 81.2}}`."""
        ...

    @property
    def sizes(self) -> dict[str, int]:
        """What was counted, such as `{"samples": 500}`."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """Why samples were left out, each naming its file and row."""
        ...

    def predictions(self) -> list[dict[str, Any]]:
        """What the model said of each sample, as JSON has it; empty for tasks that say nothing of single samples."""
        ...


class StepBatch(Protocol):
    """What the loop reads of a batch."""

    keys: list[str]
    skipped: int

    def __len__(self) -> int: ...


class Loader(Protocol):
    """Training batches by epoch and step."""

    report: SkipReport

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch."""
        ...

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Any]:
        """The batches of `epoch` from `first_step` on."""
        ...

    def close(self) -> None:
        """End what makes the batches."""
        ...


TaskData = Source | SampleSource
Words = Callable[[Any, DataConfig], Iterator[str]]


def sample_words(source: SampleSource, data: DataConfig) -> Iterator[str]:
    """The cleaned texts of all samples: what a tokenizer is trained on."""
    for index in range(source.sample_count):
        yield clean_caption(source.sample(index).text, data.max_words)


@dataclass(frozen=True)
class TaskKind:
    """A task as `tercet.tasks.build` knows it.

    Attributes:
        open: opens data: (specifications, data config, split).
        evaluate: measures a model, in evaluation mode or not, on what `open` gave.
        judged_by: the numbers of an evaluation, as `group.metric`, the first of which that is there tells the better
            of two models; more is better.
        build: makes the task that trains a student; None for what is measured alone.
        heads: optional parts of the model that the task needs.
        samples: whether `open` gives samples; else images with captions.
        second_views: whether its training, on images with captions, reads a second view of each where there is a
            teacher to see it.
        clean: cleans a sample's text and cuts it to a number of words.
        words: the texts of a source of samples that a new tokenizer is trained on.
        adopt: lets a student keep something of its training data, such as the answers that occur in it; gives what
            the user should know.
    """

    open: Callable[[Sequence[str], DataConfig, str], Any]
    evaluate: Callable[[Tercet, Any, Config], TaskResult]
    build: Callable[[Config, Tercet], Task] | None = None
    judged_by: tuple[str, ...] = ()
    heads: tuple[HeadName, ...] = ()
    samples: bool = True
    second_views: bool = True
    clean: Callable[[str, int], str] = clean_caption
    words: Words = sample_words
    adopt: Callable[[Tercet, Any, Config], list[str]] | None = None


def within_positions(data: DataConfig, model: Tercet) -> DataConfig:
    """`data`, with texts cut to the positions that `model` has."""
    return data.model_copy(update={"max_tokens": min(data.max_tokens, model.config.text.max_positions)})


def memory_of(
    memory: CrossAttentionKV, image_rows: Tensor | None, place: int, images_per_sample: int
) -> CrossAttentionKV:
    """The memory of the image at `place` of each sample.

    Args:
        memory: of the images of a `SampleBatch`.
        image_rows: `[batch, images_per_sample]`, as in `SampleBatch`.
        place: which of a sample's images.
        images_per_sample: how many a sample has.
    """
    if image_rows is not None:
        return memory.select(image_rows[:, place])
    if images_per_sample == 1:
        return memory
    device = memory.keys_values[0][0].device
    return memory.select(torch.arange(place, len(memory), images_per_sample, device=device))
