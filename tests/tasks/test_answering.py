"""Ranking and generation of answers: what caching and batching must not change, and searches against plain ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tercet.config import ModelConfig, VqaConfig
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.model.heads import AnswerDecoder
from tercet.model.layers import TokenCache
from tercet.model.tercet import Tercet
from tercet.tasks.answering import Answerer, AnswerList, encode_answers, fuse_questions, generate_answers, rank_answers

TEXT = {"vocabulary_size": 20, "max_positions": 9, "width": 16, "mlp_width": 16, "depth": 4, "fusion_layer": 2}
TEXT |= {"heads": 2, "pad_id": 0, "cls_id": 2, "sep_id": 3, "mask_id": 4}
VISION = {"image_size": 16, "patch_size": 8, "width": 12, "depth": 1, "heads": 2}
SIZES = {"vision": VISION, "text": TEXT, "embed_dim": 4, "heads": ["answer"]}
CLS, SEP = 2, 3
FORBIDDEN = (0, 2, 4)  # padding, [CLS] and [MASK] are never generated


@dataclass
class Case:
    decoder: AnswerDecoder
    states: Tensor
    mask: Tensor


@pytest.fixture(scope="module")
def model() -> Tercet:
    torch.manual_seed(5)
    model = Tercet(ModelConfig.model_validate(SIZES)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def case(model: Tercet) -> Case:
    assert model.answer_decoder is not None
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    return Case(model.answer_decoder, torch.randn(3, 6, 16, generator=generator), mask)


@torch.no_grad()
def log_probability(case: Case, question: int, answer: list[int]) -> float:
    """Of what follows [CLS], without cache or batch, over the real question states alone."""
    length = int(case.mask[question].sum())
    states = case.states[question : question + 1, :length]
    kv = case.decoder.project_kv(states, torch.ones(1, length, dtype=torch.bool))
    ids = torch.tensor([[CLS, *answer]])
    logits = case.decoder.logits(case.decoder(ids[:, :-1], kv)).log_softmax(dim=-1)
    return logits[0].gather(1, ids[0, 1:, None]).sum().item()


def list_of(answers: list[list[int]]) -> AnswerList:
    longest = max(map(len, answers)) + 1
    ids = torch.tensor([[CLS, *answer] + [0] * (longest - 1 - len(answer)) for answer in answers])
    lengths = torch.tensor([len(answer) + 1 for answer in answers])
    return AnswerList([str(answer) for answer in answers], ids, lengths)


def some_answers(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    return [[*torch.randint(5, 20, (length,), generator=generator).tolist(), SEP] for length in lengths]


def test_a_cache_changes_nothing(case: Case) -> None:
    ids = torch.randint(5, 20, (6, 7), generator=torch.Generator().manual_seed(2))
    kv = case.decoder.project_kv(case.states, case.mask)
    whole = case.decoder(ids, kv)
    cache = TokenCache()
    pieces = [case.decoder(ids[:, :3], kv, cache), case.decoder(ids[:, 3:4], kv, cache)]
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    reversed_cache = cache.select(order)
    rest = case.decoder(ids[:, 4:], kv, cache)
    assert len(cache) == 7 and len(reversed_cache) == 4
    torch.testing.assert_close(torch.cat([*pieces, rest], dim=1), whole, rtol=1e-5, atol=1e-5)
    # The answers of a question are adjacent, so reversed rows read the questions reversed too.
    back = case.decoder(ids[order, 4:], kv.select(torch.tensor([2, 1, 0])), reversed_cache)
    torch.testing.assert_close(back[order], rest, rtol=1e-5, atol=1e-5)


def test_no_position_sees_its_right_or_the_padding_of_the_question(case: Case) -> None:
    ids = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(2))
    kv = case.decoder.project_kv(case.states, case.mask)
    changed_states = torch.where(case.mask[..., None], case.states, case.states + 3)
    changed_ids = torch.cat([ids[:, :4], ids[:, 4:] - 1], dim=1)
    first = case.decoder(ids, kv)
    second = case.decoder(changed_ids, case.decoder.project_kv(changed_states, case.mask))
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])
    with pytest.raises(TercetError, match="an answer of 10 tokens is longer than the model's 9 positions"):
        case.decoder(torch.full((3, 10), 7), kv)


@pytest.mark.parametrize("k", [1, 7, 40, 1000])
def test_ranking_equals_scoring_each_answer_alone(case: Case, k: int) -> None:
    answers = some_answers(70)
    ranked = rank_answers(case.decoder, case.states, case.mask, list_of(answers), k)
    assert ranked.indices.shape == (3, min(k, 70))
    for question in range(3):
        first = torch.tensor([log_probability(case, question, answer[:1]) for answer in answers])
        full = torch.tensor([log_probability(case, question, answer) for answer in answers])
        border = first.topk(min(k, 70)).values[-1]
        chosen = ranked.indices[question]
        assert len(set(chosen.tolist())) == len(chosen)
        assert (first[chosen] >= border - 1e-5).all()
        torch.testing.assert_close(ranked.log_probabilities[question], full[chosen], rtol=1e-4, atol=1e-4)
    assert (ranked.log_probabilities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(ranked.probabilities.sum(dim=1), torch.ones(3))
    empty = rank_answers(case.decoder, case.states, case.mask, list_of([[SEP]]))
    assert empty.log_probabilities[0, 0].item() == pytest.approx(log_probability(case, 0, [SEP]), abs=1e-4)


def search(case: Case, question: int, beams: int, max_tokens: int, penalty: float) -> tuple[list[int], float]:
    """The same search, one question and one prefix at a time."""
    alive: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for length in range(1, max_tokens + 1):
        found = []
        for prefix, _ in alive:
            for token in range(20):
                if token not in FORBIDDEN:
                    found.append(([*prefix, token], log_probability(case, question, [*prefix, token])))
        found.sort(key=lambda item: -item[1])
        ended += [(ids, value / length**penalty) for ids, value in found[:beams] if ids[-1] == SEP]
        alive = [item for item in found if item[0][-1] != SEP][:beams]
        if len(ended) >= beams:
            break
    else:
        ended += [(ids, value / max_tokens**penalty) for ids, value in alive]
    return max(ended, key=lambda item: item[1])


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (4, 2.0)])
def test_beam_search_equals_a_plain_search(case: Case, beams: int, penalty: float) -> None:
    # A bias for [SEP], so that answers end at different lengths.
    with torch.no_grad():
        case.decoder.head.bias[SEP] += 3
    try:
        text = ModelConfig.model_validate(SIZES).text
        generated = generate_answers(case.decoder, case.states, case.mask, text, beams, 6, penalty)
        lengths = set()
        for question in range(3):
            ids, value = search(case, question, beams, 6, penalty)
            lengths.add(len(ids))
            assert generated.input_ids[question].tolist() == ids + [0] * (6 - len(ids))
            assert generated.scores[question].item() == pytest.approx(value, abs=1e-4)
        assert min(lengths) < 6
    finally:
        with torch.no_grad():
            case.decoder.head.bias[SEP] -= 3


def test_generation_stops_at_the_end_of_the_positions(case: Case) -> None:
    text = ModelConfig.model_validate(SIZES).text
    generated = generate_answers(case.decoder, case.states, case.mask, text, 2, 50)
    assert generated.input_ids.shape == (3, 50)
    assert (generated.input_ids[:, 9:] == 0).all()
    with pytest.raises(TercetError, match="0 beams"):
        generate_answers(case.decoder, case.states, case.mask, text, 0)


def test_answerer_ranks_or_generates(model: Tercet) -> None:
    words = Tokenizer.train(["red blue green yes no"] * 3, 64)
    ids = {name: getattr(words, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
    text = TEXT | ids | {"vocabulary_size": words.vocabulary_size, "max_positions": 24}
    reader = Tercet(ModelConfig.model_validate({**SIZES, "text": text})).eval()
    with pytest.raises(TercetError, match="no tokenizer"):
        Answerer(reader, VqaConfig(), None)
    reader.tokenizer = words
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    input_ids, mask = words.encode(["red", "blue green", "yes"], None)
    rows = torch.tensor([1, 0, 1])
    options = ["red", "blue green", "yes", "no"]
    ranking = Answerer(reader, VqaConfig(), options, others=2)
    answers = ranking.answer(images, input_ids, mask, rows)
    assert len(answers) == 3 and all(answer.text in options and len(answer.others) == 2 for answer in answers)
    assert all(answer.score >= answer.others[0][1] >= answer.others[1][1] for answer in answers)
    alone = ranking.answer(images[1:], input_ids[2:, :2], mask[2:, :2])[0]
    assert alone.text == answers[2].text and alone.score == pytest.approx(answers[2].score, abs=1e-5)
    generating = Answerer(reader, VqaConfig(inference="generate", max_answer_tokens=3), options)
    assert generating.texts is None
    for answer in generating.answer(images, input_ids, mask, rows):
        assert 0 < answer.score <= 1 and not answer.others
    with pytest.raises(TercetError, match=r"no list of answers to rank; name one with --vqa\.answers"):
        Answerer(reader, VqaConfig(inference="rank"), None)
    with pytest.raises(TercetError, match="the list of answers is empty"):
        encode_answers(words, [])
    assert fuse_questions(reader, images, input_ids, mask, rows).shape == (3, input_ids.shape[1], 16)
