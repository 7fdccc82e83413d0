"""Statements about two pictures, true or false: NLVR2 (arXiv 1811.00491)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tercet.config import Config, DataConfig, ObjectivesConfig
from tercet.data.nlvr_files import HARD_STATEMENTS, draw_statements, read_statements
from tercet.data.samples import SampleSource, open_samples
from tercet.model.heads import fused_class
from tercet.model.tercet import Tercet
from tercet.tasks.labelling import Guesses, LabelledBatch, Labelling, guess_labels
from tercet.tasks.task import TaskKind, memory_of

PARTS = ("vision", "text", "fusion", "second_fusion", "nlvr_head")


class PairStatements(Labelling):
    """Fine-tuning of the two-way head on the `[CLS]` fused with both images, with everything below it."""

    def __init__(self, student: Tercet, config: ObjectivesConfig, fresh_teacher: bool = False) -> None:
        """Train `student`, which has the head `nlvr`.

        Args:
            student: the model to train.
            config: says how the teacher follows.
            fresh_teacher: as published, where the teacher is copied before the checkpoint is loaded: it starts from
                new weights and takes several hundred steps to come near the student.
        """
        super().__init__(student, config, "nlvr", PARTS, fresh_teacher)

    def logits(self, model: Tercet, batch: LabelledBatch) -> Tensor:
        """Logits `[batch, 2]`, class 1 true."""
        return statement_logits(model, batch)


def statement_logits(model: Tercet, batch: LabelledBatch) -> Tensor:
    """Logits `[batch, 2]`, class 1 true, of each sentence and its two images."""
    assert model.nlvr_head is not None
    memory = model.project_kv(model.encode_image(batch.images))
    first, second = (memory_of(memory, batch.image_rows, place, 2) for place in (0, 1))
    text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
    return model.nlvr_head(fused_class(model, text_embeds, batch.attention_mask, first, second))


def consistency(right: Sequence[bool], groups: Sequence[str]) -> float:
    """Share of the sentences, in percent, that were judged right for all of their pairs.

    Args:
        right: whether each sample was judged right.
        groups: what the samples of one sentence share.
    """
    by_sentence: dict[str, list[bool]] = defaultdict(list)
    for own, group in zip(right, groups, strict=True):
        by_sentence[group].append(own)
    return 100.0 * sum(map(all, by_sentence.values())) / len(by_sentence)


@dataclass
class StatementResult:
    """An evaluation.

    Attributes:
        guesses: probabilities of false and true, and what was right.
    """

    guesses: Guesses

    def metrics(self) -> dict[str, dict[str, float]]:
        """Accuracy over all, and over the true and the false samples; consistency; all in percent."""
        right, labels = self.guesses.right, self.guesses.labels
        numbers = {"accuracy": 100.0 * right.double().mean().item()}
        numbers["consistency"] = consistency(right.tolist(), [target["group"] for target in self.guesses.targets])
        for name, label in (("true", 1), ("false", 0)):
            if (labels == label).any():
                numbers[f"accuracy_{name}"] = 100.0 * right[labels == label].double().mean().item()
        return {"nlvr": numbers}

    @property
    def sizes(self) -> dict[str, int]:
        """How many pairs and how many different sentences were judged."""
        groups = {target["group"] for target in self.guesses.targets}
        return {"samples": len(self.guesses.keys), "sentences": len(groups)}

    @property
    def problems(self) -> list[str]:
        """Why samples were left out, each naming its file and row."""
        return self.guesses.problems

    def predictions(self) -> list[dict[str, Any]]:
        """The verdict on each sample, as the official evaluation writes it, and its probability."""
        guesses = self.guesses
        return [
            {
                "sample": key,
                "identifier": target["id"],
                "label": str(bool(chosen)),
                "gold": str(bool(target["label"])),
                "probability": probability,
            }
            for key, target, chosen, probability in zip(
                guesses.keys,
                guesses.targets,
                guesses.chosen.tolist(),
                guesses.probabilities[:, 1].tolist(),
                strict=True,
            )
        ]


def open_statements(specs: Sequence[str], data: DataConfig, split: str) -> SampleSource:
    """The samples that the specifications name; see `tercet.data.nlvr_files`.

    Args:
        specs: official or ALBEF files, `scenes`, or `scenes:hard`: pairs of `split`, few easy statements to train on.
        data: where images lie; how many pairs are drawn.
        split: 'train', 'validation' or 'test'.

    Raises:
        TercetError: a file is missing, or a row wrong.
    """
    hard = partial(draw_statements, further=HARD_STATEMENTS)
    return open_samples(specs, data, split, read_statements, draw_statements, {"hard": hard})


def evaluate_statements(model: Tercet, source: SampleSource, config: Config) -> StatementResult:
    """Accuracy and consistency of a model on `source`.

    Raises:
        TercetError: no sample can be read, or the model has no tokenizer.
    """
    return StatementResult(guess_labels(model, source, config, statement_logits))


def _build(config: Config, student: Tercet) -> PairStatements:
    fresh_teacher = config.compat == "published" and config.init is not None
    return PairStatements(student, config.objectives, fresh_teacher)


NLVR = TaskKind(
    open=open_statements, evaluate=evaluate_statements, build=_build, heads=("nlvr",), judged_by=("nlvr.accuracy",)
)
