"""Search: the order is that of the encoders, whatever the query is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scene_files import png_of
from tercet.data.scenes import split_scenes
from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.search.build import build_index
from tercet.search.index import Hit, Index
from tercet.search.search import Query, Searcher, TokenCache
from tiny_model import TEXTS, make_model


@pytest.fixture(scope="module")
def index(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("scenes")
    for number, scene in enumerate(split_scenes("validation", 120)):
        (folder / f"{number}.png").write_bytes(png_of(scene))
        (folder / f"{number}.txt").write_text(scene.captions[0])
    return build_index([str(folder)], predictor, "m", str(tmp_path_factory.mktemp("index")))[0]


@pytest.fixture(scope="module")
def searcher(predictor: Predictor, index: Index) -> Searcher:
    return Searcher(index, predictor)


@pytest.fixture(scope="module")
def feats(index: Index) -> dict[str, Tensor]:
    """Image features `[embed_dim]` by id."""
    table = index.table.to_arrow()
    return dict(zip(table["id"].to_pylist(), torch.tensor(table["embedding"].to_pylist()), strict=True))


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def nearest(feats: dict[str, Tensor], query: Tensor, k: int) -> dict[str, float]:
    """Ids and cosines of the `k` nearest images, best first."""
    cosines = {name: float(vector @ F.normalize(query, dim=0)) for name, vector in feats.items()}
    return dict(sorted(cosines.items(), key=lambda item: -item[1])[:k])


def test_text_by_the_dual_encoder(predictor: Predictor, searcher: Searcher, feats: dict[str, Tensor]) -> None:
    hits = searcher.search(Query(text=TEXTS[0], k=5, rerank=0))
    best = nearest(feats, predictor.embed_texts(TEXTS[0]), 5)
    assert ids(hits) == list(best)
    assert [hit.cosine for hit in hits] == pytest.approx(list(best.values()), abs=1e-5)
    assert [(hit.dual_rank, hit.match) for hit in hits] == [(rank, None) for rank in range(1, 6)]


def test_the_fusion_encoder_re_ranks(predictor: Predictor, searcher: Searcher, index: Index) -> None:
    dual = searcher.search(Query(text=TEXTS[1], k=30, rerank=0))
    chances: Any = predictor.match([index.image(hit.id) for hit in dual[:20]], TEXTS[1])
    for _ in range(2):  # the second time from cached tokens
        hits = searcher.search(Query(text=TEXTS[1], k=30, rerank=20))
        expected = sorted(chances.tolist(), reverse=True)
        assert [hit.match for hit in hits] == [pytest.approx(chance, abs=1e-5) for chance in expected] + [None] * 10
        for hit in hits[:20]:
            assert hit.match == pytest.approx(chances[hit.dual_rank - 1].item(), abs=1e-5)
        assert sorted(ids(hits[:20])) == sorted(ids(dual[:20])) and ids(hits[20:]) == ids(dual[20:])


def test_image_like_and_mixed(
    predictor: Predictor, searcher: Searcher, index: Index, feats: dict[str, Tensor], tmp_path: Path
) -> None:
    name = list(feats)[7]
    own = index.image(name)
    (tmp_path / "q.png").write_bytes(own)
    like = searcher.search(Query(like=name, k=3))
    assert name not in ids(like) and [hit.dual_rank for hit in like] == [1, 2, 3]
    for image in (own, tmp_path / "q.png", Image.open(tmp_path / "q.png")):
        first, *others = searcher.search(Query(image=image, k=3))
        assert first.id == name and first.cosine == pytest.approx(1, abs=1e-5) and first.match is None
        assert ids(others) == ids(like)[:2]
    hits = searcher.search(Query(text=TEXTS[2], image=own, k=4, rerank=0))
    assert ids(hits) == list(nearest(feats, predictor.embed_texts(TEXTS[2]) + feats[name], 4))


def test_without(predictor: Predictor, searcher: Searcher, index: Index, feats: dict[str, Tensor]) -> None:
    """Images that show what must not be there sink, by both encoders."""
    wanted, unwanted = predictor.embed_texts([TEXTS[0], TEXTS[3]])
    hits = searcher.search(Query(text=TEXTS[0], without=TEXTS[3], k=9, rerank=0))
    assert ids(hits) == list(nearest(feats, wanted - 0.5 * unwanted, 9))

    hits = searcher.search(Query(text=TEXTS[0], without=TEXTS[3], k=20, rerank=20))
    chances: Any = predictor.match([index.image(hit.id) for hit in hits], [TEXTS[0], TEXTS[3]])
    score = chances[:, 0] * (1 - chances[:, 1])
    assert (score[:-1] >= score[1:] - 1e-6).all()
    assert [hit.match for hit in hits] == pytest.approx(chances[:, 0].tolist(), abs=1e-5)


def test_many_queries_equal_each_alone(
    predictor: Predictor, index: Index, feats: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of every kind together give what each gives alone, and every image is encoded and projected once."""
    names = list(feats)
    queries = [
        *(Query(text=text, k=12, rerank=40) for text in TEXTS),
        Query(text="heart", k=5, rerank=30),
        Query(text=TEXTS[1], k=12, rerank=40),
        Query(text=TEXTS[0], without=TEXTS[3], k=7, rerank=20),
        Query(text=TEXTS[2], k=9, rerank=0),
        Query(image=index.image(names[3]), k=6),
        Query(image=index.image(names[5]), text=TEXTS[3], k=6, rerank=3),
        Query(like=names[8], k=4),
        Query(like=names[8], text=TEXTS[1], without="red", where="caption like '%red%'", k=8),
        Query(text=TEXTS[0], where="width > 64"),
    ]
    alone = [Searcher(index, predictor).search(query) for query in queries]
    assert len(alone[-2]) > 0 and all("red" in (hit.caption or "") for hit in alone[-2])
    read = [(query, 64 if query.rerank is None else query.rerank) for query in queries if query.text is not None]
    dual = [replace(query, rerank=0, k=count) for query, count in read if count]
    candidates = {hit.id for query in dual for hit in Searcher(index, predictor).search(query)}
    encoded: list[int] = []
    projected: list[int] = []
    model = predictor.model
    encode, project = model.encode_image, model.project_kv
    monkeypatch.setattr(model, "encode_image", lambda images: encoded.append(len(images)) or encode(images))
    monkeypatch.setattr(model, "project_kv", lambda embeds: projected.append(len(embeds)) or project(embeds))
    together = Searcher(index, predictor).search_many(queries)
    assert sum(projected) == len(candidates) and sum(encoded) == len(candidates) + 2
    for hits, right in zip(together, alone, strict=True):
        assert [hit.match is None for hit in hits] == [hit.match is None for hit in right]
        for hit, other in zip(hits, right, strict=True):  # images that tie to rounding may change ranks
            assert hit.match == (None if other.match is None else pytest.approx(other.match, abs=1e-5))
        cosines = {hit.id: hit.cosine for hit in right}
        assert sum(hit.id not in cosines for hit in hits) <= 1
        assert all(hit.cosine == pytest.approx(cosines.get(hit.id, hit.cosine), abs=1e-5) for hit in hits)
    assert together[-1] == [] and Searcher(index, predictor).search_many([]) == []


def test_what_cannot_be_matched_keeps_its_dual_rank(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    index, _ = build_index([str(pictures)], predictor, "m", str(tmp_path / "index"))
    (pictures / "a.png").unlink()
    hits = Searcher(index, predictor).search(Query(text=TEXTS[0]))
    assert len(hits) == 4 and [Path(hit.uri).name for hit in hits if hit.match is None] == ["a.png"]
    dual = Predictor(make_model())
    dual.model.objectives = ["cma"]  # its matching head was not trained
    hits = Searcher(index, dual).search(Query(text=TEXTS[0], k=4, rerank=4))
    assert [(hit.dual_rank, hit.match) for hit in hits] == [(rank, None) for rank in range(1, 5)]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({}, "nothing to look for"),
        ({"without": "a"}, "nothing to look for"),
        ({"text": "a heart", "k": 0}, "k is 0"),
        ({"text": "a heart", "rerank": -1}, "rerank is -1"),
        ({"text": "?!"}, "'?!'"),
        ({"like": "0" * 16}, "0" * 16),
        ({"image": b"<svg>"}, "SVG"),
        ({"text": "a heart", "where": "colour = 'red'"}, "'colour'"),
    ],
)
def test_wrong_queries(searcher: Searcher, query: dict, named: str) -> None:
    with pytest.raises(TercetError) as refused:
        searcher.search_many([Query(text=TEXTS[0]), Query(**query)])
    assert named in str(refused.value)


def test_an_index_of_another_model(index: Index) -> None:
    other = Predictor(make_model())
    other.model.vision.position_embed.data.add_(1)
    with pytest.raises(TercetError, match="another model, m"):
        Searcher(index, other)


def test_the_cache_keeps_within_its_limit() -> None:
    cache = TokenCache(3000)
    for number in range(5):
        cache.put(str(number), torch.full((250,), float(number)))
        cache.get("0")
    cache.put("4", torch.full((250,), 4.0))  # as two copies of an image in one batch do
    assert cache.size == 3000
    assert [number for number in range(5) if cache.get(str(number)) is not None] == [0, 3, 4]
