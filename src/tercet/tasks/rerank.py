"""Re-ranking: matching logits of chosen image-text pairs, each image's keys and values computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tercet.model.tercet import Tercet
from tercet.tasks.encoding import BATCH_TOKENS, chunks_by_length, pad_texts

# On a GPU: texts of an image that stay together, text tokens in one pass, and images whose keys and values are held.
BLOCK = 16
DEVICE_TOKENS = 32768
WINDOW = 64


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
    kv = model.project_kv(image_embeds[None])
    logits = image_embeds.new_empty(len(text_embeds), 2, dtype=torch.float32)
    for chunk in chunks_by_length([text.shape[0] for text in text_embeds], batch_tokens):
        padded, mask = pad_texts([text_embeds[index] for index in chunk])
        logits[torch.tensor(chunk, device=logits.device)] = model.match_logits(padded, mask, kv)
    return logits


class TextBank:
    """The tokens of many texts, concatenated on one device, from which a pass takes its texts.

    Attributes:
        tokens: `[tokens, width]`, of all texts.
        starts: where each text begins, `[texts]`.
        lengths: tokens of each text, `[texts]`.
        host_lengths: the same on the host.
    """

    def __init__(self, text_embeds: Sequence[Tensor], device: torch.device) -> None:
        """Concatenate texts `[tokens, width]`."""
        self.host_lengths = np.array([len(text) for text in text_embeds], dtype=np.int64)
        self.lengths = torch.from_numpy(self.host_lengths).to(device)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.tokens = torch.cat(list(text_embeds)).to(device)

    def pad(self, texts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """`[chosen, longest, width]` of the `texts` `[chosen]`, and their mask `[chosen, longest]`."""
        positions = torch.arange(longest, device=texts.device)[None, :]
        mask = positions < self.lengths[texts, None]
        # After the end of a text comes any other token, which the mask hides.
        rows = (self.starts[texts, None] + positions).clamp(max=len(self.tokens) - 1)
        return self.tokens[rows], mask


class _Block(NamedTuple):
    """Texts of one image that read its keys and values together: their longest, their indices, and their results."""

    longest: int
    image: int
    texts: np.ndarray
    results: np.ndarray


@torch.no_grad()
def match_images(
    model: Tercet,
    image_embeds: Tensor,
    texts: TextBank,
    wanted: Sequence[np.ndarray],
    batch_tokens: int = DEVICE_TOKENS,
    block: int = BLOCK,
) -> list[Tensor]:
    """`itm_logits` of several images, each with texts of its own; for a GPU, which a single image does not fill.

    The texts of an image are cut, by length, into blocks; a pass takes blocks of similar length of any images.

    Args:
        model: in evaluation mode.
        image_embeds: `[images, 1 + patches, vision_width]`.
        texts: of all images.
        wanted: for each image the indices of its texts.
        batch_tokens: text tokens in one pass, padding included.
        block: texts of a block; the last one of an image repeats its longest text.

    Returns:
        For each image `[texts, 2]`, on the host.
    """
    counts = [len(chosen) for chosen in wanted]
    blocks: list[_Block] = []
    for image, chosen in enumerate(wanted):
        if not len(chosen):
            continue
        order = np.argsort(texts.host_lengths[chosen], kind="stable")
        order = np.pad(order, (0, -len(order) % block), mode="edge").reshape(-1, block)
        first = sum(counts[:image])
        blocks += [_Block(int(texts.host_lengths[chosen[own[-1]]]), image, chosen[own], first + own) for own in order]
    if not blocks:
        return list(torch.empty(0, 2).split(counts))
    blocks.sort(key=lambda own: own.longest)
    kv = model.project_kv(image_embeds)
    found: list[Tensor] = []
    for some in _passes(blocks, batch_tokens // block):
        index = np.stack([np.append(own.texts, own.image) for own in some])
        index = torch.from_numpy(index).to(image_embeds.device, non_blocking=True)
        padded, mask = texts.pad(index[:, :-1].flatten(), some[-1].longest)
        found.append(model.match_logits(padded, mask, kv.select(index[:, -1])))
    logits = torch.empty(sum(counts), 2)
    logits[torch.from_numpy(np.concatenate([own.results for own in blocks]))] = torch.cat(found).cpu()
    return list(logits.split(counts))


def _passes(blocks: Sequence[_Block], batch_tokens: int) -> Iterator[Sequence[_Block]]:
    """`blocks`, the longest last, cut so that no pass has more than `batch_tokens` tokens in a row of its blocks."""
    start = 0
    while start < len(blocks):
        end = start + 1
        while end < len(blocks) and (end + 1 - start) * blocks[end].longest <= batch_tokens:
            end += 1
        yield blocks[start:end]
        start = end


def score_images(
    model: Tercet, pairs: Iterable[tuple[Tensor, np.ndarray]], text_embeds: Sequence[Tensor], device: torch.device
) -> Iterator[Tensor]:
    """The logits of a match of many images with texts of each: one image at a time on a CPU, several on a GPU.

    Args:
        model: in evaluation mode, on `device`.
        pairs: tokens of each image `[1 + patches, vision_width]`, and the indices of its texts.
        text_embeds: tokens of all texts `[tokens, width]` each.
        device: where the fusion encoder runs.

    Returns:
        For each image, in order, the scores of its texts, `[texts]`, on the host.
    """
    if device.type == "cpu":
        for image_embeds, chosen in pairs:
            yield match_image(model, image_embeds, [text_embeds[index] for index in chosen])[:, 1]
        return
    texts, waiting = TextBank(text_embeds, device), iter(pairs)
    while window := list(islice(waiting, WINDOW)):
        image_embeds = torch.stack([tokens.to(device) for tokens, _ in window])
        for logits in match_images(model, image_embeds, texts, [chosen for _, chosen in window]):
            yield logits[:, 1]


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
