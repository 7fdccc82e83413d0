"""Sentences and pictures through the encoders, whatever task reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tercet.config import DataConfig
from tercet.data.batches import TextBatch
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.rerank import EncodedTexts
from tercet.tasks.retrieval import encode_texts

BATCH = 64

Clean = Callable[[str, int], str]


@contextmanager
def evaluating(model: Tercet) -> Iterator[torch.device]:
    """The model in evaluation mode and without gradients; gives its device, and puts its mode back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


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
    device = next(model.parameters()).device
    return encode_texts(model, _batches(model, texts, data), device)[0]


def _batches(model: Tercet, texts: Sequence[str], data: DataConfig) -> Iterator[TextBatch]:
    for start in range(0, len(texts), BATCH):
        chunk = list(texts[start : start + BATCH])
        input_ids, attention_mask = tokenise(model, chunk, data)
        yield TextBatch(input_ids, attention_mask, torch.arange(start, start + len(chunk)), chunk)
