"""Heads on top of the fused text: masked language modelling, and the parts that downstream tasks add to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import HeadName, ModelConfig
from tercet.model.nlvr import ASSIGNMENT_CLASSES, STATEMENT_CLASSES, SecondFusion
from tercet.model.text import initialise_bert

if TYPE_CHECKING:
    from tercet.model.tercet import Tercet

ENTAILMENT_CLASSES = 3


class MlmHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embedding itself, which the caller passes in."""

    def __init__(self, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.apply(initialise_bert(width))

    def forward(self, hidden: Tensor, word_embed: Tensor) -> Tensor:
        """Vocabulary logits.

        Args:
            hidden: `[..., width]` from the last fusion layer.
            word_embed: `[vocabulary, width]`.

        Returns:
            `mlm_logits` `[..., vocabulary]`.
        """
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embed, self.bias)


class ClassLogits(nn.Linear):
    """Logits of a few classes, in fp32 within autocast too: bf16 would give pairs to be ranked the same score."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., width]` to logits `[..., classes]`."""
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class Classifier(nn.Module):
    """Two linear maps around a ReLU, on the fused `[CLS]`."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.output = ClassLogits(width, classes)

    def forward(self, fused: Tensor) -> Tensor:
        """`[..., width]` to logits `[..., classes]`."""
        return self.output(F.relu(self.hidden(fused)))


@dataclass(frozen=True)
class Part:
    """An attribute of `Tercet` that a head consists of; heads may share one.

    Attributes:
        make: builds it with random weights.
        start: sets it to what it begins fine-tuning from, out of the model that it is added to; None: it stays random.
    """

    make: Callable[[ModelConfig], nn.Module]
    start: Callable[[nn.Module, Tercet], None] | None = None


def parts_of_head(head: HeadName) -> dict[str, Part]:
    """The attributes of `Tercet` that a head consists of."""
    return _PARTS[head]


def _entailment_head(config: ModelConfig) -> nn.Module:
    return Classifier(config.text.width, ENTAILMENT_CLASSES)


def _answer_decoder(config: ModelConfig) -> nn.Module:
    from tercet.model.answer import AnswerDecoder  # it is built of this module's MlmHead

    return AnswerDecoder(config.text)


def _start_answer_decoder(decoder: nn.Module, model: Tercet) -> None:
    from tercet.model.answer import AnswerDecoder

    assert isinstance(decoder, AnswerDecoder)
    decoder.start_from(model)


def _nlvr_head(config: ModelConfig) -> nn.Module:
    return Classifier(config.text.width, STATEMENT_CLASSES)


def _assignment_head(config: ModelConfig) -> nn.Module:
    return ClassLogits(config.text.width, ASSIGNMENT_CLASSES)


def _second_fusion(config: ModelConfig) -> nn.Module:
    return SecondFusion(config.text, config.vision.width)


def _start_second_fusion(second: nn.Module, model: Tercet) -> None:
    assert isinstance(second, SecondFusion)
    second.start_from(model)


_SECOND_FUSION = Part(_second_fusion, _start_second_fusion)

_PARTS: dict[HeadName, dict[str, Part]] = {
    "answer": {"answer_decoder": Part(_answer_decoder, _start_answer_decoder)},
    "entailment": {"entailment_head": Part(_entailment_head)},
    "nlvr": {"second_fusion": _SECOND_FUSION, "nlvr_head": Part(_nlvr_head)},
    "assignment": {"second_fusion": _SECOND_FUSION, "assignment_head": Part(_assignment_head)},
}
