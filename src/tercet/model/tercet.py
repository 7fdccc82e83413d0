"""Tercet, the model: two encoders, a fusion encoder, and the heads that pre-training leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import HeadName, ModelConfig
from tercet.errors import TercetError
from tercet.model.heads import (
    HEAD_PARTS,
    AnswerDecoder,
    Classifier,
    ClassLogits,
    MlmHead,
    SecondFusion,
    make_part,
)
from tercet.model.text import CrossAttentionKV, FusionEncoder, JoinedKV, TextEncoder, class_rows
from tercet.model.vision import VisionTransformer

if TYPE_CHECKING:
    from tercet.data.tokenizer import Tokenizer


class Tercet(nn.Module):
    """Image encoder, text encoder and fusion encoder (arXiv 2202.10401, section 3.1).

    `image_embeds` and `text_embeds` are the encoders' outputs for every token; `image_feats` and `text_feats` are the
    L2-normalised projections of their `[CLS]` rows, which the dual encoder compares.

    Attributes:
        config: the sizes.
        tokenizer: reads texts for this model; None while it is trained from captions, or where it was made without one.
        answers: what it chooses answers to questions from; None where it writes them freely.
        card: README.md of the folder that it was loaded from.
        objectives: what trained its encoders, such as cma and itm; None where that is not known.
        answer_decoder: writes answers to questions; None without the head `answer`.
        entailment_head: three classes of a fused pair; None without the head `entailment`.
        second_fusion: layers that read the second of two images; None without the heads `nlvr` and `assignment`.
        nlvr_head: two classes of a sentence fused with two images; None without the head `nlvr`.
        assignment_head: which of two images a text belongs to; None without the head `assignment`.
    """

    tokenizer: Tokenizer | None = None
    answers: list[str] | None = None
    card: str | None = None
    objectives: list[str] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        vision, text = config.vision, config.text
        self.vision = VisionTransformer(vision)
        self.text = TextEncoder(text)
        self.fusion = FusionEncoder(text, vision)
        self.vision_projection = nn.Linear(vision.width, config.embed_dim)
        self.text_projection = nn.Linear(text.width, config.embed_dim)
        self.itm_head = ClassLogits(text.width, 2)
        self.mlm_head = MlmHead(text.width, text.vocabulary_size)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.answer_decoder: AnswerDecoder | None = None
        self.entailment_head: Classifier | None = None
        self.second_fusion: SecondFusion | None = None
        self.nlvr_head: Classifier | None = None
        self.assignment_head: ClassLogits | None = None
        for head in config.heads:
            self._make_parts(head)

    def encode_image(self, images: Tensor, drop: float = 0.0) -> Tensor:
        """`images` `[batch, 3, height, width]` (uint8, or normalised floats) to `image_embeds`
        `[batch, 1 + patches, vision_width]`; `drop` is the share of patches dropped at random while training."""
        return self.vision(images, drop)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids` and `attention_mask` `[batch, tokens]` to `text_embeds` `[batch, tokens, width]`."""
        return self.text(input_ids, attention_mask)

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """`image_feats` of any tokens: `[..., vision_width]` to unit vectors `[..., embed_dim]`."""
        return F.normalize(self.vision_projection(image_embeds).float(), dim=-1)

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """`text_feats` of any tokens: `[..., width]` to unit vectors `[..., embed_dim]`."""
        return F.normalize(self.text_projection(text_embeds).float(), dim=-1)

    def project_kv(self, image_embeds: Tensor) -> CrossAttentionKV:
        """What the fusion layers read of `image_embeds` `[images, 1 + patches, vision_width]`."""
        return self.fusion.project_kv(image_embeds)

    def fuse(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        kv: CrossAttentionKV | JoinedKV,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Fused texts `[pairs, slots or tokens, width]`; see `FusionEncoder.forward`."""
        return self.fusion(text_embeds, attention_mask, kv, rows)

    def match_logits(self, text_embeds: Tensor, attention_mask: Tensor, kv: CrossAttentionKV | JoinedKV) -> Tensor:
        """`itm_logits` `[pairs, 2]`, class 1 a match, of `text_embeds` `[pairs, tokens, width]` and their images."""
        return self.itm_head(self.fuse(text_embeds, attention_mask, kv, class_rows(text_embeds))[:, 0])

    def mlm_logits(self, fused: Tensor) -> Tensor:
        """Vocabulary logits `[..., vocabulary]` of fused tokens `[..., width]`."""
        return self.mlm_head(fused, self.text.word_embed.weight)

    def add_heads(self, heads: Iterable[HeadName]) -> list[str]:
        """Give the model the parts for downstream tasks that it does not have yet, initialised as published.

        Returns:
            Names of the new parts.
        """
        added: list[str] = []
        for head in heads:
            if head in self.config.heads:
                continue
            self.config = self.config.model_copy(update={"heads": [*self.config.heads, head]})
            for name in self._make_parts(head):
                part = getattr(self, name)
                if isinstance(part, (AnswerDecoder, SecondFusion)):
                    part.start_from(self)
                added.append(name)
        return added

    def require_heads(self, heads: Iterable[HeadName], task: str) -> None:
        """Raise an error unless the model has the parts that a task needs.

        Raises:
            TercetError: it lacks one.
        """
        for head in heads:
            if head not in self.config.heads:
                raise TercetError(
                    f"this model has no head for {head}; fine-tune it first: tercet train {task} --init MODEL"
                )

    @property
    def matches(self) -> bool:
        """Whether its matching head was trained, as far as is known."""
        return self.objectives is None or "itm" in self.objectives

    def task_parts(self) -> list[nn.Module]:
        """The parts that belong to downstream tasks."""
        names = [name for head in self.config.heads for name in HEAD_PARTS[head]]
        return [getattr(self, name) for name in dict.fromkeys(names)]

    def _make_parts(self, head: HeadName) -> list[str]:
        """Make the parts of `head` that do not exist yet, and return their names."""
        missing = [name for name in HEAD_PARTS[head] if getattr(self, name) is None]
        for name in missing:
            setattr(self, name, make_part(name, self.config).to(self.temperature.device))
        return missing
