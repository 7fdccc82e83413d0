"""One-line calls on a model: images and texts in whatever form the caller has them, numbers out.

One image or text gives one result, several give as many.  The methods of `Tercet` of the same names come here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tercet.config import DataConfig, VqaConfig
from tercet.data.augment import Pixels
from tercet.data.inputs import ImageInput, ImageInputs, TextInputs, list_images, list_texts, to_batch, to_pixels
from tercet.data.tokenizer import clean_caption, clean_question
from tercet.errors import TercetError
from tercet.model.folder import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.answering import Answerer, first_pieces
from tercet.tasks.boxes import peak
from tercet.tasks.classify import TEMPLATES, class_feats, zero_shot
from tercet.tasks.encoding import BATCH, encode_sentences, evaluating, tokenise
from tercet.tasks.explaining import Explanation, join_pieces
from tercet.tasks.heatmaps import (
    Mode,
    answered_heatmaps,
    average_words,
    contrast_heatmaps,
    enlarge,
    matched_heatmaps,
    to_grid,
)
from tercet.tasks.rerank import match_image, pad_texts

if TYPE_CHECKING:
    from tercet.tasks.answering import Answer

# Words and word pieces that are kept of a text: as many as pre-training reads.
_DATA = DataConfig()


def embed_images(model: Tercet, images: ImageInputs) -> Tensor:
    """`image_feats`, unit vectors in the space shared with texts: `[images, embed_dim]`, of one image `[embed_dim]`.

    Raises:
        TercetError: an image cannot be read.
    """
    several, single = list_images(images)
    with evaluating(model):
        feats = torch.cat([model.project_image(embeds[:, 0]).cpu() for embeds in _encoded(model, several)])
    return feats[0] if single else feats


def embed_texts(model: Tercet, texts: TextInputs) -> Tensor:
    """`text_feats`, unit vectors in the space shared with images: `[texts, embed_dim]`, of one text `[embed_dim]`.

    Raises:
        TercetError: the model has no tokenizer, or a text holds no words.
    """
    several, single = list_texts(texts)
    with evaluating(model):
        feats = encode_sentences(model, several, _DATA).text_feats
    return feats[0] if single else feats


def similarity(model: Tercet, images: ImageInputs, texts: TextInputs) -> Tensor | float:
    """Cosines, from -1 to 1, of every image with every text, by the dual encoder alone.

    Returns:
        `[images, texts]`; the axis of what was given alone is dropped, and of one image and one text it is a float.
    """
    text_feats = embed_texts(model, texts)
    cosines = embed_images(model, images) @ (text_feats.T if text_feats.ndim == 2 else text_feats)
    return cosines if cosines.ndim else cosines.item()


def match(model: Tercet, images: ImageInputs, texts: TextInputs, paired: bool = False) -> Tensor | float:
    """Probabilities, from 0 to 1, that image and text belong together, by the fusion encoder.

    Args:
        model: with its tokenizer.
        images: one or several.
        texts: one or several.
        paired: the first image with the first text, the second with the second; else every image with every text.

    Returns:
        `[images, texts]`, the axis of what was given alone dropped, and of one image and one text a float; `[images]`
        when paired.

    Raises:
        TercetError: an image or text cannot be read, or there are not as many of each to be paired.
    """
    pictures, single_image = list_images(images)
    several, single_text = list_texts(texts)
    if paired and len(pictures) != len(several):
        raise TercetError(f"{len(pictures)} images and {len(several)} texts; pairs need as many of both")
    with evaluating(model) as device:
        encoded = encode_sentences(model, several, _DATA)
        text_embeds = [tokens.to(device) for tokens in encoded.text_embeds]
        if paired:
            return _match_pairs(model, pictures, text_embeds)
        logits = [match_image(model, own, text_embeds).cpu() for embeds in _encoded(model, pictures) for own in embeds]
    chances = _chance(torch.stack(logits))
    chances = chances[:, 0] if single_text else chances
    chances = chances[0] if single_image else chances
    return chances if chances.ndim else chances.item()


def classify(
    model: Tercet, images: ImageInputs, labels: Sequence[str], templates: Sequence[str] | None = None
) -> dict[str, float] | list[dict[str, float]]:
    """Probabilities of labels that the model was never trained on, by similarity to sentences that name them.

    Args:
        model: with its tokenizer.
        images: one or several.
        labels: names of the classes, such as "a dog".
        templates: sentences with {} where the label goes, their features averaged; default
            `tercet.tasks.classify.TEMPLATES`.

    Returns:
        Of each image the labels with their probabilities, the likeliest first; one dict for one image.

    Raises:
        TercetError: an image cannot be read, a label stands twice, or there is none.
    """
    if isinstance(labels, str) or not labels:
        raise TercetError("give classify a list of labels, such as ['a dog', 'a cat']")
    with evaluating(model):
        classes = class_feats(model, list(labels), templates or TEMPLATES, _DATA)
    feats = embed_images(model, images)
    chances = zero_shot(feats.reshape(-1, feats.shape[-1]), classes, model.temperature.item())
    result = []
    for row in chances:
        order = row.argsort(descending=True, stable=True).tolist()
        result.append({labels[index]: row[index].item() for index in order})
    return result[0] if feats.ndim == 1 else result


def answer(
    model: Tercet, images: ImageInputs, questions: TextInputs, answers: Sequence[str] | None = None
) -> Answer | list[Answer]:
    """Answers to questions about images.

    Args:
        model: fine-tuned for questions, with its tokenizer.
        images: one, or as many as questions.
        questions: one, or as many as images; one of either goes with all of the other.
        answers: what to choose from; default the model's own list, and without one answers are written freely.

    Returns:
        One `Answer` (its `text`, its `score`) for one image and one question, else a list.

    Raises:
        TercetError: the model has no answer decoder, an image or question cannot be read, or their numbers do not fit.
    """
    model.require_heads(("answer",), "vqa")
    config = VqaConfig()
    data = _DATA.model_copy(update={"max_words": config.max_words, "max_tokens": model.config.text.max_positions})
    found: list[Answer] = []
    pairs = _Pairs(images, questions)
    with evaluating(model):
        answerer = Answerer(model, config, model.answers if answers is None else list(answers))
        for pixels, asked in pairs:
            batch = to_batch(pixels, model.config.vision.image_size)
            input_ids, attention_mask = tokenise(model, asked, data, clean_question)
            rows = torch.arange(len(asked))[:, None] if len(pixels) == len(asked) else torch.zeros(len(asked), 1).long()
            found += answerer.answer(batch, input_ids, attention_mask, rows)
    return found[0] if pairs.single else found


@dataclass(frozen=True)
class Grounding:
    """Where in an image a text is seen.

    Attributes:
        text: the text.
        heatmap: `[rows, columns]` of patches; higher is more.
        words: word pieces with the map of each `[rows, columns]`; empty in mode `itc`.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """

    text: str
    heatmap: Tensor
    words: list[tuple[str, Tensor]]
    height: int
    width: int

    def enlarged(self) -> Tensor:
        """The map at the size of the image, `[height, width]`."""
        return enlarge(self.heatmap[None], self.height, self.width)[0]

    @property
    def point(self) -> tuple[float, float]:
        """The strongest point, (x, y) in pixels of the image."""
        return peak(self.enlarged())


def ground(
    model: Tercet, images: ImageInputs, texts: TextInputs, mode: Mode = "itm", layer: int | None = None
) -> Grounding | list[Grounding]:
    """Where in the image the text is seen.

    Args:
        model: with its tokenizer.
        images: one, or as many as texts.
        texts: one, or as many as images; one of either goes with all of the other.
        mode: `itm` reads the cross-attention of a fusion layer, `itc` the image's own attention; `answer`, of a model
            fine-tuned for questions, the cross-attention that a question's answer rests on.
        layer: which layer, counted from 0 (but for `itc` in the whole text stack); default two thirds up, as published,
            and for `answer` the last.

    Returns:
        One `Grounding` for one image and one text, else a list.

    Raises:
        TercetError: an image or text cannot be read, their numbers do not fit, or there is no such layer.
    """
    if mode not in ("itm", "itc", "answer"):
        raise TercetError(f"no mode {mode!r}; the modes are itm, itc and answer")
    found: list[Grounding] = []
    pairs = _Pairs(images, texts)
    for pixels, said in pairs:
        found += [grounding for grounding, _ in _ground_some(model, pixels, said, mode, layer)]
    return found[0] if pairs.single else found


def explain(
    model: Tercet, images: ImageInputs, texts: TextInputs, layer: int | None = None, mode: Mode = "itm"
) -> Explanation | list[Explanation]:
    """Where in the image each word of a text is seen, and whether they belong together.

    The heatmaps are those of `ground`, pieces of a word joined; `Explanation.overlay` lays one over the
    image, and `tercet.report.explain.draw_explanation` draws all of them.

    Args:
        model: with its tokenizer.
        images: one, or as many as texts.
        texts: one, or as many as images; one of either goes with all of the other.
        layer: which fusion layer, counted in the whole text stack; default two thirds up, as published, and for
            `answer` the last.
        mode: `itm`: by the logit of a match; `answer`: texts are questions, by the likeliest answer to each.

    Returns:
        One `Explanation` for one image and one text, else a list.

    Raises:
        TercetError: an image or text cannot be read, their numbers do not fit, or there is no such layer.
    """
    if mode not in ("itm", "answer"):
        raise TercetError(f"mode {mode!r} tells words not apart; the modes are itm and answer")
    found: list[Explanation] = []
    pairs = _Pairs(images, texts)
    for pixels, said in pairs:
        for index, (seen, chance) in enumerate(_ground_some(model, pixels, said, mode, layer)):
            assert chance is not None
            own = pixels[index if len(pixels) > 1 else 0]
            found.append(Explanation(seen.text, chance, seen.heatmap, join_pieces(seen.words), own))
    if mode == "answer":
        given = answer(model, images, texts)
        answers = given if isinstance(given, list) else [given]
        found = [replace(own, answer=said.text) for own, said in zip(found, answers, strict=True)]
    return found[0] if pairs.single else found


def _ground_some(
    model: Tercet, pixels: list[Pixels], texts: list[str], mode: Mode, layer: int | None
) -> list[tuple[Grounding, float | None]]:
    """Groundings of as many texts as images, or of texts in one image; but for `itc` with the chance of a match."""
    with evaluating(model) as device:
        batch = to_batch(pixels, model.config.vision.image_size).to(device)
        input_ids, attention_mask = tokenise(model, texts, _DATA, clean_question if mode == "answer" else clean_caption)
        mask = attention_mask.to(device)
        text_embeds = model.encode_text(input_ids.to(device), mask)
        if mode != "itc":
            heatmaps = matched_heatmaps if mode == "itm" else partial(answered_heatmaps, pieces=first_pieces(model))
            words, logits = heatmaps(model, model.encode_image(batch), text_embeds, mask, layer)
            maps, chances = average_words(words, mask), _chance(logits).tolist()
        else:
            words, chances = None, [None] * len(texts)
            maps = contrast_heatmaps(model, batch, model.project_text(text_embeds[:, 0]), layer)
    side = model.config.vision.image_size
    result = []
    for index, text in enumerate(texts):
        height, width = pixels[index if len(pixels) > 1 else 0].shape[:2]
        pieces: list[tuple[str, Tensor]] = []
        if words is not None:
            length = int(attention_mask[index].sum())
            names = require_tokenizer(model).tokens(input_ids[index, 1:length])
            pieces = list(zip(names, to_grid(words[index, 1:length].cpu(), side, side), strict=True))
        grounding = Grounding(text, to_grid(maps[index].cpu(), side, side), pieces, height, width)
        result.append((grounding, chances[index]))
    return result


class _Pairs:
    """Images with texts, some at a time: as many of both, or one of either with all of the other.

    Attributes:
        single: whether one image and one text were given, both alone.
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
        """Images, decoded, and texts of some pairs; of several pairs with one image, that image alone."""
        for start in range(0, self.count, BATCH):
            chunk = range(start, min(start + BATCH, self.count))
            own = chunk if len(self.images) > 1 else range(1)
            pixels = [to_pixels(self.images[index], f"image {index + 1}") for index in own]
            yield pixels, [self.texts[index if len(self.texts) > 1 else 0] for index in chunk]


def _encoded(model: Tercet, images: list[ImageInput]) -> Iterator[Tensor]:
    """`image_embeds` `[batch, 1 + patches, width]` of all images, some at a time."""
    device = next(model.parameters()).device
    for start in range(0, len(images), BATCH):
        chunk = images[start : start + BATCH]
        pixels = [to_pixels(image, f"image {start + number}") for number, image in enumerate(chunk, 1)]
        yield model.encode_image(to_batch(pixels, model.config.vision.image_size).to(device))


def _match_pairs(model: Tercet, images: list[ImageInput], text_embeds: list[Tensor]) -> Tensor:
    logits: list[Tensor] = []
    for image_embeds in _encoded(model, images):
        start = sum(len(part) for part in logits)
        padded, mask = pad_texts(text_embeds[start : start + len(image_embeds)])
        logits.append(model.match_logits(padded, mask, model.project_kv(image_embeds)).cpu())
    return _chance(torch.cat(logits))


def _chance(logits: Tensor) -> Tensor:
    """The probability of class 1 of `itm_logits` `[..., 2]`."""
    return logits.softmax(dim=-1)[..., 1]
