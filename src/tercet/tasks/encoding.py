"""Sentences and pictures through the encoders, whatever task reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tercet.config import DataConfig
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.rerank import EncodedTexts, chunks_by_length

BATCH = 64

Clean = Callable[[str, int], str]


def tokenise(
    model: Tercet, texts: Sequence[str], data: DataConfig, clean: Clean = clean_caption
) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` `[texts, tokens]`, cleaned and cut as captions are, or as `clean` does.

    Raises:
        TercetError: the model has no tokenizer, or nothing is left of a text after cleaning.
    """
    cleaned = []
    for text in texts:
        cleaned.append(clean(text, data.max_words))
        if not cleaned[-1]:
            raise TercetError(f"nothing is left of the text {text!r} after its punctuation is removed; give it words")
    return require_tokenizer(model).encode(cleaned, min(data.max_tokens, model.config.text.max_positions))


def encode_sentences(model: Tercet, texts: Sequence[str], data: DataConfig) -> EncodedTexts:
    """Features and tokens of any sentences, on the host.

    Args:
        model: in evaluation mode, with its tokenizer.
        texts: the sentences, not yet cleaned.
        data: words and word pieces that are kept.
    """
    return encode_texts(model, *tokenise(model, texts, data))


@torch.no_grad()
def encode_texts(model: Tercet, input_ids: Tensor, attention_mask: Tensor) -> EncodedTexts:
    """Features and tokens of texts `[texts, tokens]`, on the host; those of similar length go through together."""
    device = model.temperature.device
    lengths = attention_mask.sum(dim=1).tolist()
    feats = torch.empty(len(lengths), model.config.embed_dim)
    embeds: dict[int, Tensor] = {}
    for chunk in chunks_by_length(lengths):
        longest = max(lengths[index] for index in chunk)
        ids, mask = (part[chunk, :longest].to(device) for part in (input_ids, attention_mask))
        text_embeds = model.encode_text(ids, mask)
        feats[chunk] = model.project_text(text_embeds[:, 0]).cpu()
        for index, tokens in zip(chunk, text_embeds.cpu(), strict=True):
            embeds[index] = tokens[: lengths[index]].clone()
    return EncodedTexts(feats, [embeds[index] for index in range(len(lengths))])
