"""Re-ranking: matching logits of chosen image-text pairs, each image's keys and values computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from tercet.model.tercet import Tercet

# A pass reads all weights of the fusion encoder and starts its kernels, which takes as long as about so many tokens do.
PASS_COST = 64
# Text tokens in one pass.
BATCH_TOKENS = 8192
# On a GPU: texts of an image that stay together, text tokens in one pass, and images whose keys and values are held.
BLOCK = 16
DEVICE_TOKENS = 32768
WINDOW = 64


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
    memory = model.project_kv(image_embeds[None])
    logits = image_embeds.new_empty(len(text_embeds), 2, dtype=torch.float32)
    for chunk in chunks_by_length([text.shape[0] for text in text_embeds], batch_tokens):
        padded, mask = pad_texts([text_embeds[index] for index in chunk])
        logits[torch.tensor(chunk, device=logits.device)] = model.match_logits(padded, mask, memory)
    return logits


@dataclass
class TextTokens:
    """The tokens of many texts behind one another on one device, where a pass picks its texts from.

    Attributes:
        tokens: `[tokens, width]`, of all texts.
        starts: where each text begins, `[texts]`.
        lengths: tokens of each text, `[texts]`.
        counts: the same on the host.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    counts: np.ndarray

    @classmethod
    def of(cls, text_embeds: Sequence[Tensor], device: torch.device) -> TextTokens:
        """Of texts `[tokens, width]` each."""
        counts = np.array([len(text) for text in text_embeds], dtype=np.int64)
        lengths = torch.from_numpy(counts).to(device)
        return cls(torch.cat(list(text_embeds)).to(device), lengths.cumsum(0) - lengths, lengths, counts)

    def padded(self, texts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """`[chosen, longest, width]` of the `texts` `[chosen]`, and their mask `[chosen, longest]`."""
        places = torch.arange(longest, device=texts.device)[None, :]
        mask = places < self.lengths[texts, None]
        # What lies behind the end of a text is any other token, which the mask hides.
        rows = (self.starts[texts, None] + places).clamp(max=len(self.tokens) - 1)
        return self.tokens[rows], mask


@torch.no_grad()
def match_images(
    model: Tercet,
    image_embeds: Tensor,
    texts: TextTokens,
    wanted: Sequence[np.ndarray],
    batch_tokens: int = DEVICE_TOKENS,
    block: int = BLOCK,
) -> list[Tensor]:
    """`itm_logits` of several images, each with texts of its own; for a GPU, which a single image does not fill.

    The texts of an image are cut, by length, into blocks; a pass takes blocks of like length of any images.

    Args:
        model: in evaluation mode.
        image_embeds: `[images, 1 + patches, vision_width]`.
        texts: of all images.
        wanted: for each image the indices of its texts.
        batch_tokens: text tokens in one pass, padding included.
        block: texts of an image that read its keys and values together; the last one repeats to fill its block.

    Returns:
        For each image `[texts, 2]`, on the host.
    """
    ends = np.cumsum([len(chosen) for chosen in wanted])
    places, members, owners = [], [], []
    for image, chosen in enumerate(wanted):
        if len(chosen) == 0:
            continue
        order = np.argsort(texts.counts[chosen], kind="stable")
        order = np.pad(order, (0, -len(order) % block), mode="edge").reshape(-1, block)
        places.append(order + (ends[image] - len(chosen)))
        members.append(chosen[order])
        owners += [image] * len(order)
    logits = torch.empty(ends[-1] if len(ends) else 0, 2)
    if not owners:
        return list(logits.split([0] * len(wanted)))
    place, member = np.concatenate(places), np.concatenate(members)
    longest = texts.counts[member[:, -1]]
    memory = model.project_kv(image_embeds)
    done: list[Tensor] = []
    by_length = np.argsort(longest, kind="stable")
    for rows in _passes(longest[by_length], by_length, batch_tokens // block):
        told = np.concatenate([np.array(owners)[rows][:, None], member[rows]], axis=1)
        index = torch.from_numpy(told).to(image_embeds.device, non_blocking=True)
        padded, mask = texts.padded(index[:, 1:].flatten(), int(longest[rows[-1]]))
        done.append(model.match_logits(padded, mask, memory.select(index[:, 0])))
    logits[torch.from_numpy(place[by_length].flatten())] = torch.cat(done).cpu()
    return list(logits.split([len(chosen) for chosen in wanted]))


def _passes(longest: np.ndarray, blocks: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """`blocks`, the longest last, cut so that no pass has more than `batch_tokens` tokens in a row of its blocks."""
    start = 0
    while start < len(blocks):
        end = start + 1
        while end < len(blocks) and (end + 1 - start) * longest[end] <= batch_tokens:
            end += 1
        yield blocks[start:end]
        start = end


def score_image(
    model: Tercet, image_embeds: Tensor, text_embeds: list[Tensor], batch_tokens: int = BATCH_TOKENS
) -> Tensor:
    """What re-ranking goes by: the logit of a match of one image with each text, `[texts]`; see `match_image`."""
    return match_image(model, image_embeds, text_embeds, batch_tokens)[:, 1]


def score_images(
    model: Tercet, asked: Iterable[tuple[Tensor, np.ndarray]], text_embeds: Sequence[Tensor], device: torch.device
) -> Iterator[Tensor]:
    """The same for many images, in their order: one after the other on a CPU, several together on a GPU.

    Args:
        model: in evaluation mode, on `device`.
        asked: tokens of each image `[1 + patches, vision_width]`, and the indices of its texts.
        text_embeds: tokens of all texts `[tokens, width]` each.
        device: where the fusion encoder runs.

    Returns:
        For each image the scores of its texts, `[texts]`, on the host.
    """
    if device.type == "cpu":
        for image_embeds, chosen in asked:
            yield score_image(model, image_embeds, [text_embeds[index] for index in chosen])
        return
    texts, waiting = TextTokens.of(text_embeds, device), iter(asked)
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
