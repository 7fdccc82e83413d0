"""Answers from the decoder: ranked from a list, or written freely by greedy or beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.config import TextConfig, VqaConfig
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.model.heads import AnswerDecoder
from tercet.model.hub import require_tokenizer
from tercet.model.layers import TokenCache
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttentionKV

BLOCK = 32  # candidates of a question that are scored at once
HEAD_ROWS = 2048  # rows of vocabulary logits that are held at once


def question_states(
    model: Tercet, images: Tensor, input_ids: Tensor, attention_mask: Tensor, image_rows: Tensor | None = None
) -> Tensor:
    """Questions fused with their images, every token of them.

    Args:
        model: the encoders.
        images: `[images, 3, height, width]`.
        input_ids: `[questions, tokens]`.
        attention_mask: `[questions, tokens]`.
        image_rows: `[questions]`, the image of each question; None: each has its own.

    Returns:
        `question_states` `[questions, tokens, width]`.
    """
    memory = model.project_kv(model.encode_image(images))
    if image_rows is not None:
        memory = memory.select(image_rows)
    return model.fuse(model.encode_text(input_ids, attention_mask), attention_mask, memory)


def decoder_of(model: Tercet) -> AnswerDecoder:
    """The model's answer decoder.

    Raises:
        TercetError: it has none.
    """
    model.require_heads(["answer"], "vqa")
    assert model.answer_decoder is not None
    return model.answer_decoder


@dataclass
class AnswerList:
    """Answers to choose from, as word pieces.

    Attributes:
        texts: the answers.
        input_ids: `[answers, tokens]`; `[CLS]`, the answer, `[SEP]`, padding.
        lengths: `[answers]`, tokens that are not padding.
    """

    texts: list[str]
    input_ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str) -> AnswerList:
        """The same on another device."""
        return AnswerList(self.texts, self.input_ids.to(device), self.lengths.to(device))


def encode_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> AnswerList:
    """Word pieces of answers, `[CLS]` in front and `[SEP]` at the end.

    Raises:
        TercetError: there are no answers.
    """
    if not answers:
        raise TercetError("the list of answers is empty; give at least one")
    input_ids, attention_mask = tokenizer.encode([text + tokenizer.sep_token for text in answers], None)
    return AnswerList(list(answers), input_ids, attention_mask.sum(dim=1))


def first_pieces(model: Tercet) -> Tensor | None:
    """Word pieces that the answers of a model's list begin with, on its device; None where it writes freely."""
    if model.answers is None:
        return None
    answers = encode_answers(require_tokenizer(model), model.answers)
    return answers.input_ids[:, 1].unique().to(model.temperature.device)


@dataclass
class RankedAnswers:
    """The best answers of a list to each question, the best first.

    Attributes:
        indices: `[questions, k]` in the list.
        log_probabilities: `[questions, k]` of the whole answer; under `published`, the first word piece counts twice.
        probabilities: `[questions, k]`, among the k alone.
    """

    indices: Tensor
    log_probabilities: Tensor
    probabilities: Tensor


@torch.no_grad()
def rank_answers(
    decoder: AnswerDecoder,
    question_states: Tensor,
    question_mask: Tensor,
    answers: AnswerList,
    k: int = 128,
    published: bool = False,
) -> RankedAnswers:
    """Rank the answers of a list: `k` are chosen by their first word piece, and those scored in full.

    Args:
        decoder: in evaluation mode.
        question_states: `[questions, tokens, width]`, every token of the fused questions.
        question_mask: `[questions, tokens]`.
        answers: the list, on the decoder's device.
        k: answers that are scored in full; all of them where the list is shorter.
        published: count the first word piece twice, as the published code does.
    """
    memory = decoder.project_kv(question_states, question_mask)
    cache = TokenCache()
    first_log = next_log_probabilities(decoder, answers.input_ids[:1, :1].expand(len(memory), 1), memory, cache)
    first = first_log[:, answers.input_ids[:, 1]]
    first, candidates = first.topk(max(1, min(k, len(answers))), dim=1)
    rest = _score_rest(decoder, memory, cache, answers, candidates)
    scores = first + rest + (first if published else 0)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return RankedAnswers(candidates.gather(1, order), scores, scores.softmax(dim=1))


def next_log_probabilities(
    decoder: AnswerDecoder, input_ids: Tensor, memory: CrossAttentionKV, cache: TokenCache | None = None
) -> Tensor:
    """`[answers, vocabulary]` behind one more token `[answers, 1]` of each answer; without a cache the first."""
    return decoder.logits(decoder(input_ids, memory, cache)[:, 0]).float().log_softmax(dim=-1)


def _score_rest(
    decoder: AnswerDecoder, memory: CrossAttentionKV, cache: TokenCache, answers: AnswerList, candidates: Tensor
) -> Tensor:
    """Log-probability `[questions, k]` of what follows the first word piece of `candidates` `[questions, k]`.

    `cache` has read `[CLS]` of every question.  Candidates of like length go together, so that little is padding.
    """
    scores = torch.zeros(candidates.shape, device=candidates.device)
    columns = answers.lengths[candidates].argsort(dim=1)
    for block in columns.split(BLOCK, dim=1):
        chosen = candidates.gather(1, block)
        lengths = answers.lengths[chosen].flatten()
        longest = int(lengths.max())
        if longest <= 2:  # nothing follows a first word piece that is [SEP]
            continue
        ids = answers.input_ids[chosen.flatten(), 1:longest]
        rows = torch.arange(len(memory), device=ids.device).repeat_interleave(block.shape[1])
        states = decoder(ids[:, :-1], memory, cache.select(rows))
        real = torch.arange(2, longest, device=ids.device) < lengths[:, None]
        guessed = torch.zeros(real.shape, device=ids.device)
        guessed[real] = _log_probabilities_of(decoder, states[real], ids[:, 1:][real])
        scores.scatter_(1, block, guessed.sum(dim=1).view_as(block))
    return scores


def _log_probabilities_of(decoder: AnswerDecoder, states: Tensor, labels: Tensor) -> Tensor:
    """Log-probability `[guesses]` of `labels` behind `states` `[guesses, width]`, a part at a time."""
    parts = []
    for some_states, some_labels in zip(states.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True):
        logits = decoder.logits(some_states).float()
        parts.append(logits.gather(1, some_labels[:, None]).squeeze(1) - logits.logsumexp(dim=1))
    return torch.cat(parts)


@dataclass
class WrittenAnswers:
    """The answer that the decoder wrote to each question.

    Attributes:
        input_ids: `[questions, tokens]` without `[CLS]`; padded behind the end.
        scores: `[questions]`, log-probability over the length to the power of the length penalty.
    """

    input_ids: Tensor
    scores: Tensor


@torch.no_grad()
def write_answers(
    decoder: AnswerDecoder,
    question_states: Tensor,
    question_mask: Tensor,
    text: TextConfig,
    beams: int = 1,
    max_tokens: int = 12,
    length_penalty: float = 1.0,
) -> WrittenAnswers:
    """Write answers freely: the likeliest word piece at each step, or a beam of the likeliest beginnings.

    Args:
        decoder: in evaluation mode.
        question_states: `[questions, tokens, width]`, every token of the fused questions.
        question_mask: `[questions, tokens]`.
        text: names the special ids.
        beams: beginnings that are followed; 1 is greedy search.
        max_tokens: word pieces after which an answer is cut off.
        length_penalty: power of the length that log-probabilities are divided by; above 0 favours longer answers.

    Raises:
        TercetError: `beams` or `max_tokens` is below 1.
    """
    if beams < 1 or max_tokens < 1:
        raise TercetError(f"cannot write answers with {beams} beams of {max_tokens} tokens; give 1 of each at least")
    search = _BeamSearch(len(question_states), beams, max_tokens, length_penalty, text, question_states.device)
    memory = decoder.project_kv(question_states, question_mask)
    cache = TokenCache()
    for _ in range(min(max_tokens, decoder.position_embed.num_embeddings)):
        log_probabilities = next_log_probabilities(decoder, search.last_tokens, memory, cache)
        rows = search.advance(log_probabilities)
        if bool(search.done.all()):
            break
        cache = cache.select(rows)
    return search.finish()


class _BeamSearch:
    """Beginnings of answers that are followed, and answers that have ended, of a set of questions.

    An answer that ends with a score among the `beams` best continuations is kept; a question is done when it has
    `beams` of them.  With one beam that is greedy search.
    """

    def __init__(
        self, questions: int, beams: int, max_tokens: int, penalty: float, text: TextConfig, device: torch.device
    ) -> None:
        self.beams, self.max_tokens, self.penalty, self.text = beams, max_tokens, penalty, text
        shape = (questions, beams)
        self.written = torch.full((*shape, max_tokens), text.pad_id, device=device)
        self.scores = torch.full(shape, float("-inf"), device=device)
        self.scores[:, 0] = 0  # all beams begin alike, so one stands for all
        self.ended = self.written.clone()
        self.ended_scores = torch.full(shape, float("-inf"), device=device)
        self.done = torch.zeros(questions, dtype=torch.bool, device=device)
        self.length = 0

    @property
    def last_tokens(self) -> Tensor:
        """`[questions * beams, 1]`, the token that each beginning ends with."""
        if self.length == 0:
            return torch.full((self.scores.numel(), 1), self.text.cls_id, device=self.scores.device)
        return self.written[:, :, self.length - 1].reshape(-1, 1)

    def advance(self, log_probabilities: Tensor) -> Tensor:
        """Take the next token.

        Args:
            log_probabilities: `[questions * beams, vocabulary]` of the token behind each beginning.

        Returns:
            For each new beginning `[questions * beams]`, the row of the one that it goes on from.
        """
        questions, beams = self.scores.shape
        never = torch.tensor([self.text.pad_id, self.text.cls_id, self.text.mask_id], device=log_probabilities.device)
        vocabulary = log_probabilities.shape[1]
        scores = log_probabilities.index_fill(1, never, float("-inf")).view(questions, beams, vocabulary)
        scores = (scores + self.scores[..., None]).flatten(1)
        scores, places = scores.topk(min(2 * beams, scores.shape[1]), dim=1)
        origins, tokens = places // vocabulary, places % vocabulary
        written = self.written.gather(1, origins[..., None].expand(-1, -1, self.max_tokens))
        written[:, :, self.length] = tokens
        self.length += 1
        ends = tokens == self.text.sep_id
        among_best = torch.arange(tokens.shape[1], device=tokens.device) < beams
        self._keep_ended(written, scores.masked_fill(~(ends & among_best), float("-inf")))
        self.scores, kept = scores.masked_fill(ends, float("-inf")).topk(beams, dim=1)
        self.written = written.gather(1, kept[..., None].expand(-1, -1, self.max_tokens))
        first_row = torch.arange(questions, device=kept.device)[:, None] * beams
        return (first_row + origins.gather(1, kept)).flatten()

    def _keep_ended(self, written: Tensor, scores: Tensor) -> None:
        """Merge answers `[questions, some, tokens]`, of summed log-probability `[questions, some]`, into the ended."""
        scores = (scores / self.length**self.penalty).masked_fill(self.done[:, None], float("-inf"))
        scores, best = torch.cat([self.ended_scores, scores], dim=1).topk(self.beams, dim=1)
        both = torch.cat([self.ended, written], dim=1)
        self.ended, self.ended_scores = both.gather(1, best[..., None].expand(-1, -1, self.max_tokens)), scores
        self.done = scores.isfinite().all(dim=1)

    def finish(self) -> WrittenAnswers:
        """The best answer of each question; beginnings that never ended count as they stand."""
        self._keep_ended(self.written, self.scores)
        return WrittenAnswers(self.ended[:, 0], self.ended_scores[:, 0])


@dataclass
class Answer:
    """The answer to a question.

    Attributes:
        text: the answer.
        score: its probability among the candidates of a list; of a written answer, the geometric mean of those of its
            word pieces (with a length penalty of 1).
        others: the next best of a list and their probabilities; empty for a written answer.
    """

    text: str
    score: float
    others: list[tuple[str, float]]


class Answerer:
    """Answers questions with a model, by a list of answers or freely.

    Attributes:
        texts: the list; None when answers are written freely.
    """

    def __init__(
        self, model: Tercet, config: VqaConfig, answers: Sequence[str] | None, published: bool = False, others: int = 4
    ) -> None:
        """Make ready.

        Args:
            model: with the head `answer` and its tokenizer, in evaluation mode by the time it answers.
            config: how to answer.
            answers: the list to choose from; None where there is none.
            published: rank as the published code does.
            others: how many next best answers to tell.

        Raises:
            TercetError: the model lacks decoder or tokenizer, or `config` asks to rank and there is no list.
        """
        self.model, self.config, self.published, self.others = model, config, published, others
        self.decoder = decoder_of(model)
        self.tokenizer = require_tokenizer(model)
        if config.inference == "rank" and answers is None:
            raise TercetError("there is no list of answers to rank; name one with --vqa.answers, or let it write them")
        self.texts = None if config.inference == "generate" or answers is None else list(answers)
        self.device = next(model.parameters()).device
        self._list = None if self.texts is None else encode_answers(self.tokenizer, self.texts).to(self.device)

    @torch.no_grad()
    def answer(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, image_rows: Tensor | None = None
    ) -> list[Answer]:
        """The answers to a batch of questions.

        The arguments are those of `question_states`, on any device; `image_rows` may be `[questions, 1]` as well, as in
        a `SampleBatch`.
        """
        images, input_ids, mask = (part.to(self.device) for part in (images, input_ids, attention_mask))
        rows = None if image_rows is None else image_rows.flatten().to(self.device)
        states = question_states(self.model, images, input_ids, mask, rows)
        return self._write(states, mask) if self._list is None else self._rank(states, mask, self._list)

    def _rank(self, states: Tensor, mask: Tensor, answers: AnswerList) -> list[Answer]:
        ranked = rank_answers(self.decoder, states, mask, answers, self.config.candidates, self.published)
        shown = self.others + 1
        found: list[Answer] = []
        for row, probabilities in zip(
            ranked.indices[:, :shown].tolist(), ranked.probabilities[:, :shown].tolist(), strict=True
        ):
            best, *others = [(answers.texts[index], value) for index, value in zip(row, probabilities, strict=True)]
            found.append(Answer(*best, others))
        return found

    def _write(self, states: Tensor, mask: Tensor) -> list[Answer]:
        config = self.config
        text = self.model.config.text
        written = write_answers(
            self.decoder, states, mask, text, config.beams, config.max_answer_tokens, config.length_penalty
        )
        scores = written.scores.exp().tolist()
        ids = written.input_ids.tolist()
        return [Answer(self.tokenizer.decode(row), score, []) for row, score in zip(ids, scores, strict=True)]
