"""Tercet, the model: two encoders, a fusion encoder, and the heads that pre-training leaves behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
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
    from tercet.data.inputs import ImageInputs, TextInputs
    from tercet.data.tokenizer import Tokenizer
    from tercet.predict import Grounding
    from tercet.tasks.answering import Answer
    from tercet.tasks.explaining import Explanation
    from tercet.tasks.heatmaps import Mode


class Tercet(nn.Module):
    """Image encoder, text encoder and fusion encoder (arXiv 2202.10401, section 3.1).

    `image_embeds` and `text_embeds` are the encoders' outputs for every token; `image_feats` and `text_feats` are the
    L2-normalised projections of their `[CLS]` rows, which the dual encoder compares.

    Attributes:
        config: the sizes.
        tokenizer: reads texts for this model; None while it is trained from captions, or where it was made without.
        answers: what it chooses answers to questions from; None where it writes them freely.
        card: README.md of the folder that it was loaded from, which `save` and `push_to_hub` take along.
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

    def embed_images(self, images: ImageInputs) -> Tensor:
        """Unit vectors of images in the shared space; see `tercet.predict.embed_images`."""
        from tercet.predict import embed_images

        return embed_images(self, images)

    def embed_texts(self, texts: TextInputs) -> Tensor:
        """Unit vectors of texts in the shared space; see `tercet.predict.embed_texts`."""
        from tercet.predict import embed_texts

        return embed_texts(self, texts)

    def similarity(self, images: ImageInputs, texts: TextInputs) -> Tensor | float:
        """Cosines of images with texts by the dual encoder; see `tercet.predict.similarity`."""
        from tercet.predict import similarity

        return similarity(self, images, texts)

    def match(self, images: ImageInputs, texts: TextInputs, paired: bool = False) -> Tensor | float:
        """Probabilities that images and texts belong together; see `tercet.predict.match`."""
        from tercet.predict import match

        return match(self, images, texts, paired)

    def classify(
        self, images: ImageInputs, labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> dict[str, float] | list[dict[str, float]]:
        """Probabilities of labels that it was never trained on; see `tercet.predict.classify`."""
        from tercet.predict import classify

        return classify(self, images, labels, templates)

    def answer(
        self, images: ImageInputs, questions: TextInputs, answers: Sequence[str] | None = None
    ) -> Answer | list[Answer]:
        """Answers to questions about images; see `tercet.predict.answer`."""
        from tercet.predict import answer

        return answer(self, images, questions, answers)

    def ground(
        self, images: ImageInputs, texts: TextInputs, mode: Mode = "itm", layer: int | None = None
    ) -> Grounding | list[Grounding]:
        """Where in images texts are seen; see `tercet.predict.ground`."""
        from tercet.predict import ground

        return ground(self, images, texts, mode, layer)

    def explain(
        self, images: ImageInputs, texts: TextInputs, layer: int | None = None, mode: Mode = "itm"
    ) -> Explanation | list[Explanation]:
        """Where in images each word of texts is seen; see `tercet.predict.explain`."""
        from tercet.predict import explain

        return explain(self, images, texts, layer, mode)

    def save(self, folder: str | Path, tokenizer: Tokenizer | None = None, card: str | None = None) -> Path:
        """Write this model as a folder; see `tercet.model.folder.save_model`."""
        from tercet.model.folder import save_model

        return save_model(self, folder, tokenizer, card)

    def push_to_hub(
        self,
        repo_id: str,
        tokenizer: Tokenizer | None = None,
        card: str | None = None,
        private: bool | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload this model to the Hugging Face Hub; see `tercet.model.folder.push_model`."""
        from tercet.model.folder import push_model

        return push_model(self, repo_id, tokenizer, card, private, message, token)
