"""Tasks that choose one of a few classes for a text and its images.

* entailment: does a picture entail a sentence, contradict it, or leave it open (arXiv 1901.06706);
* nlvr: is a statement about two pictures true (arXiv 1811.00491);
* nlvr_pretrain: which of two images a text belongs to, or neither (arXiv 2107.07651, section 5), which prepares a model
  for statements about two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config, HeadName, ObjectivesConfig
from tercet.data.batch import Batch, HostBatch, ImageBatch, to_device
from tercet.data.class_readers import LABELS, open_entailments, open_statements
from tercet.data.loader import image_batches, tokenize
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable
from tercet.data.tokenizer import clean_caption
from tercet.distributed import RankLayout, Ranks, rank_layout
from tercet.errors import TercetError
from tercet.model.heads import fused_class
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttentionKV, class_rows
from tercet.objectives.contrast import same_image
from tercet.objectives.loss import distilled_cross_entropy
from tercet.objectives.matching import IGNORED, Assignment, assignment_loss, sample_assignment
from tercet.tasks.evaluation import Metrics, TaskResult, evaluate_samples, gather_batches, within_positions
from tercet.tasks.task import FineTuning, TaskOutput, TaskSpec

EVALUATION_SEED = 0


@dataclass
class ClassBatch(HostBatch):
    """Samples on the device.

    Attributes:
        images: `[images, 3, height, width]`.
        image_rows: `[batch, images_per_sample]` or None, as in `Batch`.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        labels: `[batch]`.
        layout: layout of the whole batch over the ranks; None: all of it is here.
    """

    images: Tensor
    image_rows: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    layout: RankLayout | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> ClassBatch:
        """The tensors of `batch` on `device`, with the labels of its targets."""
        labels = torch.tensor([target["label"] for target in batch.targets], dtype=torch.int64)
        own = cls(batch.images, batch.image_rows, batch.input_ids, batch.attention_mask, labels)
        return to_device(own, device)


@dataclass(frozen=True)
class ClassHead:
    """A head that chooses one of a few classes for a text and its images.

    Attributes:
        name: of the head and of its loss.
        parts: of the model that the logits need.
        logits: gives `[batch, classes]`.
        classes: their names.
        id_key: the key of a sample's official id in predictions.
        metrics: of chosen classes and the targets of their samples.
    """

    name: HeadName
    parts: tuple[str, ...]
    logits: Callable[[Tercet, ClassBatch], Tensor]
    classes: tuple[str, ...]
    id_key: str
    metrics: Callable[[Sequence[int], Sequence[dict[str, Any]]], Metrics]


@dataclass
class ClassOutput(TaskOutput):
    """What a step gives.

    Attributes:
        logits: `[batch, classes]`.
        teacher_logits: `[batch, classes]`; None where nothing reads them.
    """

    logits: Tensor
    teacher_logits: Tensor | None


class ClassificationTask(FineTuning):
    """Fine-tuning of a class head on the fused `[CLS]`, with everything below it."""

    def __init__(self, student: Tercet, head: ClassHead, config: ObjectivesConfig, fresh_teacher: bool = False) -> None:
        """Train `student`, which has `head`; see `FineTuning`."""
        super().__init__(student, config, head.name, head.parts, fresh_teacher=fresh_teacher)
        self.head = head

    def prepare(self, batch: Batch, device: torch.device, seed: int) -> ClassBatch:
        """Send a batch to `device`; nothing is random."""
        return replace(ClassBatch.of(batch, device), layout=rank_layout(len(batch)))

    def forward(self, batch: ClassBatch, alpha: float, /) -> ClassOutput:
        """The loss of a batch; `alpha` is the teacher's weight in the targets now."""
        logits = self.head.logits(self.student, batch)
        teacher_logits = self.teacher_logits(self.head.logits, batch, alpha)
        count = None if batch.layout is None else batch.layout.mean
        loss = distilled_cross_entropy(logits, batch.labels, teacher_logits, alpha, count)
        return ClassOutput({self.loss_name: loss}, logits, teacher_logits)


def entailment_logits(model: Tercet, batch: ClassBatch) -> Tensor:
    """Logits `[batch, 3]` of each sentence and its image, in the order of `LABELS`."""
    assert model.entailment_head is not None
    kv = select_images(model.project_kv(model.encode_image(batch.images)), batch.image_rows, 0, 1)
    text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
    fused = model.fuse(text_embeds, batch.attention_mask, kv, class_rows(text_embeds))
    return model.entailment_head(fused[:, 0])


def nlvr_logits(model: Tercet, batch: ClassBatch) -> Tensor:
    """Logits `[batch, 2]`, class 1 true, of each sentence and its two images."""
    assert model.nlvr_head is not None
    kv = model.project_kv(model.encode_image(batch.images))
    first, second = (select_images(kv, batch.image_rows, slot, 2) for slot in (0, 1))
    text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
    return model.nlvr_head(fused_class(model, text_embeds, batch.attention_mask, first, second))


def select_images(
    kv: CrossAttentionKV, image_rows: Tensor | None, slot: int, images_per_sample: int
) -> CrossAttentionKV:
    """Keys and values of one image of each sample.

    Args:
        kv: of the images of a batch.
        image_rows: `[batch, images_per_sample]` or None, as in `Batch`.
        slot: which of a sample's images.
        images_per_sample: how many a sample has.
    """
    if image_rows is not None:
        return kv.select(image_rows[:, slot])
    if images_per_sample == 1:
        return kv
    device = kv.keys_values[0][0].device
    return kv.select(torch.arange(slot, len(kv), images_per_sample, device=device))


def accuracies(chosen: Sequence[int], targets: Sequence[dict[str, Any]], classes: tuple[str, ...]) -> dict[str, float]:
    """`accuracy` in percent over all samples, and `accuracy_NAME` over those of each class."""
    right: dict[str, list[bool]] = defaultdict(list)
    for label, target in zip(chosen, targets, strict=True):
        for name in ("accuracy", f"accuracy_{classes[target['label']].lower()}"):
            right[name].append(label == target["label"])
    return {name: 100.0 * sum(found) / len(found) for name, found in right.items()}


def entailment_metrics(chosen: Sequence[int], targets: Sequence[dict[str, Any]]) -> Metrics:
    """Accuracy in percent, and the confusion matrix in samples: `RIGHT_as_CHOSEN`."""
    confusion = {f"{right}_as_{label}": 0.0 for right in LABELS for label in LABELS}
    for label, target in zip(chosen, targets, strict=True):
        confusion[f"{LABELS[target['label']]}_as_{LABELS[label]}"] += 1
    return {"entailment": accuracies(chosen, targets, LABELS), "confusion": confusion}


def nlvr_metrics(chosen: Sequence[int], targets: Sequence[dict[str, Any]]) -> Metrics:
    """Accuracy, and consistency: the percentage of sentences that were judged right for all of their pairs."""
    by_sentence: dict[str, list[bool]] = defaultdict(list)
    for label, target in zip(chosen, targets, strict=True):
        by_sentence[target["group"]].append(label == target["label"])
    consistency = 100.0 * sum(map(all, by_sentence.values())) / len(by_sentence)
    return {"nlvr": accuracies(chosen, targets, NLVR.classes) | {"consistency": consistency}}


def evaluate_classes(head: ClassHead, model: Tercet, source: SampleTable, config: Config) -> TaskResult:
    """Choose a class for every sample of `source`.

    Raises:
        TercetError: no sample can be read, or the model has no tokenizer.
    """

    def probabilities(batch: Batch) -> list[list[float]]:
        return head.logits(model, ClassBatch.of(batch, model.temperature.device)).softmax(dim=1).tolist()

    found = evaluate_samples(model, source, config, within_positions(config.data, model), probabilities)
    chosen = [row.index(max(row)) for row in found.values]
    sizes = {"samples": len(chosen)}
    if "group" in found.targets[0]:
        sizes["sentences"] = len({target["group"] for target in found.targets})
    predictions = [
        {
            "sample": key,
            head.id_key: target["id"],
            "label": head.classes[label],
            "gold": head.classes[target["label"]],
            "probabilities": dict(zip(head.classes, row, strict=True)),
        }
        for key, target, label, row in zip(found.keys, found.targets, chosen, found.values, strict=True)
    ]
    return TaskResult(head.metrics(chosen, found.targets), sizes, found.problems, predictions)


@dataclass
class AssignmentBatch(HostBatch):
    """Pairs on the device.

    Attributes:
        images: `[batch, 3, height, width]`.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        image_ids: `[batch]`, the same for all captions of one image; None: every pair has an image of its own.
        layout: layout of the whole batch over the ranks; None: all of it is here.
        count: texts with another image in the batch of their rank, on a rank on average; None: those that are here.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor | None
    layout: RankLayout | None = None
    count: float | None = None


@dataclass
class AssignmentOutput(TaskOutput):
    """What a step gives.

    Attributes:
        logits: `[batch, 3]`.
        assignment: the images that were drawn.
    """

    logits: Tensor
    assignment: Assignment


class TextAssignment(FineTuning):
    """Which of two images of the batch belongs to a text, or neither.  There is no teacher."""

    def __init__(self, student: Tercet, config: ObjectivesConfig, match_ids: bool = True) -> None:
        """Train `student`, which has the head `assignment`.

        Args:
            student: the model to train.
            config: not read by this task, which has no teacher.
            match_ids: an image is never a negative of another caption of its own; the published step tells images
                apart by row of the batch alone.
        """
        parts = ("vision", "text", "fusion", "second_fusion", "assignment_head")
        super().__init__(student, config, "assignment", parts, teach=False)
        self.match_ids = match_ids

    def prepare(self, batch: Batch, device: torch.device, seed: int) -> AssignmentBatch:
        """Send a batch to `device`; what is drawn follows from features, so it is drawn there."""
        ids = batch.image_ids if self.match_ids else None
        others = ~same_image(ids, len(batch), batch.image_ids.device).all(dim=1)
        count = rank_layout(int(others.sum())).mean or 1.0
        layout = rank_layout(len(batch))
        own = AssignmentBatch(batch.images, batch.input_ids, batch.attention_mask, ids, layout, count)
        return to_device(own, device)

    def forward(
        self, batch: AssignmentBatch, alpha: float, /, assignment: Assignment | None = None
    ) -> AssignmentOutput:
        """The loss of a batch, 0 where no text has another image.

        Args:
            batch: the pairs.
            alpha: not read; there is no teacher.
            assignment: images already drawn; None draws them.
        """
        logits, assignment = assign_texts(self.student, batch, assignment)
        loss = assignment_loss(logits, assignment.labels, batch.count)
        return AssignmentOutput({self.loss_name: loss}, logits, assignment)


def assign_texts(
    model: Tercet, batch: AssignmentBatch, assignment: Assignment | None = None
) -> tuple[Tensor, Assignment]:
    """Logits `[batch, 3]` of which slot holds a text's own image, and the images that were drawn for the slots."""
    assert model.assignment_head is not None
    image_embeds = model.encode_image(batch.images)
    if assignment is None:
        with torch.no_grad():
            image_feats = model.project_image(image_embeds[:, 0])
        same = same_image(batch.image_ids, len(image_feats), image_feats.device)
        assignment = sample_assignment(image_feats, same)
    kv = model.project_kv(image_embeds)
    text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
    first, second = kv.select(assignment.first), kv.select(assignment.second)
    fused = fused_class(model, text_embeds, batch.attention_mask, first, second)
    return model.assignment_head(fused), assignment


def evaluate_assignment(model: Tercet, source: SampleTable, config: Config) -> TaskResult:
    """Percentage of the texts (the first caption of each image) that a model assigns rightly within batches.

    Raises:
        TercetError: no two images can be read, or the model has no tokenizer.
    """
    tokenizer, data = require_tokenizer(model), within_positions(config.data, model)
    ranks, device, ids = Ranks(), model.temperature.device, torch.from_numpy(source.image_ids)
    size, limit = config.evaluate.batch_size, config.evaluate.limit

    def count(number: int, batch: ImageBatch) -> tuple[int, int, list[str]]:
        """How many texts of a batch were assigned rightly, and how many there were."""
        if not len(batch):
            return 0, 0, batch.skipped
        torch.manual_seed(EVALUATION_SEED + ranks.rank + number * ranks.world)  # what is drawn follows from the batch
        texts = [clean_caption(source.captions(index)[0], data.max_words) for index in batch.indices.tolist()]
        input_ids, mask = (part.to(device) for part in tokenize(tokenizer, texts, data.max_tokens))
        pairs = AssignmentBatch(batch.images.to(device), input_ids, mask, ids[batch.indices].to(device))
        logits, assignment = assign_texts(model, pairs)
        labels = assignment.labels
        return int((logits.argmax(dim=1) == labels).sum()), int((labels != IGNORED).sum()), batch.skipped

    with torch.random.fork_rng():
        batches = image_batches(source, data, model.config.vision.image_size, size, limit, ranks=ranks)
        parts = gather_batches(count(number, batch) for number, batch in enumerate(batches))
    right, total = sum(part[0] for part in parts), sum(part[1] for part in parts)
    problems = [problem for part in parts for problem in part[2]]
    if total == 0:
        why = f"; the first problem: {problems[0]}" if problems else ""
        raise TercetError(f"text assignment needs two different images that can be read{why}")
    # No predictions: which images a text is tried with depends on its batch.
    return TaskResult({"assignment": {"accuracy": 100.0 * right / total}}, {"samples": total}, problems, [])


_BODY = ("vision", "text", "fusion")
ENTAILMENT = ClassHead("entailment", (*_BODY, "entailment_head"), entailment_logits, LABELS, "id", entailment_metrics)
NLVR = ClassHead(
    "nlvr", (*_BODY, "second_fusion", "nlvr_head"), nlvr_logits, ("False", "True"), "identifier", nlvr_metrics
)


def _build_nlvr(config: Config, student: Tercet) -> ClassificationTask:
    # The published code copies the teacher before it loads the checkpoint, so that the teacher starts from new weights
    # and takes several hundred steps to come near the student.
    fresh_teacher = config.compat == "published" and config.init is not None
    return ClassificationTask(student, NLVR, config.objectives, fresh_teacher)


TASKS = {
    "entailment": TaskSpec(
        open=open_entailments,
        evaluate=partial(evaluate_classes, ENTAILMENT),
        build=lambda config, student: ClassificationTask(student, ENTAILMENT, config.objectives),
        selection_metrics=("entailment.accuracy",),
        heads=("entailment",),
    ),
    "nlvr": TaskSpec(
        open=open_statements,
        evaluate=partial(evaluate_classes, NLVR),
        build=_build_nlvr,
        selection_metrics=("nlvr.accuracy",),
        heads=("nlvr",),
    ),
    "nlvr_pretrain": TaskSpec(
        open=open_sources,
        evaluate=evaluate_assignment,
        build=lambda config, student: TextAssignment(student, config.objectives, config.compat != "published"),
        selection_metrics=("assignment.accuracy",),
        heads=("assignment",),
        samples=False,
        second_views=False,
    ),
}
