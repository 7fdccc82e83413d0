"""Texts through the text encoder, whatever task reads them: those of similar length in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.config import DataConfig
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet

BATCH = 64
# Text tokens in one pass, padding included.
BATCH_TOKENS = 8192
# A pass reads all weights and starts its kernels, which takes as long as about this many tokens do.
PASS_COST = 64

Clean = Callable[[str, int], str]


@dataclass
class EncodedTexts:
    """Texts out of the text encoder.

    Attributes:
        text_feats: unit vectors `[texts, embed_dim]`.
        text_embeds: for each text its own real tokens `[tokens, width]`, without padding.
    """

    text_feats: Tensor
    text_embeds: list[Tensor]


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


def pad_texts(text_embeds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of several lengths, `[tokens, ...]` each, to `[texts, longest, ...]` and their mask `[texts, longest]`."""
    padded = torch.nn.utils.rnn.pad_sequence(text_embeds, batch_first=True)
    lengths = torch.tensor([text.shape[0] for text in text_embeds], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device)[None, :] < lengths[:, None]


def group_by_length(lengths: Sequence[int], pass_cost: int = PASS_COST) -> list[list[int]]:
    """Indices of texts in groups that go through the model together, so that padding and passes cost least.

    Args:
        lengths: tokens of each text.
        pass_cost: what one more pass costs, in tokens.
    """
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    steps = sorted(by_length)
    # Of the texts up to each length: the least cost, and where the last group begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end, longest in enumerate(steps, start=1):
        count, options = 0, []
        for start in range(end - 1, -1, -1):
            count += len(by_length[steps[start]])
            options.append((best[start][0] + count * longest + pass_cost, start))
        best.append(min(options))
    groups, end = [], len(steps)
    while end:
        start = best[end][1]
        groups.append([index for length in steps[start:end] for index in by_length[length]])
        end = start
    return groups


def chunks_by_length(lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """`group_by_length`, cut so that no pass has more than `batch_tokens` tokens, padding included."""
    for group in group_by_length(lengths):
        count = max(1, batch_tokens // max(lengths[index] for index in group))
        for start in range(0, len(group), count):
            yield group[start : start + count]
