"""The answer decoder: a causal stack that reads the question fused with its image and writes an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import TextConfig
from tercet.errors import TercetError
from tercet.model.heads import MlmHead
from tercet.model.layers import TextLayer, TokenCache
from tercet.model.memory import ImageMemory
from tercet.model.text import initialise_bert, key_mask

if TYPE_CHECKING:
    from tercet.model.tercet import Tercet


class AnswerDecoder(nn.Module):
    """As many layers as the fusion encoder has, with causal self-attention and cross-attention to the question states
    (arXiv 2202.10401, section 4.2; the form is that of ALBEF, arXiv 2107.07651, section 5).

    It has its own embeddings, and its vocabulary head is tied to its own word embedding.  An answer is `[CLS]`, its
    word pieces and `[SEP]`; every position guesses the next one.
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
        self.apply(initialise_bert(width))

    def remember(self, question_states: Tensor, question_mask: Tensor) -> ImageMemory:
        """Keys and values of every layer for a set of questions, with padding hidden.

        Args:
            question_states: `[questions, tokens, width]`, every token of the fused questions.
            question_mask: `[questions, tokens]`, true where a token is real.

        Returns:
            A memory like that of images: consecutive answers share a question.
        """
        keys_values = [layer.cross_attention.remember(question_states) for layer in self._layers()]
        return ImageMemory(keys_values, key_mask(question_mask))

    def forward(self, input_ids: Tensor, memory: ImageMemory, cache: TokenCache | None = None) -> Tensor:
        """Read answers from the left.

        Padding at the end needs no mask: no real position looks to its right.

        Args:
            input_ids: `[answers, tokens]`; behind the tokens of `cache` where there is one.
            memory: the questions; see `ImageMemory` for which answer reads which question.
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
                f"{self.position_embed.num_embeddings} positions; leave it out, or raise model.text.max_positions"
            )
        fixed = self.position_embed.weight[read : read + tokens] + self.type_embed.weight[0]
        hidden = self.norm(self.word_embed(input_ids) + fixed)
        hidden = F.dropout(hidden, self.dropout, self.training)
        everything = torch.ones(tokens, read + tokens, dtype=torch.bool, device=input_ids.device)
        causal = everything.tril(read)[None, None]
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, causal, memory, index, cache=cache)
        return hidden

    def logits(self, answer_states: Tensor) -> Tensor:
        """Vocabulary logits `[..., vocabulary]` of the token behind each of `answer_states` `[..., width]`."""
        return self.head(answer_states, self.word_embed.weight)

    @torch.no_grad()
    def start_from(self, model: Tercet) -> None:
        """Take the weights that the published method starts the decoder with: the embeddings of the text encoder, the
        layers of the fusion encoder, and the head of masked language modelling.

        Where image and text differ in width, keys and values of cross-attention have no counterpart and stay random.
        """
        parts = (
            ("", model.text.state_dict()),
            ("", model.fusion.state_dict()),
            ("head.", model.mlm_head.state_dict()),
        )
        # Layers of the text encoder have the names that layers of the fusion encoder have, and come first.
        start = {prefix + name: value for prefix, part in parts for name, value in part.items()}
        for name, parameter in self.named_parameters():
            if start[name].shape == parameter.shape:
                parameter.copy_(start[name])

    def _layers(self) -> list[TextLayer]:
        return [layer for layer in self.layers if isinstance(layer, TextLayer)]
