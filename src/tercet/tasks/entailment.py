"""Visual entailment: does a picture entail a sentence, contradict it, or leave it open (arXiv 1901.06706)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tercet.config import Config, DataConfig, ObjectivesConfig
from tercet.data.entailment_files import LABELS, draw_entailments, read_entailments
from tercet.data.samples import SampleSource, open_samples
from tercet.model.tercet import Tercet
from tercet.model.text import class_rows
from tercet.tasks.labelling import Guesses, LabelledBatch, Labelling, guess_labels
from tercet.tasks.task import TaskKind, memory_of

PARTS = ("vision", "text", "fusion", "entailment_head")


class Entailment(Labelling):
    """Fine-tuning of the three-way head on the fused `[CLS]`, with everything below it."""

    def __init__(self, student: Tercet, config: ObjectivesConfig) -> None:
        """Train `student`, which has the head `entailment`; `config` says how the teacher follows."""
        super().__init__(student, config, "entailment", PARTS)

    def logits(self, model: Tercet, batch: LabelledBatch) -> Tensor:
        """Logits `[batch, 3]` in the order of `LABELS`."""
        return entailment_logits(model, batch)


def entailment_logits(model: Tercet, batch: LabelledBatch) -> Tensor:
    """Logits `[batch, 3]` of each sentence and its image."""
    assert model.entailment_head is not None
    memory = memory_of(model.project_kv(model.encode_image(batch.images)), batch.image_rows, 0, 1)
    text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
    fused = model.fuse(text_embeds, batch.attention_mask, memory, class_rows(text_embeds))
    return model.entailment_head(fused[:, 0])


@dataclass
class EntailmentResult:
    """An evaluation.

    Attributes:
        guesses: probabilities in the order of `LABELS`, and what was right.
    """

    guesses: Guesses

    @property
    def confusion(self) -> dict[str, dict[str, int]]:
        """For each right label, how often each label was chosen."""
        counts = {right: dict.fromkeys(LABELS, 0) for right in LABELS}
        for right, chosen in zip(self.guesses.labels.tolist(), self.guesses.chosen.tolist(), strict=True):
            counts[LABELS[right]][LABELS[chosen]] += 1
        return counts

    def metrics(self) -> dict[str, dict[str, float]]:
        """Accuracy in percent, over all and over the samples of each label, and the confusion matrix in samples."""
        right = self.guesses.right
        accuracy = {"accuracy": 100.0 * right.double().mean().item()}
        for index, label in enumerate(LABELS):
            own = right[self.guesses.labels == index]
            if len(own):
                accuracy[f"accuracy_{label}"] = 100.0 * own.double().mean().item()
        counts = {f"{a}_as_{b}": float(count) for a, row in self.confusion.items() for b, count in row.items()}
        return {"entailment": accuracy, "confusion": counts}

    @property
    def sizes(self) -> dict[str, int]:
        """How many sentences were judged."""
        return {"samples": len(self.guesses.keys)}

    @property
    def problems(self) -> list[str]:
        """Why samples were left out, each naming its file and row."""
        return self.guesses.problems

    def predictions(self) -> list[dict[str, Any]]:
        """The label of each sample and how sure the model is of each."""
        guesses = self.guesses
        return [
            {
                "sample": key,
                "id": target["id"],
                "label": LABELS[chosen],
                "gold": LABELS[target["label"]],
                "probabilities": dict(zip(LABELS, row, strict=True)),
            }
            for key, target, chosen, row in zip(
                guesses.keys, guesses.targets, guesses.chosen.tolist(), guesses.probabilities.tolist(), strict=True
            )
        ]


def open_entailments(specs: Sequence[str], data: DataConfig, split: str) -> SampleSource:
    """The samples that the specifications name; see `tercet.data.entailment_files`.

    Raises:
        TercetError: a file is missing, or a row wrong.
    """
    return open_samples(specs, data, split, read_entailments, draw_entailments)


def evaluate_entailment(model: Tercet, source: SampleSource, config: Config) -> EntailmentResult:
    """Accuracy of a model on `source`.

    Raises:
        TercetError: no sample can be read, or the model has no tokenizer.
    """
    return EntailmentResult(guess_labels(model, source, config, entailment_logits))


def _build(config: Config, student: Tercet) -> Entailment:
    return Entailment(student, config.objectives)


ENTAILMENT = TaskKind(
    open=open_entailments,
    evaluate=evaluate_entailment,
    build=_build,
    judged_by=("entailment.accuracy",),
    heads=("entailment",),
)
