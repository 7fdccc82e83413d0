"""Text-assignment pre-training: image-text pairs prepare a model for statements about two images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config
from tercet.data.batches import Batch
from tercet.data.loader import encode_captions, image_batches
from tercet.data.sources import Source, image_ids, open_sources
from tercet.data.tokenizer import clean_caption
from tercet.distributed import RankLayout, Ranks, rank_layout
from tercet.errors import TercetError
from tercet.model.heads import fused_class
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.objectives.contrast import same_image
from tercet.objectives.matching import Assignment, assignment_loss, sample_assignment
from tercet.tasks.encoding import evaluating
from tercet.tasks.labelling import freeze_others
from tercet.tasks.task import Task, TaskKind, within_positions

PARTS = ("vision", "text", "fusion", "second_fusion", "assignment_head")
EVALUATION_SEED = 0


@dataclass
class AssignmentBatch:
    """Pairs on the device.

    Attributes:
        images: `[batch, 3, height, width]`.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        image_ids: `[batch]`, the same for all captions of one image.
        spread: how the whole batch is spread over the ranks; None: all of it is here.
        counted: texts with another image in the batch of their rank, on a rank on average; None: those that are here.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    spread: RankLayout | None = None
    counted: float | None = None


@dataclass
class AssignmentOutput:
    """What a step gives.

    Attributes:
        losses: the one loss, under `assignment`.
        logits: `[batch, 3]`.
        assignment: the images that were drawn.
    """

    losses: dict[str, Tensor]
    logits: Tensor
    assignment: Assignment


class TextAssignment(Task):
    """Which of two images of the batch belongs to a text, or neither.  There is no teacher."""

    def __init__(self, student: Tercet, match_ids: bool = True) -> None:
        """Train `student`, which has the head `assignment`.

        Args:
            student: the model to train.
            match_ids: an image never is a negative of another caption of its own; the published step tells apart by
                place in the batch alone.
        """
        super().__init__()
        self.student = student
        self.match_ids = match_ids
        freeze_others(student, PARTS)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The one loss."""
        return ("assignment",)

    def prepare(self, batch: Batch, device: torch.device, seed: int) -> AssignmentBatch:
        """Send a batch to `device`; what is drawn follows from features, so it is drawn there."""
        spread = rank_layout(len(batch))
        same = same_image(batch.image_ids if self.match_ids else None, len(batch), batch.image_ids.device)
        counted = rank_layout(int((~same.all(dim=1)).sum())).mean or 1.0
        batch = batch.to(device)
        return AssignmentBatch(batch.images, batch.input_ids, batch.attention_mask, batch.image_ids, spread, counted)

    def forward(
        self, batch: AssignmentBatch, alpha: float, /, assignment: Assignment | None = None
    ) -> AssignmentOutput:
        """The loss of a batch.

        Args:
            batch: the pairs.
            alpha: not read; there is no teacher.
            assignment: images already drawn; None draws them.
        """
        ids = batch.image_ids if self.match_ids else None
        logits, assignment = assignment_logits(self.student, batch, ids, assignment)
        loss = assignment_loss(logits, assignment.labels, batch.counted)
        return AssignmentOutput({"assignment": loss}, logits, assignment)


def assignment_logits(
    model: Tercet, batch: AssignmentBatch, ids: Tensor | None, assignment: Assignment | None = None
) -> tuple[Tensor, Assignment]:
    """Logits `[batch, 3]` of which slot holds a text's own image, and the images that were drawn for the slots."""
    assert model.assignment_head is not None
    image_embeds = model.encode_image(batch.images)
    if assignment is None:
        with torch.no_grad():
            image_feats = model.project_image(image_embeds[:, 0])
        assignment = sample_assignment(image_feats, same_image(ids, len(image_feats), image_feats.device))
    memory = model.project_kv(image_embeds)
    text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
    first, second = memory.select(assignment.first), memory.select(assignment.second)
    fused = fused_class(model, text_embeds, batch.attention_mask, first, second)
    return model.assignment_head(fused), assignment


@dataclass
class AssignmentResult:
    """An evaluation.

    Attributes:
        right: how many texts were assigned rightly.
        count: how many texts were asked for.
        problems: why images were left out.
    """

    right: int
    count: int
    problems: list[str]

    def metrics(self) -> dict[str, dict[str, float]]:
        """Accuracy in percent; a third is right by chance."""
        return {"assignment": {"accuracy": 100.0 * self.right / self.count}}

    @property
    def sizes(self) -> dict[str, int]:
        """How many texts were assigned."""
        return {"samples": self.count}

    def predictions(self) -> list[dict[str, Any]]:
        """Nothing: which images a text is tried with is drawn anew in every batch."""
        return []


def evaluate_assignment(model: Tercet, source: Source, config: Config) -> AssignmentResult:
    """Share of the texts (the first caption of each image) that a model assigns rightly within batches.

    Raises:
        TercetError: no two images can be read, or the model has no tokenizer.
    """
    result = AssignmentResult(0, 0, [])
    ranks = Ranks()
    with evaluating(model) as device, torch.random.fork_rng():
        for batch in _evaluation_batches(model, source, config, device, ranks, result.problems):
            logits, assignment = assignment_logits(model, batch, batch.image_ids)
            counted = assignment.labels >= 0
            result.right += int(((logits.argmax(dim=1) == assignment.labels) & counted).sum())
            result.count += int(counted.sum())
    result.right, result.count = ranks.sum(torch.tensor([result.right, result.count])).tolist()
    result.problems = [problem for part in ranks.gather(result.problems) for problem in part]
    if result.count == 0:
        why = f"; the first problem: {result.problems[0]}" if result.problems else ""
        raise TercetError(f"text assignment needs two different images that can be read{why}")
    return result


def _evaluation_batches(
    model: Tercet, source: Source, config: Config, device: torch.device, ranks: Ranks, problems: list[str]
) -> Iterator[AssignmentBatch]:
    """Batches of this rank; what is drawn in each follows from its number."""
    tokenizer, data = require_tokenizer(model), within_positions(config.data, model)
    ids = torch.from_numpy(image_ids(source))
    size, limit = config.evaluate.batch_size, config.evaluate.limit
    batches = image_batches(source, data, model.config.vision.image_size, size, limit, ranks=ranks)
    for number, batch in enumerate(batches):
        problems += batch.problems
        if not len(batch):
            continue
        torch.manual_seed(EVALUATION_SEED + ranks.rank + number * ranks.world)
        texts = [clean_caption(source.captions(index)[0], data.max_words) for index in batch.indices.tolist()]
        input_ids, mask = encode_captions(tokenizer, texts, data.max_tokens)
        yield AssignmentBatch(
            batch.images.to(device), input_ids.to(device), mask.to(device), ids[batch.indices].to(device)
        )


def _build(config: Config, student: Tercet) -> TextAssignment:
    return TextAssignment(student, match_ids=config.compat != "published")


ASSIGNMENT = TaskKind(
    open=open_sources,
    evaluate=evaluate_assignment,
    build=_build,
    judged_by=("assignment.accuracy",),
    heads=("assignment",),
    samples=False,
    second_views=False,
)
