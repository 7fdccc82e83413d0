"""Search: the nearest images by the dual encoder, the best of them ranked anew by the fusion encoder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tercet.config import DataConfig
from tercet.data.inputs import ImageInput, to_batch, to_pixels
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.search.index import Index, Neighbour, model_digest
from tercet.search.reranking import CACHE_BYTES, Reranker
from tercet.tasks.encoding import encode_sentences, evaluating
from tercet.tasks.rerank import EncodedTexts

RERANK = 64
MOST = 1000
BATCH = 16  # images of queries that are encoded together
WITHOUT = 0.5  # how far a search is turned away from what must not be there

_DATA = DataConfig()
_NO_TEXTS = EncodedTexts(torch.empty(0), [])


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
        self._reranker = Reranker(index, model, cache_bytes)

    def search(self, query: Query) -> list[Hit]:
        """The images that fit the query best, the best first.

        Raises:
            TercetError: the query is empty, or names an image, id or column that is not there.
        """
        return self.search_many([query])[0]

    def search_many(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """What `search` gives of each query, to rounding; the encoders run once for all of them.

        An image that several queries have as a candidate is read and encoded once.

        Raises:
            TercetError: as `search`, for the first query that is wrong.
        """
        for query in queries:
            check_query(query)
        with evaluating(self.model):
            given = [text for query in queries for text in (query.text, query.without) if text is not None]
            numbers = {text: number for number, text in enumerate(dict.fromkeys(given))}
            encoded = encode_sentences(self.model, list(numbers), _DATA) if numbers else _NO_TEXTS
            found = self._nearest(queries, self._query_feats(queries, numbers, encoded.text_feats))
            ranked = self._rank_anew(queries, found, numbers, encoded.text_embeds)
        return [
            [_hit(near[place], chance, place) for place, chance in order[: query.k]]
            for query, near, order in zip(queries, found, ranked, strict=True)
        ]

    def _candidates(self, query: Query) -> int:
        """How many images of a query the fusion encoder ranks anew."""
        if query.text is None or not self.model.matches:
            return 0
        return max(RERANK, query.k) if query.rerank is None else query.rerank

    def _nearest(self, queries: Sequence[Query], feats: Sequence[Tensor]) -> list[list[Neighbour]]:
        """Of each query the images near to `feats` `[embed_dim]`; those of the same filter and count go as one."""
        together: dict[tuple[str | None, int], list[int]] = {}
        for place, query in enumerate(queries):
            count = max(query.k, self._candidates(query)) + (query.like is not None)
            together.setdefault((query.where, count), []).append(place)
        found: list[list[Neighbour]] = [[] for _ in queries]
        for (where, count), places in together.items():
            own = torch.stack([feats[place] for place in places])
            for place, near in zip(places, self.index.nearest_many(own, count, where), strict=True):
                found[place] = [one for one in near if one.entry.id != queries[place].like]
        return found

    def _query_feats(self, queries: Sequence[Query], numbers: dict[str, int], text_feats: Tensor) -> list[Tensor]:
        """The direction each searches in, `[embed_dim]`: the mean of what is given, turned away from `without`."""
        images = self._image_feats([query.image for query in queries if query.image is not None])
        likes = [query.like for query in queries if query.like is not None]
        own = iter(torch.from_numpy(self.index.embeddings(likes)) if likes else ())
        result = []
        for query in queries:
            wanted: list[Tensor] = []
            if query.text is not None:
                wanted.append(text_feats[numbers[query.text]])
            if query.image is not None:
                wanted.append(next(images))
            if query.like is not None:
                wanted.append(next(own))
            feats = torch.stack(wanted).mean(dim=0)
            if query.without is not None:
                feats = F.normalize(feats, dim=0) - WITHOUT * text_feats[numbers[query.without]]
            result.append(F.normalize(feats, dim=0))
        return result

    def _image_feats(self, images: Sequence[ImageInput]) -> Iterator[Tensor]:
        """`image_feats` `[embed_dim]` of each image."""
        device, size = self.model.temperature.device, self.model.config.vision.image_size
        for start in range(0, len(images), BATCH):
            pixels = [to_pixels(image) for image in images[start : start + BATCH]]
            yield from self.model.project_image(self.model.encode_image(to_batch(pixels, size).to(device))[:, 0]).cpu()

    def _rank_anew(
        self,
        queries: Sequence[Query],
        found: list[list[Neighbour]],
        numbers: dict[str, int],
        text_embeds: list[Tensor],
    ) -> list[list[tuple[int, float | None]]]:
        """Of each query the places in `found` with the probability of a match, the best first."""
        pairs: list[tuple[Neighbour, int]] = []
        sizes = []
        for query, near in zip(queries, found, strict=True):
            candidates = near[: self._candidates(query)]
            texts = [numbers[text] for text in (query.text, query.without) if text is not None]
            pairs += [(one, text) for one in candidates for text in texts]
            sizes.append((len(candidates), len(texts)))
        logits = self._reranker.match_logits(pairs, text_embeds)
        parts = logits.split([candidates * texts for candidates, texts in sizes])
        return [_order(part.view(*size, 2), len(near)) for part, size, near in zip(parts, sizes, found, strict=True)]


def _order(logits: Tensor, count: int) -> list[tuple[int, float | None]]:
    """Places of a query's images with the probability of a match, the best first; those not looked at keep their order.

    With something to exclude, what is ranked by is the probability of the text and not of the other.

    Args:
        logits: of its candidates `[candidates, 1 or 2, 2]`, with the text and with what is excluded.
        count: its images, candidates and those behind them.
    """
    if not len(logits):
        return [(place, None) for place in range(count)]
    margins = logits[..., 1] - logits[..., 0]
    score = margins[:, 0]
    if margins.shape[1] == 2:
        score = F.logsigmoid(margins[:, 0]) + F.logsigmoid(-margins[:, 1])
    score = score.masked_fill(score.isnan(), float("-inf"))
    order = score.argsort(descending=True, stable=True).tolist()
    chances, looked_at = margins[:, 0].sigmoid().tolist(), (score != float("-inf")).tolist()
    ranked: list[tuple[int, float | None]] = [(place, chances[place] if looked_at[place] else None) for place in order]
    return ranked + [(place, None) for place in range(len(order), count)]


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
