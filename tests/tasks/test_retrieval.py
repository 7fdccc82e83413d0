"""Retrieval: query_ranks with ties, image memory against pairs one by one, broken images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.config import Config, DataConfig, ModelConfig
from tercet.data.readers import open_sources
from tercet.data.scenes import SceneSource
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.encoding import encode_texts
from tercet.tasks.rerank import TextTokens, candidate_pairs, match_image, match_images, pad_texts, score_image
from tercet.tasks.retrieval import RetrievalResult, Scores, query_ranks, recall
from tercet.tasks.task import evaluate_task


@pytest.fixture(scope="module")
def model() -> Tercet:
    torch.manual_seed(0)
    source = SceneSource(30, "train")
    tokenizer = Tokenizer.train((c for i in range(30) for c in source.captions(i)), 200)
    sizes = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "cls_id": tokenizer.cls_id,
        "sep_id": tokenizer.sep_id,
        "mask_id": tokenizer.mask_id,
        "pad_id": tokenizer.pad_id,
    }
    built = Tercet(ModelConfig.model_validate({"size": "tiny", "text": sizes})).eval()
    built.tokenizer = tokenizer
    return built


def config(**evaluate_fields: int) -> Config:
    return Config.model_validate({"data": {"workers": 0}, "evaluate": {"batch_size": 8, **evaluate_fields}})


def test_ties_count_against_the_right_one() -> None:
    scores = Scores(torch.zeros(3, 6), torch.zeros(6, 3))
    owners = torch.tensor([0, 0, 1, 1, 2, 2])
    text_ranks, image_ranks = query_ranks(scores, owners)
    assert text_ranks.tolist() == [4, 4, 4]
    assert image_ranks.tolist() == [2] * 6
    assert recall(scores, owners)["image_r1"] == 0


def test_perfect_scores() -> None:
    owners = torch.tensor([0, 0, 1, 2])
    right = (owners[None] == torch.arange(3)[:, None]).float()
    result = recall(Scores(right, right.T.contiguous()), owners)
    assert all(value == 100 for value in result.values())


def test_candidates_are_the_best_of_each_query_and_no_more_than_there_are() -> None:
    similarities = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 4.0]])
    by_image, by_text = candidate_pairs(similarities, 1)
    assert by_image.tolist() == [[True, False, False], [False, True, False]]
    assert by_text.tolist() == [[True, False, False], [False, True, True]]
    by_image, by_text = candidate_pairs(similarities, 50)
    assert by_image.all() and by_text.all()


def test_scores_of_an_image_equal_its_pairs_one_by_one(model: Tercet) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embeds = model.encode_image(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=generator))[0]
        texts = [torch.randn(length, 128, generator=generator) for length in (3, 9, 1, 5, 9)]
        together = score_image(model, embeds, texts, batch_tokens=20)
        for text, score in zip(texts, together, strict=True):
            padded, mask = pad_texts([text])
            alone = model.match_logits(padded, mask, model.project_kv(embeds[None]))[0, 1]
            torch.testing.assert_close(score, alone, rtol=1e-5, atol=1e-5)


def test_scores_of_several_images_equal_those_of_each_alone(model: Tercet) -> None:
    generator = torch.Generator().manual_seed(2)
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    texts = [torch.randn(length, 128, generator=generator) for length in (3, 9, 1, 5, 9, 2, 7)]
    wanted = [np.array([4, 0, 2]), np.array([], dtype=np.int64), np.arange(7), np.array([6, 5, 3, 1])]
    with torch.no_grad():
        embeds = model.encode_image(pictures)
        bank = TextTokens.of(texts, torch.device("cpu"))
        for block, batch_tokens in ((1, 9), (2, 30), (3, 1000)):
            found = match_images(model, embeds, bank, wanted, batch_tokens, block)
            assert [len(logits) for logits in found] == [3, 0, 7, 4]
            for own, chosen, logits in zip(embeds, wanted, found, strict=True):
                alone = match_image(model, own, [texts[index] for index in chosen])
                torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    assert match_images(model, embeds[:0], bank, []) == []


def test_beyond_the_candidates_the_dual_order_stays(model: Tercet) -> None:
    source = SceneSource(12, "test", distinct=True)
    dual = evaluate_task("retrieval", model, source, config(rerank=0))
    some = evaluate_task("retrieval", model, source, config(rerank=3))
    assert "reranked" in some.metrics and "reranked" not in dual.metrics and isinstance(dual, RetrievalResult)
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


def test_broken_images_are_left_out_with_their_captions(model: Tercet, tmp_path: Path) -> None:
    source = SceneSource(6, "test", distinct=True)
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(source.image(index) if index != 2 else b"<html>not found</html>")
        (tmp_path / f"{index}.txt").write_text("\n".join(source.captions(index)), "utf-8")
    opened = open_sources([str(tmp_path)], DataConfig(), "test")
    result = evaluate_task("retrieval", model, opened, config(rerank=4))
    assert len(result.images.keys) == 5 and len(result.captions) == 5
    assert len(result.problems) == 1 and "2.png" in result.problems[0]
    clean = tmp_path / "clean"
    clean.mkdir()
    for index in (0, 1, 3, 4, 5):
        (clean / f"{index}.png").write_bytes(source.image(index))
        (clean / f"{index}.txt").write_text("\n".join(source.captions(index)), "utf-8")
    expected = evaluate_task(
        "retrieval", model, open_sources([str(clean)], DataConfig(), "test"), config(rerank=4)
    ).metrics
    for name, metrics in result.metrics.items():
        assert metrics == pytest.approx(expected[name])


def test_nothing_readable_is_one_error(model: Tercet, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a cat", "utf-8")
    with pytest.raises(TercetError, match=r"a\.png"):
        evaluate_task("retrieval", model, open_sources([str(tmp_path)], DataConfig(), "test"), config())


def test_a_model_without_a_tokenizer_says_what_to_do(model: Tercet) -> None:
    bare = Tercet(model.config).eval()
    with pytest.raises(TercetError, match="tokenizer"):
        evaluate_task("retrieval", bare, SceneSource(4, "test"), config())


def test_limit(model: Tercet) -> None:
    result = evaluate_task("retrieval", model, SceneSource(12, "test"), config(rerank=0, limit=5))
    assert len(result.images.keys) == 5


def test_texts_encoded_by_length_keep_their_order(model: Tercet) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (20,), generator=generator)
    input_ids = torch.randint(10, 100, (20, 12), generator=generator)
    texts = encode_texts(model, input_ids, torch.arange(12)[None] < lengths[:, None])
    for ids, length, feats, embeds in zip(input_ids, lengths, texts.text_feats, texts.text_embeds, strict=True):
        with torch.no_grad():
            alone = model.encode_text(ids[None, :length], torch.ones(1, int(length), dtype=torch.bool))[0]
            expected = model.project_text(alone[0])
        torch.testing.assert_close(embeds, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(feats, expected, rtol=1e-5, atol=1e-5)
