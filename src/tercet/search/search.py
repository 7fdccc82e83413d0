"""Search: the dual encoder finds the nearest images, the fusion encoder re-ranks the best of them."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tercet.config import DataConfig
from tercet.data.inputs import to_batch, to_pixels
from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.search.index import Hit, Index, model_digest
from tercet.tasks.encoding import encode_sentences
from tercet.tasks.evaluation import evaluating

RERANK = 64
MAX_RESULTS = 1000
WITHOUT = 0.5  # how far a query is moved away from what must not be in the image
BATCH_IMAGES = 16  # that go through the fusion encoder together
CACHE_BYTES = 512 * 2**20

Margins = dict[tuple[str, str], float]  # by image id and text: logit of a match less that of none


@dataclass(frozen=True)
class Query:
    """What to look for: a text, an image, an image of the index, or several of these at once.

    Attributes:
        text: what the image shows.
        image: a path, a file's bytes or a Pillow image that it looks like.
        like: id of an image of the index that it looks like; that one is not found itself.
        without: what the image does not show.
        where: a filter over the columns of the index; see `tercet.search.index.checked_filter`.
        k: how many images.
        rerank: how many candidates the fusion encoder re-ranks, if there is a text and the model's matching head was
            trained; default `RERANK` or k, 0: none.

    Raises:
        TercetError: it asks for nothing, or for too much.
    """

    text: str | None = None
    image: str | os.PathLike[str] | bytes | Image.Image | None = None
    like: str | None = None
    without: str | None = None
    where: str | None = None
    k: int = 20
    rerank: int | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.image is None and self.like is None:
            raise TercetError("nothing to look for; give a text, an image, or the id of an image of the index")
        if not 1 <= self.k <= MAX_RESULTS:
            raise TercetError(f"k is {self.k}; ask for 1 to {MAX_RESULTS} images")
        if self.rerank is not None and not 0 <= self.rerank <= MAX_RESULTS:
            raise TercetError(f"rerank is {self.rerank}; give 0 to {MAX_RESULTS} candidates")

    @property
    def texts(self) -> list[str]:
        """What the fusion encoder compares candidates with."""
        return [text for text in (self.text, self.without) if text is not None]


class Searcher:
    """An index with the model that made it.

    Args:
        index: where to search.
        predictor: its image encoder must be the one that made the index.
        cache_bytes: limit of the cache of image tokens, which saves later searches from reading images again.

    Raises:
        TercetError: the index was made by another model.
    """

    def __init__(self, index: Index, predictor: Predictor, cache_bytes: int = CACHE_BYTES) -> None:
        if model_digest(predictor.model) != index.model_digest:
            raise TercetError(
                f"{index.path} was made by another model, {index.model}; search with that one, or index again with this"
            )
        self.index = index
        self.predictor, self.model = predictor, predictor.model
        self._tokens = TokenCache(cache_bytes)

    def search(self, query: Query) -> list[Hit]:
        """The images that fit the query best, the best first.

        Raises:
            TercetError: the query names an image, id or column that does not exist.
        """
        return self.search_many([query])[0]

    def search_many(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """`search` of each query.  The encoders run once for all, and an image that several have in common once.

        Raises:
            TercetError: as `search`, for the first query that is wrong.
        """
        with evaluating(self.model):
            text_feats, text_embeds = self._encode_texts(queries)
            found = self._nearest(queries, self._query_feats(queries, text_feats))
            candidates = [hits[: self._candidates(query)] for query, hits in zip(queries, found, strict=True)]
            margins = self._margins(queries, candidates, text_embeds)
        return [
            (rerank(query, best, margins) + hits[len(best) :])[: query.k]
            for query, best, hits in zip(queries, candidates, found, strict=True)
        ]

    def _encode_texts(self, queries: Sequence[Query]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`text_feats` `[embed_dim]` and `text_embeds` `[tokens, width]` of every text of the queries."""
        texts = list(dict.fromkeys(text for query in queries for text in query.texts))
        if not texts:
            return {}, {}
        encoded = encode_sentences(self.model, texts, DataConfig())
        feats, embeds = zip(texts, encoded.text_feats, strict=True), zip(texts, encoded.text_embeds, strict=True)
        return dict(feats), dict(embeds)

    def _candidates(self, query: Query) -> int:
        """How many images of a query the fusion encoder re-ranks."""
        if query.text is None or not self.model.matches:
            return 0
        return max(RERANK, query.k) if query.rerank is None else query.rerank

    def _query_feats(self, queries: Sequence[Query], text_feats: dict[str, Tensor]) -> list[Tensor]:
        """The direction of each query, `[embed_dim]`: the mean of what is given, moved away from `without`."""
        images = [query.image for query in queries if query.image is not None]
        likes = [query.like for query in queries if query.like is not None]
        image_feats = iter(self.predictor.embed_images(images) if images else ())
        like_feats = iter(torch.from_numpy(self.index.embeddings(likes)) if likes else ())
        result = []
        for query in queries:
            given = [text_feats[query.text]] if query.text is not None else []
            given += [next(image_feats)] if query.image is not None else []
            given += [next(like_feats)] if query.like is not None else []
            feats = torch.stack(given).mean(dim=0)
            if query.without is not None:
                feats = F.normalize(feats, dim=0) - WITHOUT * text_feats[query.without]
            result.append(F.normalize(feats, dim=0))
        return result

    def _nearest(self, queries: Sequence[Query], feats: Sequence[Tensor]) -> list[list[Hit]]:
        """The images nearest to each of `feats` `[embed_dim]`; queries of one filter and count share a read."""
        groups: dict[tuple[str | None, int], list[int]] = {}
        for row, query in enumerate(queries):
            count = max(query.k, self._candidates(query)) + (query.like is not None)
            groups.setdefault((query.where, count), []).append(row)
        found: list[list[Hit]] = [[] for _ in queries]
        for (where, count), rows in groups.items():
            nearest = self.index.nearest(torch.stack([feats[row] for row in rows]), count, where)
            for row, hits in zip(rows, nearest, strict=True):
                others = [hit for hit in hits if hit.id != queries[row].like]
                found[row] = [replace(hit, dual_rank=rank) for rank, hit in enumerate(others, 1)]
        return found

    def _margins(
        self, queries: Sequence[Query], candidates: Sequence[list[Hit]], text_embeds: dict[str, Tensor]
    ) -> Margins:
        """Margins of each query's candidates with its texts; images that cannot be read are missing."""
        margins: Margins = {}
        by_image: dict[str, tuple[Hit, dict[str, None]]] = {}
        for query, hits in zip(queries, candidates, strict=True):
            for hit in hits:
                by_image.setdefault(hit.id, (hit, {}))[1].update(dict.fromkeys(query.texts))
        wanted = [(hit, list(texts)) for hit, texts in by_image.values()]
        wanted.sort(key=lambda pair: len(pair[1]))  # images with equally many texts share a pass
        for start in range(0, len(wanted), BATCH_IMAGES):
            chunk = wanted[start : start + BATCH_IMAGES]
            tokens = self._image_embeds([hit for hit, _ in chunk])
            readable = [(hit.id, texts) for (hit, texts), own in zip(chunk, tokens, strict=True) if own is not None]
            if not readable:
                continue
            image_embeds = torch.stack([own for own in tokens if own is not None])
            asked = [[text_embeds[text] for text in texts] for _, texts in readable]
            found = self.predictor.match_logits(image_embeds, asked)
            for (image_id, texts), logits in zip(readable, found, strict=True):
                pairs = ((image_id, text) for text in texts)
                margins |= zip(pairs, (logits[:, 1] - logits[:, 0]).tolist(), strict=True)
        return margins

    def _image_embeds(self, hits: Sequence[Hit]) -> list[Tensor | None]:
        """Tokens of each image, `[1 + patches, width]`, from the cache or the image; None: not readable."""
        tokens = [self._tokens.get(hit.sha256) for hit in hits]
        pixels = {}
        for row, hit in enumerate(hits):
            if tokens[row] is None:
                try:
                    pixels[row] = to_pixels(self.index.image(hit.id))
                except TercetError:
                    continue  # gone or changed since it was indexed: it is not re-ranked
        if pixels:
            batch = to_batch(list(pixels.values()), self.model.config.vision.image_size)
            for row, own in zip(pixels, self.model.encode_image(batch.to(self.model.temperature.device)), strict=True):
                tokens[row] = own
                self._tokens.put(hits[row].sha256, own)
        return tokens


def rerank(query: Query, candidates: Sequence[Hit], margins: Margins) -> list[Hit]:
    """Candidates with their `match`, the best first; those without a margin keep their order behind the others.

    The score is the probability of `query.text`, times that of not `query.without`.
    """
    scored: list[tuple[float, Hit]] = []
    for hit in candidates:
        if (hit.id, query.texts[0]) not in margins:
            scored.append((-math.inf, hit))
            continue
        score = chance = log_sigmoid(margins[hit.id, query.texts[0]])
        if query.without is not None:
            score += log_sigmoid(-margins[hit.id, query.without])
        scored.append((score, replace(hit, match=math.exp(chance))))
    return [hit for _, hit in sorted(scored, key=lambda pair: pair[0], reverse=True)]


def log_sigmoid(logit: float) -> float:
    """Without overflow."""
    return min(logit, 0.0) - math.log1p(math.exp(-abs(logit)))


class TokenCache:
    """Image tokens by the digest of the image's bytes; beyond `limit` bytes the least recently used are dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._tokens: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, sha256: str) -> Tensor | None:
        """The tokens of an image, if they are cached."""
        if sha256 in self._tokens:
            self._tokens.move_to_end(sha256)
        return self._tokens.get(sha256)

    def put(self, sha256: str, tokens: Tensor) -> None:
        """Keep the tokens of an image `[1 + patches, width]`."""
        if sha256 in self._tokens:
            self.size -= self._tokens.pop(sha256).nbytes
        self._tokens[sha256] = tokens.clone()  # not a view that would keep a whole batch in memory
        self.size += tokens.nbytes
        while self.size > self.limit and self._tokens:
            self.size -= self._tokens.popitem(last=False)[1].nbytes
