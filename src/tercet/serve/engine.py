"""What a batch of requests asks of the model: many jobs of a kind in, as many results out, encoders called once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tercet.config import DataConfig, VqaConfig
from tercet.data.augment import Pixels
from tercet.data.inputs import to_batch
from tercet.data.tokenizer import clean_question
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.answering import Answer, Answerer
from tercet.tasks.classify import TEMPLATES, class_feats, zero_shot
from tercet.tasks.encoding import encode_sentences, evaluating, tokenise
from tercet.tasks.explaining import Explanation
from tercet.tasks.rerank import pad_texts

if TYPE_CHECKING:
    from tercet.search.index import Hit
    from tercet.search.search import Query, Searcher

_DATA = DataConfig()
_KEPT = 32  # sets of classes whose features are kept


@dataclass(frozen=True)
class MatchJob:
    """One image against texts.

    Attributes:
        pixels: uint8 `[height, width, 3]`.
        texts: the texts.
    """

    pixels: Pixels
    texts: list[str]


@dataclass(frozen=True)
class ClassifyJob:
    """One image and the labels to choose from.

    Attributes:
        pixels: uint8 `[height, width, 3]`.
        labels: names of the classes.
        templates: sentences that name them; none: the default ones.
    """

    pixels: Pixels
    labels: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class AskJob:
    """One image and a question; the answers to choose from are the kind of the batch.

    Attributes:
        pixels: uint8 `[height, width, 3]`.
        question: the question.
    """

    pixels: Pixels
    question: str


@dataclass(frozen=True)
class EmbedJob:
    """Images and texts, any number of both.

    Attributes:
        pixels: uint8 `[height, width, 3]` each.
        texts: the texts.
    """

    pixels: list[Pixels]
    texts: list[str]


@dataclass(frozen=True)
class ExplainJob:
    """One image and the text whose place in it is sought.

    Attributes:
        pixels: uint8 `[height, width, 3]`.
        text: the text.
    """

    pixels: Pixels
    text: str


@dataclass(frozen=True)
class Matched:
    """How a text fits an image.

    Attributes:
        match: the probability that they belong together, by the fusion encoder.
        cosine: their similarity by the dual encoder.
    """

    match: float
    cosine: float


class Engine:
    """Runs batches on a model.  Not for several threads at once: the batcher's one thread calls it."""

    def __init__(self, model: Tercet, searcher: Searcher | None = None, answering: Tercet | None = None) -> None:
        """Make ready.

        Args:
            model: searches, matches, classifies, embeds and explains.
            searcher: over the index, with the same model; None where nothing is searched.
            answering: answers questions; default `model`.
        """
        self.model, self.searcher, self.answering = model, searcher, answering or model
        self._size = model.config.vision.image_size
        self._classes: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = OrderedDict()
        self._answerer = self._make_answerer(None) if self.answers_questions else None
        self._runs: dict[str, Callable[[list, tuple], Sequence]] = {
            "match": self._match,
            "classify": self._classify,
            "ask": self._ask,
            "embed": self._embed,
            "explain": self._explain,
            "search": self._search,
        }

    @property
    def answers_questions(self) -> bool:
        """Whether the model that answers was fine-tuned for questions."""
        return "answer" in self.answering.config.heads

    def run(self, kind: Hashable, jobs: list) -> Sequence:
        """Results of `jobs` in order; `kind` is a name and what all its jobs share.

        Raises:
            TercetError: a job has a text without words, a label twice, or asks for what the model lacks.
        """
        assert isinstance(kind, tuple)
        name, *shared = kind
        with evaluating(self.model), evaluating(self.answering):
            return self._runs[name](jobs, tuple(shared))

    def _match(self, jobs: list[MatchJob], _: tuple) -> list[list[Matched]]:
        image_embeds = self._encode([job.pixels for job in jobs])
        image_feats = self.model.project_image(image_embeds[:, 0]).cpu()
        encoded = encode_sentences(self.model, [text for job in jobs for text in job.texts], _DATA)
        results: list[list[Matched]] = [[] for _ in jobs]
        starts = _starts([len(job.texts) for job in jobs])
        for count in sorted({len(job.texts) for job in jobs}):
            # Images with equally many texts share a pass, and none of their keys and values is copied.
            rows = [index for index, job in enumerate(jobs) if len(job.texts) == count]
            texts = [starts[row] + number for row in rows for number in range(count)]
            padded, mask = pad_texts([encoded.text_embeds[index].to(image_embeds.device) for index in texts])
            logits = self.model.match_logits(padded, mask, self.model.project_kv(image_embeds[rows]))
            chances = logits.softmax(dim=1)[:, 1].cpu().unflatten(0, (len(rows), count))
            for place, row in enumerate(rows):
                cosines = encoded.text_feats[starts[row] : starts[row] + count] @ image_feats[row]
                results[row] = [Matched(*pair) for pair in zip(chances[place].tolist(), cosines.tolist(), strict=True)]
        return results

    def _classify(self, jobs: list[ClassifyJob], _: tuple) -> list[dict[str, float]]:
        feats = self.model.project_image(self._encode([job.pixels for job in jobs])[:, 0]).cpu()
        results = []
        for job, own in zip(jobs, feats, strict=True):
            classes = self._class_feats(job.labels, job.templates or TEMPLATES)
            chances = zero_shot(own[None], classes, self.model.temperature.item())[0]
            order = chances.argsort(descending=True, stable=True).tolist()
            results.append({job.labels[index]: chances[index].item() for index in order})
        return results

    def _class_feats(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Features of classes; those asked for last are kept, since the same labels come with picture after picture."""
        key = (labels, templates)
        if key not in self._classes:
            self._classes[key] = class_feats(self.model, labels, templates, _DATA)
        self._classes.move_to_end(key)
        while len(self._classes) > _KEPT:
            self._classes.popitem(last=False)
        return self._classes[key]

    def _ask(self, jobs: list[AskJob], shared: tuple) -> list[Answer]:
        answers: tuple[str, ...] = shared[0]
        answerer = self._make_answerer(answers) if answers or self._answerer is None else self._answerer
        sizes = self.answering.config
        limits = {"max_words": answerer.config.max_words, "max_tokens": sizes.text.max_positions}
        data = _DATA.model_copy(update=limits)
        input_ids, mask = tokenise(self.answering, [job.question for job in jobs], data, clean_question)
        return answerer.answer(to_batch([job.pixels for job in jobs], sizes.vision.image_size), input_ids, mask)

    def _make_answerer(self, answers: tuple[str, ...] | None) -> Answerer:
        return Answerer(self.answering, VqaConfig(), list(answers) if answers else self.answering.answers)

    def _embed(self, jobs: list[EmbedJob], _: tuple) -> list[tuple[list[list[float]], list[list[float]]]]:
        """`image_feats` and `text_feats` of each job."""
        pixels = [own for job in jobs for own in job.pixels]
        texts = [text for job in jobs for text in job.texts]
        image_feats = self.model.project_image(self._encode(pixels)[:, 0]).tolist() if pixels else []
        text_feats = encode_sentences(self.model, texts, _DATA).text_feats.tolist() if texts else []
        images, sentences = _starts([len(job.pixels) for job in jobs]), _starts([len(job.texts) for job in jobs])
        return [
            (image_feats[images[row] : images[row + 1]], text_feats[sentences[row] : sentences[row + 1]])
            for row in range(len(jobs))
        ]

    def _explain(self, jobs: list[ExplainJob], shared: tuple) -> list[Explanation]:
        (mode,) = shared
        model = self.answering if mode == "answer" else self.model
        found = model.explain([job.pixels for job in jobs], [job.text for job in jobs], mode=mode)
        assert isinstance(found, list)
        return found

    def _search(self, queries: list[Query], _: tuple) -> list[list[Hit]]:
        if self.searcher is None:
            raise TercetError("there is no index to search; open one first")
        return self.searcher.search_many(queries)

    def _encode(self, pixels: list[Pixels]) -> Tensor:
        """`image_embeds` `[images, 1 + patches, width]`."""
        device = next(self.model.parameters()).device
        return self.model.encode_image(to_batch(pixels, self._size).to(device))


def _starts(counts: list[int]) -> list[int]:
    """Where each of some runs of `counts` begins when they stand behind one another, and where the last ends."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
