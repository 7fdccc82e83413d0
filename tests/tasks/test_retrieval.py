"""Retrieval: ranks with ties, texts by length, shared keys and values against single pairs, broken images."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.config import Config, DataConfig
from tercet.data.readers import open_sources
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.encoding import encode_texts, group_by_length, pad_texts
from tercet.tasks.rerank import TextBank, candidate_pairs, match_image, match_images
from tercet.tasks.retrieval import RetrievalResult, Scores, query_ranks, recall
from tercet.tasks.task import evaluate_task
from tiny_model import make_model


@pytest.fixture(scope="module")
def model() -> Tercet:
    return make_model()


def evaluate(model: Tercet, file: str, **settings: int) -> RetrievalResult:
    config = Config.model_validate({"data": {"workers": 0}, "evaluate": {"batch_size": 3, **settings}})
    result = evaluate_task("retrieval", model, open_sources([file], DataConfig(), "test"), config)
    assert isinstance(result, RetrievalResult)
    return result


def test_ties_count_against_the_right_one() -> None:
    scores, owners = Scores(torch.zeros(3, 6), torch.zeros(6, 3)), torch.tensor([0, 0, 1, 1, 2, 2])
    text_ranks, image_ranks = query_ranks(scores, owners)
    assert text_ranks.tolist() == [4, 4, 4]
    assert image_ranks.tolist() == [2] * 6
    assert recall(scores, owners)["image_r1"] == 0
    right = (owners[None] == torch.arange(3)[:, None]).float()
    assert all(value == 100 for value in recall(Scores(right, right.T.contiguous()), owners).values())


def test_candidates_are_the_best_of_each_query_and_no_more_than_there_are() -> None:
    similarities = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 4.0]])
    by_image, by_text = candidate_pairs(similarities, 1)
    assert by_image.tolist() == [[True, False, False], [False, True, False]]
    assert by_text.tolist() == [[True, False, False], [False, True, True]]
    by_image, by_text = candidate_pairs(similarities, 50)
    assert by_image.all() and by_text.all()


@torch.no_grad()
def test_images_together_score_like_single_pairs(model: Tercet) -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    texts = [torch.randn(length, 32, generator=generator) for length in (3, 9, 1, 5, 9, 2, 7)]
    wanted = [np.array([4, 0, 2]), np.array([], dtype=np.int64), np.arange(7), np.array([6, 5, 3, 1])]
    embeds, bank = model.encode_image(images), TextBank(texts, torch.device("cpu"))
    kv = model.project_kv(embeds)
    for block, batch_tokens in ((1, 9), (2, 30), (3, 1000)):
        found = match_images(model, embeds, bank, wanted, batch_tokens, block)
        assert [len(logits) for logits in found] == [3, 0, 7, 4]
        for image, (chosen, logits) in enumerate(zip(wanted, found, strict=True)):
            own = [texts[index] for index in chosen]
            if own:
                together = match_image(model, embeds[image], own, batch_tokens)
                torch.testing.assert_close(logits, together, rtol=1e-5, atol=1e-5)
            for text, alone in zip(own, logits, strict=True):
                padded, mask = pad_texts([text])
                single = model.match_logits(padded, mask, kv.select(torch.tensor([image])))
                torch.testing.assert_close(alone, single[0], rtol=1e-5, atol=1e-5)
    assert match_images(model, embeds[:0], bank, []) == []


def test_beyond_the_candidates_the_order_of_the_dual_encoder_stays(model: Tercet, files: dict[str, str]) -> None:
    dual, some = (evaluate(model, files["retrieval"], rerank=count) for count in (0, 3))
    assert "reranked" in some.metrics and "reranked" not in dual.metrics
    similarities = dual.scores.image_to_text
    by_image, by_text = candidate_pairs(similarities, 3)
    for queries, chosen, plain in (
        (some.scores.image_to_text, by_image, similarities),
        (some.scores.text_to_image, by_text.T, similarities.T),
    ):
        for row, wanted, before in zip(queries, chosen, plain, strict=True):
            assert row[wanted].min() > row[~wanted].max()
            rest = before[~wanted][row[~wanted].argsort(descending=True)]
            assert (rest.diff() <= 1e-5).all()


def test_broken_images_are_skipped_with_their_captions(model: Tercet, files: dict[str, str], tmp_path: Path) -> None:
    rows = json.loads(Path(files["retrieval"]).read_text("utf-8"))
    for row in rows:
        (tmp_path / row["image"]).write_bytes(Path(files["retrieval"]).with_name(row["image"]).read_bytes())
    (tmp_path / "2.png").write_bytes(b"<html>not found</html>")
    for name, own in (("broken", rows), ("clean", [row for row in rows if row["image"] != "2.png"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(own), "utf-8")
    broken, clean = (evaluate(model, str(tmp_path / f"{name}.json"), rerank=4) for name in ("broken", "clean"))
    assert broken.sizes == {"images": 7, "texts": 14}
    assert len(broken.problems) == 1 and "2.png" in broken.problems[0]
    for name, metrics in broken.metrics.items():
        assert metrics == pytest.approx(clean.metrics[name])
    assert evaluate(model, str(tmp_path / "broken.json"), rerank=0, limit=5).sizes["images"] == 4


def test_errors(model: Tercet, files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a cat", "utf-8")
    with pytest.raises(TercetError, match=r"a\.png"):
        evaluate(model, str(tmp_path))
    with pytest.raises(TercetError, match="tokenizer"):
        evaluate(Tercet(model.config), files["retrieval"])


@torch.no_grad()
def test_texts_encoded_by_length_keep_their_order(model: Tercet) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (20,), generator=generator)
    input_ids = torch.randint(10, 50, (20, 12), generator=generator)
    texts = encode_texts(model, input_ids, torch.arange(12)[None] < lengths[:, None])
    for ids, length, feats, embeds in zip(input_ids, lengths, texts.text_feats, texts.text_embeds, strict=True):
        alone = model.encode_text(ids[None, :length], torch.ones(1, int(length), dtype=torch.bool))[0]
        torch.testing.assert_close(embeds, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(feats, model.project_text(alone[0]), rtol=1e-5, atol=1e-5)


def cost(lengths: list[int], groups: list[list[int]], pass_cost: int) -> int:
    return sum(len(group) * max(lengths[index] for index in group) + pass_cost for group in groups)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(0, 30))
def test_no_other_groups_of_texts_cost_less(lengths: list[int], pass_cost: int) -> None:
    groups = group_by_length(lengths, pass_cost)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(lengths)))
    distinct = sorted(set(lengths))
    others = []
    for cuts in itertools.product([False, True], repeat=max(0, len(distinct) - 1)):
        edges = [length for length, cut in zip(distinct[1:], cuts, strict=True) if cut]
        bins: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            bins.setdefault(sum(length >= edge for edge in edges), []).append(index)
        others.append(cost(lengths, list(bins.values()), pass_cost))
    assert cost(lengths, groups, pass_cost) == min(others)
