"""Candidates of searches through the fusion encoder: each image is read and remembered once for all of their texts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from tercet.data.inputs import to_batch, to_pixels
from tercet.errors import TercetError
from tercet.model.memory import ImageMemory, JoinedMemory
from tercet.model.tercet import Tercet
from tercet.search.index import Index, Neighbour
from tercet.tasks.rerank import chunks_by_length, pad_texts

BATCH = 16  # images whose keys and values are held at once
CACHE_BYTES = 512 * 2**20


class Reranker:
    """Images of an index before the fusion encoder.

    Args:
        index: where the images are.
        model: in evaluation mode.
        cache_bytes: image tokens that are kept for the next search, in bytes.
    """

    def __init__(self, index: Index, model: Tercet, cache_bytes: int = CACHE_BYTES) -> None:
        self.index = index
        self.model = model
        self._tokens = TokenCache(cache_bytes)

    def match_logits(self, pairs: Sequence[tuple[Neighbour, int]], text_embeds: Sequence[Tensor]) -> Tensor:
        """`itm_logits` of images of the index with texts.

        Args:
            pairs: an image and the number of its text; a pair that stands twice is computed once.
            text_embeds: of each text its own tokens `[tokens, width]`, without padding.

        Returns:
            `[pairs, 2]`, on the host; NaN where an image cannot be read.
        """
        device = self.model.temperature.device
        texts = [text.to(device) for text in text_embeds]
        images: dict[str, Neighbour] = {}
        asked: dict[str, dict[int, Tensor]] = {}
        for one, text in pairs:
            images[one.entry.id] = one
            asked.setdefault(one.entry.id, {})[text] = torch.full((2,), float("nan"))
        # Images that equally many texts ask for stand together: they share a pass without copies of keys and values.
        ids = sorted(asked, key=lambda image_id: len(asked[image_id]))
        for start in range(0, len(ids), BATCH):
            chunk = ids[start : start + BATCH]
            tokens = self._image_embeds([images[image_id] for image_id in chunk])
            there = [(image_id, own) for image_id, own in zip(chunk, tokens, strict=True) if own is not None]
            if there:
                memory = self.model.remember(torch.stack([own for _, own in there]))
                self._match([asked[image_id] for image_id, _ in there], memory, texts)
        return torch.stack([asked[one.entry.id][text] for one, text in pairs]) if pairs else torch.empty(0, 2)

    def _match(self, asked: list[dict[int, Tensor]], memory: ImageMemory, texts: list[Tensor]) -> None:
        """Put in the logits of what each image of `memory` is asked for; texts of like length share a pass."""
        pairs = [(row, text) for row, own in enumerate(asked) for text in own]
        for chunk in chunks_by_length([len(texts[text]) for _, text in pairs]):
            # Of a pass, first the images that one text of it reads, then those that two read, and so on.
            own = [(row, [pairs[place][1] for place in places]) for row, places in _by_row(sorted(chunk), pairs)]
            own.sort(key=lambda each: len(each[1]))
            parts = []
            for count, each in groupby(own, key=lambda each: len(each[1])):
                rows = [row for row, _ in each]
                part = memory if rows == list(range(len(memory))) else _select(memory, rows)
                parts.append((part, count * len(rows)))
            ordered = [(row, text) for row, read in own for text in read]
            padded, mask = pad_texts([texts[text] for _, text in ordered])
            joined = parts[0][0] if len(parts) == 1 else JoinedMemory(parts)
            logits = self.model.match_logits(padded, mask, joined).cpu()
            for (row, text), result in zip(ordered, logits, strict=True):
                asked[row][text] = result

    def _image_embeds(self, images: Sequence[Neighbour]) -> list[Tensor | None]:
        """Tokens of each image `[1 + patches, width]`, kept from an earlier search or read now; None: not readable."""
        size = self.model.config.vision.image_size
        tokens = [self._tokens.get(one.sha256) for one in images]
        pixels = {}
        for row, one in enumerate(images):
            if tokens[row] is None:
                try:
                    pixels[row] = to_pixels(self.index.image(one.entry.id))
                except TercetError:
                    continue  # gone or changed since it was indexed: it keeps the dual encoder's place
        if pixels:
            batch = to_batch(list(pixels.values()), size).to(self.model.temperature.device)
            for row, own in zip(pixels, self.model.encode_image(batch), strict=True):
                tokens[row] = own
                self._tokens.put(images[row].sha256, own)
        return tokens


class TokenCache:
    """Image tokens by the digest of the image's bytes, the least lately used dropped beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._tokens: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, sha256: str) -> Tensor | None:
        """The tokens of an image, if they are there."""
        tokens = self._tokens.get(sha256)
        if tokens is not None:
            self._tokens.move_to_end(sha256)
        return tokens

    def put(self, sha256: str, tokens: Tensor) -> None:
        """Keep the tokens of an image `[1 + patches, width]`."""
        known = self._tokens.pop(sha256, None)
        self.size += tokens.nbytes - (0 if known is None else known.nbytes)
        self._tokens[sha256] = tokens.clone()  # not a view that would keep a whole batch in memory
        while self.size > self.limit and self._tokens:
            self.size -= self._tokens.popitem(last=False)[1].nbytes


def _by_row(places: list[int], pairs: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    return [(row, list(own)) for row, own in groupby(places, key=lambda place: pairs[place][0])]


def _select(memory: ImageMemory, rows: list[int]) -> ImageMemory:
    return memory.select(torch.tensor(rows, device=memory.keys_values[0][0].device))
