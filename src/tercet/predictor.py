"""A model ready to use: images and texts in whatever form the caller has them, numbers out.

Python, the command line, search and the server all call `Predictor`.  Every method takes one image or text, or several:
one gives one result, several give as many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tercet.config import DataConfig, VqaConfig
from tercet.data.augment import Pixels
from tercet.data.inputs import ImageInput, ImageInputs, TextInputs, list_images, list_texts, to_batch, to_pixels
from tercet.data.tokenizer import clean_caption, clean_question
from tercet.errors import TercetError
from tercet.model.hub import load_model, push_model, require_tokenizer, save_model
from tercet.model.tercet import Tercet
from tercet.tasks.answering import Answer, Answerer, first_pieces
from tercet.tasks.encoding import BATCH, chunks_by_length, encode_sentences, pad_texts, tokenise
from tercet.tasks.evaluation import evaluating
from tercet.tasks.explaining import Explanation, join_pieces
from tercet.tasks.heatmaps import Mode, answer_heatmaps, average_words, contrast_heatmaps, match_heatmaps, to_grid
from tercet.tasks.zero_shot import TEMPLATES, class_feats, zero_shot

Result = TypeVar("Result")

CACHED_CLASSES, CACHED_ANSWER_LISTS = 32, 4
KV_IMAGES = 16  # images whose keys and values are held at once
_DATA = DataConfig()  # texts are cut as in pre-training


def load(
    source: str | Path, device: str | torch.device = "cpu", revision: str | None = None, local_only: bool = False
) -> Predictor:
    """Load a model, ready to use.

    Args:
        source: a model folder, a run folder (its `model/` is read), or the id of a model on the Hugging Face Hub.
        device: where the model runs.
        revision: branch, tag or commit on the hub.
        local_only: take a hub id from the cache, without asking the hub.

    Raises:
        TercetError: no such folder or id, or a file of it is missing, malformed, cut short or of a newer format.
    """
    return Predictor(load_model(source, device, revision, local_only))


@dataclass(frozen=True)
class MatchScore:
    """How well a text fits an image.

    Attributes:
        match: the probability that they belong together, by the fusion encoder.
        cosine: their similarity from -1 to 1, by the dual encoder.
    """

    match: float
    cosine: float


class Predictor:
    """A model with its preprocessing and its tokenizer.

    Features of classes and encoded lists of answers are cached, so make a new predictor after training the model
    further.  Not for several threads at once.

    Attributes:
        model: the network; its attributes `tokenizer`, `answers` and `card` are those of its folder.
    """

    def __init__(self, model: Tercet) -> None:
        self.model = model
        self._class_feats: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._answerers: OrderedDict[Hashable, Answerer] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.temperature.device

    @property
    def answers_questions(self) -> bool:
        """Whether the model was fine-tuned for questions."""
        return "answer" in self.model.config.heads

    def save(self, folder: str | Path, card: str | None = None) -> Path:
        """Write the model as a folder; see `tercet.model.hub.save_model`."""
        return save_model(self.model, folder, card)

    def push_to_hub(
        self,
        repo_id: str,
        card: str | None = None,
        private: bool | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the model to the Hugging Face Hub; see `tercet.model.hub.push_model`."""
        return push_model(self.model, repo_id, card, private, message, token)

    def embed_images(self, images: ImageInputs) -> Tensor:
        """Unit vectors in the space shared with texts: `image_feats` `[images, embed_dim]`, of one image `[embed_dim]`.

        Raises:
            TercetError: an image cannot be read.
        """
        several, single = list_images(images)
        with evaluating(self.model):
            feats = torch.cat([self.model.project_image(embeds[:, 0]).cpu() for embeds in self._encoded(several)])
        return feats[0] if single else feats

    def embed_texts(self, texts: TextInputs) -> Tensor:
        """Unit vectors in the space shared with images: `text_feats` `[texts, embed_dim]`, of one text `[embed_dim]`.

        Raises:
            TercetError: the model has no tokenizer, or a text holds no words.
        """
        several, single = list_texts(texts)
        with evaluating(self.model):
            feats = encode_sentences(self.model, several, _DATA).text_feats
        return feats[0] if single else feats

    def similarity(self, images: ImageInputs, texts: TextInputs) -> Tensor | float:
        """Cosines, from -1 to 1, of every image with every text, by the dual encoder alone.

        Returns:
            `[images, texts]`; a single image or text has no axis, and one of both gives a float.
        """
        text_feats = self.embed_texts(texts)
        cosines = self.embed_images(images) @ (text_feats.T if text_feats.ndim == 2 else text_feats)
        return cosines if cosines.ndim else cosines.item()

    def match(self, images: ImageInputs, texts: TextInputs, paired: bool = False) -> Tensor | float:
        """Probabilities, from 0 to 1, that image and text belong together, by the fusion encoder.

        Args:
            images: one or several.
            texts: one or several.
            paired: the first image with the first text, the second with the second; else every image with every text.

        Returns:
            `[images, texts]`, where a single image or text has no axis, and one of both gives a float; `[images]` when
            paired.

        Raises:
            TercetError: an image or text cannot be read, or there are not as many of each to be paired.
        """
        pictures, single_image = list_images(images)
        several, single_text = list_texts(texts)
        if paired and len(pictures) != len(several):
            raise TercetError(f"{len(pictures)} images and {len(several)} texts; pairs need as many of both")
        with evaluating(self.model):
            text_embeds = encode_sentences(self.model, several, _DATA).text_embeds
            owners = [[own] for own in text_embeds] if paired else [text_embeds] * len(pictures)
            logits: list[Tensor] = []
            for image_embeds in self._encoded(pictures):
                logits += self.match_logits(image_embeds, owners[len(logits) : len(logits) + len(image_embeds)])
        probabilities = _probability(torch.stack(logits))
        if paired:
            return probabilities[:, 0]
        probabilities = probabilities[:, 0] if single_text else probabilities
        probabilities = probabilities[0] if single_image else probabilities
        return probabilities if probabilities.ndim else probabilities.item()

    def match_each(self, images: Sequence[ImageInput], texts: Sequence[Sequence[str]]) -> list[list[MatchScore]]:
        """Each image with texts of its own, by both encoders.

        Args:
            images: one or more.
            texts: for each image one or more.

        Raises:
            TercetError: an image cannot be read, or a text holds no words.
        """
        with evaluating(self.model):
            encoded = encode_sentences(self.model, [text for own in texts for text in own], _DATA)
            counts = [len(own) for own in texts]
            feats, embeds = encoded.text_feats.split(counts), iter(encoded.text_embeds)
            text_embeds = [[next(embeds) for _ in own] for own in texts]
            scores: list[list[MatchScore]] = []
            for image_embeds in self._encoded(images):
                rows = slice(len(scores), len(scores) + len(image_embeds))
                image_feats = self.model.project_image(image_embeds[:, 0]).cpu()
                for logits, own, image in zip(
                    self.match_logits(image_embeds, text_embeds[rows]), feats[rows], image_feats, strict=True
                ):
                    pairs = zip(_probability(logits).tolist(), (own @ image).tolist(), strict=True)
                    scores.append([MatchScore(*pair) for pair in pairs])
        return scores

    def classify(
        self, images: ImageInputs, labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> dict[str, float] | list[dict[str, float]]:
        """Probabilities of labels that the model was never trained on, by similarity to sentences that name them.

        Args:
            images: one or several.
            labels: names of the classes, such as "a dog".
            templates: sentences with {} where the label goes, whose features are averaged; default
                `tercet.tasks.zero_shot.TEMPLATES`.

        Returns:
            For each image the labels with their probabilities, the most probable first; one dict for one image.

        Raises:
            TercetError: an image cannot be read, a label is given twice, or there is none.
        """
        if isinstance(labels, str) or not labels:
            raise TercetError("give classify a list of labels, such as ['a dog', 'a cat']")
        names = list(labels)
        key = (tuple(names), tuple(templates or TEMPLATES))
        with evaluating(self.model):
            classes = _cached(self._class_feats, key, CACHED_CLASSES, lambda: class_feats(self.model, *key, _DATA))
        feats = self.embed_images(images)
        result: list[dict[str, float]] = []
        for row in zero_shot(feats.reshape(-1, feats.shape[-1]), classes, self.model.temperature.item()):
            order = row.argsort(descending=True, stable=True).tolist()
            result.append(dict(zip((names[index] for index in order), row[order].tolist(), strict=True)))
        return result[0] if feats.ndim == 1 else result

    def answer(
        self, images: ImageInputs, questions: TextInputs, answers: Sequence[str] | None = None
    ) -> Answer | list[Answer]:
        """Answers to questions about images.

        Args:
            images: one, or as many as questions.
            questions: one, or as many as images; one of either goes with all of the other.
            answers: what to choose from; default the model's own list, and without one answers are generated.

        Returns:
            One `Answer` (its `text`, its `score`) for one image and one question, else a list.

        Raises:
            TercetError: the model has no answer decoder, an image or question cannot be read, or their numbers do not
                fit.
        """
        self.model.require_heads(("answer",), "vqa")
        choices = self.model.answers if answers is None else answers
        key = (None if choices is None else tuple(choices), self.device)
        answerer = _cached(
            self._answerers, key, CACHED_ANSWER_LISTS, lambda: Answerer(self.model, VqaConfig(), choices)
        )
        limits = {"max_words": answerer.config.max_words, "max_tokens": self.model.config.text.max_positions}
        data = _DATA.model_copy(update=limits)
        found: list[Answer] = []
        pairs = _Pairs(images, questions)
        with evaluating(self.model):
            for pixels, asked in pairs:
                input_ids, attention_mask = tokenise(self.model, asked, data, clean_question)
                rows = None if len(pixels) == len(asked) else torch.zeros(len(asked), dtype=torch.long)
                found += answerer.answer(self._preprocess(pixels), input_ids, attention_mask, rows)
        return found[0] if pairs.single else found

    def ground(
        self, images: ImageInputs, texts: TextInputs, mode: Mode = "itm", layer: int | None = None
    ) -> Explanation | list[Explanation]:
        """Where in the image the text, and each of its words, is seen.

        Args:
            images: one, or as many as texts.
            texts: one, or as many as images; one of either goes with all of the other.
            mode: `itm` reads the cross-attention of a fusion layer; `itc` the image encoder's own attention, which
                does not tell words apart; `answer`, of a model fine-tuned for questions, the cross-attention that the
                answer to a question rests on.
            layer: counted from 0, for `itc` in the image encoder, else in the whole text stack; default two thirds up,
                as published, and for `answer` the last.

        Returns:
            One `Explanation` for one image and one text, else a list.

        Raises:
            TercetError: an image or text cannot be read, their numbers do not fit, or there is no such layer.
        """
        if mode not in ("itm", "itc", "answer"):
            raise TercetError(f"no mode {mode!r}; the modes are itm, itc and answer")
        pairs = _Pairs(images, texts)
        found = [seen for pixels, said in pairs for seen in self._ground(pixels, said, mode, layer)]
        return found[0] if pairs.single else found

    def explain(
        self, images: ImageInputs, texts: TextInputs, layer: int | None = None, mode: Mode = "itm"
    ) -> Explanation | list[Explanation]:
        """What `ground` gives, and in mode `answer` also the answers themselves.

        `Explanation.overlay` lays a heatmap over the image; `tercet.report.figures.draw_explanation` draws them all.
        """
        found = self.ground(images, texts, mode, layer)
        if mode != "answer":
            return found
        answers = self.answer(images, texts)
        if isinstance(found, Explanation):
            assert isinstance(answers, Answer)
            return replace(found, answer=answers.text)
        assert isinstance(answers, list)
        return [replace(own, answer=answer.text) for own, answer in zip(found, answers, strict=True)]

    def _preprocess(self, pixels: Sequence[Pixels]) -> Tensor:
        """uint8 `[images, 3, size, size]` on the model's device."""
        return to_batch(pixels, self.model.config.vision.image_size).to(self.device)

    def _encoded(self, images: Sequence[ImageInput]) -> Iterator[Tensor]:
        """`image_embeds` `[batch, 1 + patches, width]` of all images, a batch at a time."""
        for start in range(0, len(images), BATCH):
            chunk = images[start : start + BATCH]
            pixels = [to_pixels(image, f"image {start + number}") for number, image in enumerate(chunk, 1)]
            yield self.model.encode_image(self._preprocess(pixels))

    def match_logits(self, image_embeds: Tensor, text_embeds: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """`itm_logits` of images `[images, 1 + patches, width]`, each with its own texts, `[tokens, width]` each.

        Images with equally many texts share passes, so that no keys and values are copied.

        Returns:
            For each image `[texts, 2]`, on the host.
        """
        logits = [torch.empty(len(own), 2) for own in text_embeds]
        by_count = sorted(range(len(text_embeds)), key=lambda row: len(text_embeds[row]))
        for count, group in groupby(by_count, key=lambda row: len(text_embeds[row])):
            members = list(group)
            for start in range(0, len(members), KV_IMAGES):
                rows = members[start : start + KV_IMAGES]
                kv = self.model.project_kv(image_embeds[rows])
                # The texts of each image from short to long, so that a pass holds texts of like length.
                texts = [sorted(enumerate(text_embeds[row]), key=lambda pair: len(pair[1])) for row in rows]
                tokens = [len(rows) * max(len(own[rank][1]) for own in texts) for rank in range(count)]
                for ranks in chunks_by_length(tokens):
                    chosen = [own[rank] for own in texts for rank in ranks]
                    padded, mask = pad_texts([text.to(self.device) for _, text in chosen])
                    parts = self.model.match_logits(padded, mask, kv).cpu().split(len(ranks))
                    for row, own, part in zip(rows, texts, parts, strict=True):
                        logits[row][[own[rank][0] for rank in ranks]] = part
        return logits

    def _ground(self, pixels: list[Pixels], texts: list[str], mode: Mode, layer: int | None) -> list[Explanation]:
        """Explanations of as many texts as images, or of texts in one image."""
        model, side = self.model, self.model.config.vision.image_size
        with evaluating(model):
            images = self._preprocess(pixels)
            clean = clean_question if mode == "answer" else clean_caption
            input_ids, mask = (part.to(self.device) for part in tokenise(model, texts, _DATA, clean))
            text_embeds = model.encode_text(input_ids, mask)
            if mode == "itc":
                words, probabilities = None, [None] * len(texts)
                maps = contrast_heatmaps(model, images, model.project_text(text_embeds[:, 0]), layer)
            else:
                heatmaps = match_heatmaps if mode == "itm" else partial(answer_heatmaps, pieces=first_pieces(model))
                words, logits = heatmaps(model, model.encode_image(images), text_embeds, mask, layer)
                maps, probabilities = average_words(words, mask), _probability(logits).tolist()
        tokenizer, found = require_tokenizer(model), []
        for index, (text, length) in enumerate(zip(texts, mask.sum(dim=1).tolist(), strict=True)):
            pieces: list[tuple[str, Tensor]] = []
            if words is not None:
                names = tokenizer.tokens(input_ids[index, 1:length].cpu())
                pieces = list(zip(names, to_grid(words[index, 1:length].cpu(), side, side), strict=True))
            own = pixels[index if len(pixels) > 1 else 0]
            heatmap = to_grid(maps[index].cpu(), side, side)
            found.append(Explanation(text, own, heatmap, join_pieces(pieces), probabilities[index]))
        return found


class _Pairs:
    """Images with texts, a batch at a time: as many of both, or one of either with all of the other.

    Attributes:
        single: whether one image and one text were given, neither in a list.
    """

    def __init__(self, images: ImageInputs, texts: TextInputs) -> None:
        self.images, single_image = list_images(images)
        self.texts, single_text = list_texts(texts)
        self.single = single_image and single_text
        self.count = max(len(self.images), len(self.texts))
        if not {len(self.images), len(self.texts)} <= {1, self.count}:
            raise TercetError(
                f"{len(self.images)} images and {len(self.texts)} texts; give one of either, or as many of both"
            )

    def __iter__(self) -> Iterator[tuple[list[Pixels], list[str]]]:
        """Decoded images and texts of some pairs; of several pairs with one image, that image alone."""
        for start in range(0, self.count, BATCH):
            chunk = range(start, min(start + BATCH, self.count))
            own = chunk if len(self.images) > 1 else range(1)
            pixels = [to_pixels(self.images[index], f"image {index + 1}") for index in own]
            yield pixels, [self.texts[index if len(self.texts) > 1 else 0] for index in chunk]


def _cached(cache: OrderedDict[Hashable, Result], key: Hashable, size: int, make: Callable[[], Result]) -> Result:
    """The value of `key`, made where it is not there; the least recently used are dropped beyond `size`."""
    if key not in cache:
        cache[key] = make()
    cache.move_to_end(key)
    while len(cache) > size:
        cache.popitem(last=False)
    return cache[key]


def _probability(logits: Tensor) -> Tensor:
    """The probability of class 1, a match, of `itm_logits` `[..., 2]`."""
    return logits.softmax(dim=-1)[..., 1]
