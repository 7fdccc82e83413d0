"""Re-ranking: matching logits of chosen image-text pairs, each image's keys and values computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.model.tercet import Tercet

# A pass reads all weights of the fusion encoder and starts its kernels, which takes as long as about so many tokens do.
PASS_COST = 64
# Text tokens in one pass.
BATCH_TOKENS = 8192


@dataclass
class EncodedTexts:
    """Texts out of the text encoder.

    Attributes:
        text_feats: unit vectors `[texts, embed_dim]`.
        text_embeds: for each text its own real tokens `[tokens, width]`, without padding.
    """

    text_feats: Tensor
    text_embeds: list[Tensor]


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


@torch.no_grad()
def match_image(
    model: Tercet, image_embeds: Tensor, text_embeds: list[Tensor], batch_tokens: int = BATCH_TOKENS
) -> Tensor:
    """`itm_logits` of one image against texts; class 1 is a match.

    Args:
        model: in evaluation mode.
        image_embeds: `[1 + patches, vision_width]`.
        text_embeds: texts of any lengths, `[tokens, width]` each.
        batch_tokens: text tokens in one pass, padding included.

    Returns:
        `[texts, 2]`.
    """
    memory = model.remember(image_embeds[None])
    logits = image_embeds.new_empty(len(text_embeds), 2, dtype=torch.float32)
    for chunk in chunks_by_length([text.shape[0] for text in text_embeds], batch_tokens):
        padded, mask = pad_texts([text_embeds[index] for index in chunk])
        logits[torch.tensor(chunk, device=logits.device)] = model.match_logits(padded, mask, memory)
    return logits


def score_image(
    model: Tercet, image_embeds: Tensor, text_embeds: list[Tensor], batch_tokens: int = BATCH_TOKENS
) -> Tensor:
    """What re-ranking goes by: the logit of a match of one image with each text, `[texts]`; see `match_image`."""
    return match_image(model, image_embeds, text_embeds, batch_tokens)[:, 1]


def candidate_pairs(similarities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which pairs the two directions ask for.

    Args:
        similarities: `[images, texts]`.
        count: candidates a query; cut to what there is.

    Returns:
        Bool `[images, texts]` each: the best texts of every image, and the best images of every text.
    """
    images, texts = similarities.shape
    by_image = torch.zeros_like(similarities, dtype=torch.bool)
    by_image.scatter_(1, similarities.topk(min(count, texts), dim=1).indices, True)
    by_text = torch.zeros_like(similarities, dtype=torch.bool)
    by_text.scatter_(0, similarities.topk(min(count, images), dim=0).indices, True)
    return by_image, by_text
