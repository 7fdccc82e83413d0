"""Heads on top of the fused text: matching, masked language modelling, and the parts that downstream tasks add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import HeadName, ModelConfig, TextConfig
from tercet.errors import TercetError
from tercet.model.layers import TokenCache
from tercet.model.text import CrossAttentionKV, FusionEncoder, TextLayer, class_rows, init_bert, key_mask, project_kv

if TYPE_CHECKING:
    from tercet.model.tercet import Tercet

# The attributes of `Tercet` that each optional head consists of; heads may share one.
HEAD_PARTS: dict[HeadName, tuple[str, ...]] = {
    "answer": ("answer_decoder",),
    "entailment": ("entailment_head",),
    "nlvr": ("second_fusion", "nlvr_head"),
    "assignment": ("second_fusion", "assignment_head"),
}


def make_part(name: str, config: ModelConfig) -> nn.Module:
    """One of `HEAD_PARTS`, with random weights."""
    width = config.text.width
    match name:
        case "answer_decoder":
            return AnswerDecoder(config.text)
        case "entailment_head":
            return Classifier(width, 3)
        case "second_fusion":
            return SecondFusion(config.text, config.vision.width)
        case "nlvr_head":
            return Classifier(width, 2)  # false, true
        case "assignment_head":
            return ClassLogits(width, 3)  # the first image matches, the second, neither
    raise ValueError(f"no head consists of {name}")


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


class MlmHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embedding itself, which the caller passes in."""

    def __init__(self, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.apply(init_bert(width))

    def forward(self, hidden: Tensor, word_embed: Tensor) -> Tensor:
        """Vocabulary logits `[..., vocabulary]` of `hidden` `[..., width]`; `word_embed` is `[vocabulary, width]`."""
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embed, self.bias)


class AnswerDecoder(nn.Module):
    """A causal stack that reads the question fused with its image and generates an answer.

    It has as many layers as the fusion encoder, with cross-attention to the question states (arXiv 2202.10401, section
    4.2; the form is that of ALBEF, arXiv 2107.07651, section 5), its own embeddings, and a vocabulary head tied to its
    own word embedding.  An answer is `[CLS]`, its word pieces and `[SEP]`; every position predicts the next one.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.word_embed = nn.Embedding(config.vocabulary_size, width, padding_idx=config.pad_id)
        self.position_embed = nn.Embedding(config.max_positions, width)
        self.type_embed = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            TextLayer(width, config.heads, config.mlp_width, config.dropout, image_width=width)
            for _ in range(config.depth - config.fusion_layer)
        )
        self.head = MlmHead(width, config.vocabulary_size)
        self.apply(init_bert(width))

    def project_kv(self, question_states: Tensor, question_mask: Tensor) -> CrossAttentionKV:
        """Keys and values of every layer for a set of questions; consecutive answers share a question.

        Args:
            question_states: `[questions, tokens, width]`, every token of the fused questions.
            question_mask: `[questions, tokens]`, true where a token is real.
        """
        return project_kv(self.layers, question_states, key_mask(question_mask))

    def forward(self, input_ids: Tensor, kv: CrossAttentionKV, cache: TokenCache | None = None) -> Tensor:
        """Read answers from the left.

        Padding at the end needs no mask: no real position attends to its right.

        Args:
            input_ids: `[answers, tokens]`; after the tokens of `cache` where there is one.
            kv: of the questions; see `CrossAttentionKV` for which answer reads which question.
            cache: what was read of these answers before; `input_ids` is added to it.

        Returns:
            `answer_states` `[answers, tokens, width]`.

        Raises:
            TercetError: the answers are longer than the position table.
        """
        read = 0 if cache is None else len(cache)
        tokens = input_ids.shape[1]
        if read + tokens > self.position_embed.num_embeddings:
            raise TercetError(
                f"an answer of {read + tokens} tokens is longer than the model's "
                f"{self.position_embed.num_embeddings} positions; remove it, or raise model.text.max_positions"
            )
        fixed = self.position_embed.weight[read : read + tokens] + self.type_embed.weight[0]
        hidden = self.norm(self.word_embed(input_ids) + fixed)
        hidden = F.dropout(hidden, self.dropout, self.training)
        causal = torch.ones(tokens, read + tokens, dtype=torch.bool, device=input_ids.device).tril(read)[None, None]
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, causal, kv, index, cache=cache)
        return hidden

    def logits(self, answer_states: Tensor) -> Tensor:
        """Vocabulary logits `[..., vocabulary]` of the token after each of `answer_states` `[..., width]`."""
        return self.head(answer_states, self.word_embed.weight)

    @torch.no_grad()
    def start_from(self, model: Tercet) -> None:
        """Copy the weights that the published method starts the decoder with: the embeddings of the text encoder, the
        layers of the fusion encoder, and the head of masked language modelling.

        Where image and text differ in width, keys and values of cross-attention have no counterpart and stay random.
        """
        # The layers of the text encoder have the names of those of the fusion encoder, which therefore come second.
        start = {**model.text.state_dict(), **model.fusion.state_dict()}
        start |= {f"head.{name}": value for name, value in model.mlm_head.state_dict().items()}
        for name, parameter in self.named_parameters():
            if start[name].shape == parameter.shape:
                parameter.copy_(start[name])


class SecondFusion(nn.Module):
    """Fusion with a second image: every fusion layer is followed by one of these, which reads the second image.

    The two layers of a pair share the keys and values of their cross-attention, which the first projects for both
    images (arXiv 2107.07651, section 5).
    """

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TextLayer(config.width, config.heads, config.mlp_width, config.dropout, image_width)
            for _ in range(config.depth - config.fusion_layer)
        )
        for layer in self.layers:
            assert isinstance(layer, TextLayer)
            del layer.cross_attention.key_value
        self.apply(init_bert(config.width))

    def forward(
        self,
        fusion: FusionEncoder,
        text_embeds: Tensor,
        attention_mask: Tensor,
        first: CrossAttentionKV,
        second: CrossAttentionKV,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Fuse sentences with two images each.

        Args:
            fusion: the first layers of the pairs.
            text_embeds: `[batch, tokens, width]` from the text encoder.
            attention_mask: `[batch, tokens]`.
            first: keys and values of the first image of each sentence, by `fusion.project_kv`.
            second: those of the second image.
            rows: `[batch, slots]` positions that the last layer computes; None computes all.

        Returns:
            `[batch, slots or tokens, width]`.
        """
        mask, hidden = key_mask(attention_mask), text_embeds
        last = len(self.layers) - 1
        for index, (one, other) in enumerate(zip(fusion.layers, self.layers, strict=True)):
            hidden = one(hidden, mask, first, index)
            hidden = other(hidden, mask, second, index, rows if index == last else None)
        return hidden

    @torch.no_grad()
    def start_from(self, model: Tercet) -> None:
        """Copy the fusion layers of `model`, as the published text-assignment model starts."""
        first = model.fusion.state_dict()
        self.load_state_dict({name: first[name] for name in self.state_dict()})


def fused_class(
    model: Tercet,
    text_embeds: Tensor,
    attention_mask: Tensor,
    first: CrossAttentionKV,
    second: CrossAttentionKV,
) -> Tensor:
    """`[CLS]` `[batch, width]` of sentences fused with two images each; see `SecondFusion.forward`."""
    assert model.second_fusion is not None
    rows = class_rows(text_embeds)
    return model.second_fusion(model.fusion, text_embeds, attention_mask, first, second, rows)[:, 0]
