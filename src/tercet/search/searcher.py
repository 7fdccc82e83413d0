"""Search: the nearest images by the dual encoder, the best of them ranked anew by the fusion encoder."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tercet.config import DataConfig
from tercet.data.inputs import to_batch, to_pixels
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.search.index import Index, Neighbour, model_digest
from tercet.tasks.encoding import encode_sentences, evaluating

RERANK = 64
MOST = 1000
BATCH = 16
CACHE_BYTES = 512 * 2**20
WITHOUT = 0.5  # how far a search is turned away from what must not be there

_DATA = DataConfig()


@dataclass(frozen=True)
class Query:
    """What to look for: words, an image, an image of the index, or several of these at once.

    Attributes:
        text: what the image shows.
        image: a path, a file's bytes or a Pillow image that it looks like.
        like: id of an image of the index that it looks like; that one is not found itself.
        without: what the image does not show.
        where: a filter over the columns of the index; see `tercet.search.filters`.
        k: how many images.
        rerank: how many candidates the fusion encoder ranks anew, when there is a text and the model's matching head
            was trained; default `RERANK` or k, 0: none.
    """

    text: str | None = None
    image: str | os.PathLike[str] | bytes | Image.Image | None = None
    like: str | None = None
    without: str | None = None
    where: str | None = None
    k: int = 20
    rerank: int | None = None


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        id: of the image in the index.
        uri: where it lies.
        caption: the first that came with it.
        width: pixels.
        height: pixels.
        cosine: with the query, from -1 to 1, by the dual encoder.
        match: the probability that it shows the text, by the fusion encoder; None where it was not ranked anew.
        dual_rank: its place, from 1, by the dual encoder alone.
    """

    id: str
    uri: str
    caption: str | None
    width: int
    height: int
    cosine: float
    match: float | None
    dual_rank: int


class Searcher:
    """An index with the model that made it.

    Args:
        index: where to search.
        model: in evaluation mode; its image encoder must be the one that made the index.
        cache_bytes: image tokens that are kept for the next search, in bytes.

    Raises:
        TercetError: the index was made by another model.
    """

    def __init__(self, index: Index, model: Tercet, cache_bytes: int = CACHE_BYTES) -> None:
        if model_digest(model) != index.model_digest:
            raise TercetError(
                f"{index.path} was made by another model, {index.model}; search with that one, or index again with this"
            )
        self.index = index
        self.model = model
        self._tokens = TokenCache(cache_bytes)

    def search(self, query: Query) -> list[Hit]:
        """The images that fit the query best, the best first.

        Raises:
            TercetError: the query is empty, or names an image, id or column that is not there.
        """
        check_query(query)
        rerank = max(RERANK, query.k) if query.rerank is None else query.rerank
        rerank = rerank if query.text is not None and self.model.matches else 0
        with evaluating(self.model):
            texts = [text for text in (query.text, query.without) if text is not None]
            encoded = encode_sentences(self.model, texts, _DATA) if texts else None
            feats = self._query_feats(query, encoded.text_feats if encoded else torch.empty(0))
            count = max(query.k, rerank) + (query.like is not None)
            found = self.index.nearest(feats, count, query.where)
            found = [one for one in found if one.entry.id != query.like]
            ranked: list[tuple[int, float | None]] = [(place, None) for place in range(len(found))]
            if rerank and encoded:
                ranked = self._rank_anew(found, rerank, encoded.text_embeds, query.without is not None)
        return [_hit(found[place], chance, place) for place, chance in ranked[: query.k]]

    def _query_feats(self, query: Query, text_feats: Tensor) -> Tensor:
        """The direction to search in, `[embed_dim]`: the mean of what is given, turned away from `without`."""
        wanted: list[Tensor] = []
        if query.text is not None:
            wanted.append(text_feats[0])
        if query.image is not None:
            pixels = to_pixels(query.image)
            batch = to_batch([pixels], self.model.config.vision.image_size).to(self.model.temperature.device)
            wanted.append(self.model.project_image(self.model.encode_image(batch)[:, 0])[0].cpu())
        if query.like is not None:
            wanted.append(torch.from_numpy(self.index.embeddings([query.like])[0]))
        feats = torch.stack(wanted).mean(dim=0)
        if query.without is not None:
            feats = F.normalize(feats, dim=0) - WITHOUT * text_feats[-1]
        return F.normalize(feats, dim=0)

    def _rank_anew(
        self, found: Sequence[Neighbour], count: int, text_embeds: list[Tensor], excludes: bool
    ) -> list[tuple[int, float | None]]:
        """Places in `found` with the probability of a match, the best first; those not looked at keep their order.

        With something to exclude, what is ranked by is the probability of the text and not of the other.
        """
        logits = self.match_logits(found[:count], text_embeds)
        margins = logits[..., 1] - logits[..., 0]
        score = margins[:, 0]
        if excludes:
            score = F.logsigmoid(margins[:, 0]) + F.logsigmoid(-margins[:, 1])
        score = score.masked_fill(score.isnan(), float("-inf"))
        order = score.argsort(descending=True, stable=True).tolist()
        chances = margins[:, 0].sigmoid().tolist()
        ranked: list[tuple[int, float | None]] = [
            (place, None if score[place] == float("-inf") else chances[place]) for place in order
        ]
        return ranked + [(place, None) for place in range(len(order), len(found))]

    def match_logits(self, found: Sequence[Neighbour], text_embeds: list[Tensor]) -> Tensor:
        """`itm_logits` `[images, texts, 2]` of images of the index with texts; NaN where an image cannot be read."""
        result = torch.full((len(found), len(text_embeds), 2), float("nan"))
        for start in range(0, len(found), BATCH):
            chunk = found[start : start + BATCH]
            tokens = self._image_embeds(chunk)
            there = [row for row, own in enumerate(tokens) if own is not None]
            if not there:
                continue
            memory = self.model.remember(torch.stack([own for own in tokens if own is not None]))
            for column, text in enumerate(text_embeds):
                texts = text.to(self.model.temperature.device).expand(len(there), -1, -1)
                mask = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
                logits = self.model.match_logits(texts, mask, memory).cpu()
                result[torch.tensor(there) + start, column] = logits
        return result

    def _image_embeds(self, found: Sequence[Neighbour]) -> list[Tensor | None]:
        """Tokens of each image `[1 + patches, width]`, kept from an earlier search or read now."""
        size = self.model.config.vision.image_size
        tokens = [self._tokens.get(one.sha256) for one in found]
        pixels = {}
        for row, one in enumerate(found):
            if tokens[row] is None:
                try:
                    pixels[row] = to_pixels(self.index.image(one.entry.id))
                except TercetError:
                    continue  # gone or changed since it was indexed: it keeps the dual encoder's place
        if pixels:
            batch = to_batch(list(pixels.values()), size).to(self.model.temperature.device)
            for row, own in zip(pixels, self.model.encode_image(batch), strict=True):
                tokens[row] = own
                self._tokens.put(found[row].sha256, own)
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
        self.size += tokens.nbytes
        self._tokens[sha256] = tokens.clone()  # not a view that would keep a whole batch in memory
        while self.size > self.limit and self._tokens:
            self.size -= self._tokens.popitem(last=False)[1].nbytes


def check_query(query: Query) -> None:
    """Refuse a query that asks for nothing, or for too much.

    Raises:
        TercetError: says what is missing or out of bounds.
    """
    if query.text is None and query.image is None and query.like is None:
        raise TercetError("nothing to look for; give words, an image, or the id of an image of the index")
    if not 1 <= query.k <= MOST:
        raise TercetError(f"{query.k} images asked for; ask for 1 to {MOST}")
    if query.rerank is not None and not 0 <= query.rerank <= MOST:
        raise TercetError(f"{query.rerank} candidates to rank anew; give 0 to {MOST}")


def _hit(found: Neighbour, chance: float | None, place: int) -> Hit:
    entry = found.entry
    return Hit(entry.id, entry.uri, entry.caption, entry.width, entry.height, found.cosine, chance, place + 1)
