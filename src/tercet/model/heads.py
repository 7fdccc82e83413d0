"""Heads on top of the fused text: masked language modelling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.model.text import initialise_bert


class MlmHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embedding itself, which the caller passes in."""

    def __init__(self, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.apply(initialise_bert)

    def forward(self, hidden: Tensor, word_embed: Tensor) -> Tensor:
        """Vocabulary logits.

        Args:
            hidden: `[..., width]` from the last fusion layer.
            word_embed: `[vocabulary, width]`.

        Returns:
            `mlm_logits` `[..., vocabulary]`.
        """
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embed, self.bias)
