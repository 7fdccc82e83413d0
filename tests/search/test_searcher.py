"""Search: the order is that of the encoders, whatever the query is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.search.building import build_index
from tercet.search.index import Index
from tercet.search.reranking import TokenCache
from tercet.search.searcher import Hit, Query, Searcher
from tiny_model import TEXTS, make_model


@pytest.fixture(scope="module")
def index(model: Tercet, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(["scenes:validation"], model, "m", str(tmp_path_factory.mktemp("index")))[0]


@pytest.fixture(scope="module")
def searcher(model: Tercet, index: Index) -> Searcher:
    return Searcher(index, model)


@pytest.fixture(scope="module")
def feats(index: Index) -> tuple[list[str], torch.Tensor]:
    table = index.table.to_arrow()
    return table["id"].to_pylist(), torch.tensor(table["embedding"].to_pylist())


def names(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def test_words_by_the_dual_encoder(model: Tercet, searcher: Searcher, feats: tuple[list[str], torch.Tensor]) -> None:
    ids, vectors = feats
    cosines = vectors @ model.embed_texts(TEXTS[0])
    best = cosines.topk(5)
    hits = searcher.search(Query(text=TEXTS[0], k=5, rerank=0))
    assert names(hits) == [ids[place] for place in best.indices]
    assert [hit.cosine for hit in hits] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [hit.dual_rank for hit in hits] == [1, 2, 3, 4, 5] and all(hit.match is None for hit in hits)


def test_the_fusion_encoder_ranks_anew(model: Tercet, searcher: Searcher, index: Index) -> None:
    dual = searcher.search(Query(text=TEXTS[1], k=30, rerank=0))
    images = [index.image(hit.id) for hit in dual[:20]]
    chances = model.match(images, TEXTS[1])
    assert isinstance(chances, torch.Tensor)
    for _ in range(2):  # the second time from the tokens that were kept
        hits = searcher.search(Query(text=TEXTS[1], k=30, rerank=20))
        for hit in hits[:20]:
            assert hit.match == pytest.approx(chances[hit.dual_rank - 1].item(), abs=1e-5)
        shown = [hit.match for hit in hits[:20] if hit.match is not None]
        assert shown == sorted(shown, reverse=True) and len(shown) == 20
        assert sorted(names(hits[:20])) == sorted(names(dual[:20]))
        assert names(hits[20:]) == names(dual[20:]) and hits[25].match is None


def test_an_image_and_an_id(
    model: Tercet, searcher: Searcher, index: Index, feats: tuple[list[str], torch.Tensor], tmp_path: Path
) -> None:
    ids, vectors = feats
    own = index.image(ids[7])
    (tmp_path / "q.png").write_bytes(own)
    for image in (own, tmp_path / "q.png", Image.open(tmp_path / "q.png")):
        hits = searcher.search(Query(image=image, k=3))
        assert hits[0].id == ids[7] and hits[0].cosine == pytest.approx(1, abs=1e-5) and hits[0].match is None
    like = searcher.search(Query(like=ids[7], k=3))
    assert ids[7] not in names(like) and names(like)[:2] == names(hits)[1:]
    assert [hit.dual_rank for hit in like] == [1, 2, 3]

    text_feats = model.embed_texts(TEXTS[2])
    mixed = torch.nn.functional.normalize(text_feats + vectors[7], dim=0)
    hits = searcher.search(Query(text=TEXTS[2], image=own, k=4, rerank=0))
    assert names(hits) == [ids[place] for place in (vectors @ mixed).topk(4).indices]


def test_without(model: Tercet, searcher: Searcher, index: Index, feats: tuple[list[str], torch.Tensor]) -> None:
    """What must not be there lowers the images that show it, by both encoders."""
    ids, vectors = feats
    wanted, unwanted = model.embed_texts([TEXTS[0], TEXTS[3]])
    cosines = vectors @ torch.nn.functional.normalize(wanted - 0.5 * unwanted, dim=0)
    hits = searcher.search(Query(text=TEXTS[0], without=TEXTS[3], k=9, rerank=0))
    assert names(hits) == [ids[place] for place in cosines.topk(9).indices]

    hits = searcher.search(Query(text=TEXTS[0], without=TEXTS[3], k=20, rerank=20))
    images = [index.image(hit.id) for hit in hits]
    chances = model.match(images, [TEXTS[0], TEXTS[3]])
    assert isinstance(chances, torch.Tensor)
    score = chances[:, 0] * (1 - chances[:, 1])
    assert (score[:-1] >= score[1:] - 1e-6).all()
    assert [hit.match for hit in hits] == pytest.approx(chances[:, 0].tolist(), abs=1e-5)


def test_filters(searcher: Searcher) -> None:
    hits = searcher.search(Query(text=TEXTS[0], where="caption like '%heart%' and width >= 64", k=500))
    assert 0 < len(hits) < 500 and all(hit.caption and "heart" in hit.caption for hit in hits)
    assert searcher.search(Query(text=TEXTS[0], where="width > 64")) == []


def test_many_at_once_are_each_alone(
    model: Tercet, index: Index, feats: tuple[list[str], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of every kind together give what each gives alone; their images are encoded and remembered once."""
    ids, _ = feats
    own = index.image(ids[3])
    queries = [
        *(Query(text=text, k=12, rerank=40) for text in TEXTS),
        Query(text="heart", k=5, rerank=30),
        Query(text=TEXTS[1], k=12, rerank=40),
        Query(text=TEXTS[0], without=TEXTS[3], k=7, rerank=20),
        Query(text=TEXTS[2], k=9, rerank=0),
        Query(image=own, k=6),
        Query(image=index.image(ids[5]), text=TEXTS[3], k=6, rerank=3),
        Query(like=ids[8], k=4),
        Query(like=ids[8], text=TEXTS[1], without="red", where="caption like '%heart%'", k=8),
        Query(text=TEXTS[0], where="width > 64"),
    ]
    alone = [Searcher(index, model).search(query) for query in queries]
    candidates = {hit.id for query in queries for hit in _candidates(index, model, query)}
    encoded: list[int] = []
    remembered: list[int] = []
    encode, remember = model.encode_image, model.remember
    monkeypatch.setattr(model, "encode_image", lambda images: encoded.append(len(images)) or encode(images))
    monkeypatch.setattr(model, "remember", lambda embeds: remembered.append(len(embeds)) or remember(embeds))
    together = Searcher(index, model).search_many(queries)
    assert sum(remembered) == len(candidates) and sum(encoded) == len(candidates) + 2
    for hits, right in zip(together, alone, strict=True):
        assert len(hits) == len(right)
        assert [hit.match is None for hit in hits] == [hit.match is None for hit in right]
        for hit, other in zip(hits, right, strict=True):  # what ties to rounding may change places
            assert hit.match == (None if other.match is None else pytest.approx(other.match, abs=1e-5))
        by_id = {hit.id: hit for hit in right}
        assert sum(hit.id not in by_id for hit in hits) <= 1
        for hit in hits:
            if hit.id in by_id:
                assert hit.cosine == pytest.approx(by_id[hit.id].cosine, abs=1e-5)
    assert together[-1] == [] and Searcher(index, model).search_many([]) == []


def _candidates(index: Index, model: Tercet, query: Query) -> list[Hit]:
    """What the fusion encoder ranks anew of a query."""
    rerank = 64 if query.rerank is None else query.rerank
    if query.text is None or not rerank:
        return []
    return Searcher(index, model).search(replace(query, rerank=0, k=rerank))


def test_one_wrong_query_of_many_is_told(searcher: Searcher) -> None:
    with pytest.raises(TercetError, match="no image '0000"):
        searcher.search_many([Query(text=TEXTS[0]), Query(like="0" * 16)])


def test_images_that_are_gone_keep_their_place(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    index, _ = build_index([str(pictures)], model, "m", str(tmp_path / "index"))
    (pictures / "a.png").unlink()
    hits = Searcher(index, model).search(Query(text=TEXTS[0]))
    assert len(hits) == 4
    assert [Path(hit.uri).name for hit in hits if hit.match is None] == ["a.png"]


def test_without_a_trained_matching_head_nothing_is_ranked_anew(index: Index) -> None:
    dual = make_model()
    dual.objectives = ["cma"]
    hits = Searcher(index, dual).search(Query(text=TEXTS[0], k=5, rerank=20))
    assert [hit.match for hit in hits] == [None] * 5 and [hit.dual_rank for hit in hits] == [1, 2, 3, 4, 5]


def test_mistakes(searcher: Searcher, index: Index) -> None:
    for query, message in (
        (Query(), "nothing to look for"),
        (Query(without="a"), "nothing to look for"),
        (Query(text="a heart", k=0), "0 images asked for"),
        (Query(text="a heart", rerank=-1), "candidates to rank anew"),
        (Query(text="?!"), "nothing is left of the text"),
        (Query(like="0" * 16), "no image '0000"),
        (Query(image=b"<svg>"), "an SVG drawing"),
        (Query(text="a heart", where="colour = 'red'"), "the filter knows no 'colour'"),
    ):
        with pytest.raises(TercetError, match=message):
            searcher.search(query)
    other = make_model()
    other.vision.position_embed.data.add_(1)
    with pytest.raises(TercetError, match="made by another model"):
        Searcher(index, other)


def test_the_cache_keeps_within_its_limit() -> None:
    cache = TokenCache(3000)
    for number in range(5):
        cache.put(str(number), torch.full((250,), float(number)))
        cache.get("0")
    cache.put("4", torch.full((250,), 4.0))  # as two copies of an image in one batch do
    assert cache.size == 3000
    assert [number for number in range(5) if cache.get(str(number)) is not None] == [0, 3, 4]
