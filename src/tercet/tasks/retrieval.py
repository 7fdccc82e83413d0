"""Image-text retrieval: recall by the dual encoder, and after the fusion encoder re-ranked the best candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config
from tercet.data.loader import ImageBatch, TextBatch, caption_owners, image_batches, text_batches
from tercet.data.sources import Source
from tercet.data.tokenizer import Tokenizer
from tercet.device import cosines
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.embedding import shared_space
from tercet.tasks.rerank import EncodedTexts, candidate_pairs, chunks_by_length, pad_texts, score_images

RANKS = (1, 5, 10)
# Below every logit of a candidate, yet small enough that fp32 keeps similarities apart to 1e-5 when they are added: the
# dual encoder's order stays among the rest.
UNRANKED = -100.0
# Texts that wait for others of their length; so many are a few megabytes.
TEXT_WINDOW = 4096


@dataclass
class Scores:
    """Every image against every text.

    Attributes:
        image_to_text: `[images, texts]`, what image queries are ranked by.
        text_to_image: `[texts, images]`, what text queries are ranked by.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def recall(scores: Scores, image_of_text: Tensor) -> dict[str, float]:
    """Recall both ways, in percent.

    Args:
        scores: every image against every text.
        image_of_text: index of each text's image, `[texts]`.

    Returns:
        `text_r1`, `text_r5`, `text_r10` of image queries, by the best rank among the captions of the image;
        `image_r1`, `image_r5`, `image_r10` of text queries; the means of each three, and `r_mean` of the two.
    """
    text_ranks, image_ranks = ranks(scores, image_of_text)
    result: dict[str, float] = {}
    for name, found in (("text", text_ranks), ("image", image_ranks)):
        for rank in RANKS:
            result[f"{name}_r{rank}"] = 100.0 * (found < rank).double().mean().item()
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{rank}"] for rank in RANKS) / len(RANKS)
    result["r_mean"] = (result["text_r_mean"] + result["image_r_mean"]) / 2
    return result


def ranks(scores: Scores, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Places, from 0, of the best right text of each image `[images]` and of the right image of each text `[texts]`.

    A tie counts against the right one, so that a model whose scores are all equal finds nothing.  Images without a
    text are left out.
    """
    owner = image_of_text[None, :] == torch.arange(scores.image_to_text.shape[0])[:, None]
    best = scores.image_to_text.masked_fill(~owner, float("-inf")).amax(dim=1, keepdim=True)
    text_ranks = ((scores.image_to_text >= best) & ~owner).sum(dim=1)[owner.any(dim=1)]
    right = scores.text_to_image.gather(1, image_of_text[:, None])
    image_ranks = (scores.text_to_image >= right).sum(dim=1) - 1
    return text_ranks, image_ranks


@torch.no_grad()
def encode_texts(
    model: Tercet, batches: Iterable[TextBatch], device: torch.device, window: int = TEXT_WINDOW
) -> tuple[EncodedTexts, list[str]]:
    """Features and tokens of all texts, kept on the host, and the texts themselves.

    Args:
        model: in evaluation mode, on `device`.
        batches: the texts.
        device: where the text encoder runs.
        window: texts that are read before they are encoded, those of like length together.
    """
    captions: list[str] = []
    feats: list[Tensor] = []
    embeds: list[Tensor] = []
    waiting: list[Tensor] = []
    for batch in batches:
        captions += batch.captions
        lengths = batch.attention_mask.sum(dim=1).tolist()
        waiting += [ids[:length] for ids, length in zip(batch.input_ids, lengths, strict=True)]
        if len(waiting) >= window:
            _encode_by_length(model, waiting, device, feats, embeds)
            waiting = []
    _encode_by_length(model, waiting, device, feats, embeds)
    return EncodedTexts(torch.cat(feats), embeds), captions


def _encode_by_length(
    model: Tercet, texts: list[Tensor], device: torch.device, feats: list[Tensor], embeds: list[Tensor]
) -> None:
    """Encode `texts`, `[tokens]` each, and put their features and tokens behind those of others, in their order."""
    own_feats = torch.empty(len(texts), model.config.embed_dim)
    own_embeds: dict[int, Tensor] = {}
    for chunk in chunks_by_length([len(text) for text in texts]):
        input_ids, mask = pad_texts([texts[index] for index in chunk])
        text_embeds = model.encode_text(input_ids.to(device), mask.to(device))
        own_feats[torch.tensor(chunk)] = model.project_text(text_embeds[:, 0]).cpu()
        for index, tokens in zip(chunk, text_embeds.cpu(), strict=True):
            own_embeds[index] = tokens[: len(texts[index])].clone()
    feats.append(own_feats)
    embeds += [own_embeds[index] for index in range(len(texts))]


@dataclass
class EncodedImages:
    """Images out of the image encoder; features on the host, tokens on the device as long as it has room.

    Attributes:
        image_feats: unit vectors `[images, embed_dim]`.
        image_embeds: for each image its tokens `[1 + patches, width]`, None where another rank has them; empty when
            they were not asked for.
        index: place of each image in its source, `[images]`; broken ones are missing.
        keys: names of the images.
        problems: why the missing ones are.
    """

    image_feats: Tensor
    image_embeds: Sequence[Tensor | None]
    index: Tensor
    keys: list[str]
    problems: list[str]


@torch.no_grad()
def encode_images(
    model: Tercet, batches: Iterable[ImageBatch], device: torch.device, keep_tokens: bool
) -> EncodedImages:
    """Features of all images that can be read and, if asked for, their tokens."""
    feats: list[Tensor] = []
    tokens: list[Tensor] = []
    encoded = EncodedImages(torch.empty(0, model.config.embed_dim), [], torch.empty(0, dtype=torch.long), [], [])
    for batch in batches:
        encoded.problems += batch.problems
        if len(batch.keys) == 0:
            continue
        image_embeds = model.encode_image(batch.images.to(device))
        feats.append(model.project_image(image_embeds[:, 0]).cpu())
        if keep_tokens:
            tokens += list(image_embeds if _has_room(device) else image_embeds.cpu())
        encoded.index = torch.cat([encoded.index, batch.indices])
        encoded.keys += batch.keys
    if feats:
        encoded.image_feats, encoded.image_embeds = torch.cat(feats), tokens
    return encoded


def _has_room(device: torch.device) -> bool:
    """Whether a GPU has half of its memory left."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return 2 * free > total


def encode_source_images(model: Tercet, source: Source, config: Config, keep_tokens: bool) -> EncodedImages:
    """Features of all images of a source that can be read, encoded by all ranks; tokens of those of this rank alone.

    Args:
        model: in evaluation mode.
        source: the images.
        config: `data` and `evaluate` are read.
        keep_tokens: whether tokens are asked for; those of other ranks' images are None.
    """
    ranks, device = Ranks(), next(model.parameters()).device
    size, limit = config.evaluate.batch_size, config.evaluate.limit
    batches = image_batches(source, config.data, model.config.vision.image_size, size, limit, ranks=ranks)
    own = [encode_images(model, [batch], device, keep_tokens) for batch in batches]
    parts = ranks.gather_interleaved([replace(part, image_embeds=[None] * len(part.keys)) for part in own])
    if keep_tokens:
        parts[ranks.rank :: ranks.world] = own
    return EncodedImages(
        image_feats=torch.cat([part.image_feats for part in parts]),
        image_embeds=[tokens for part in parts for tokens in part.image_embeds] if keep_tokens else [],
        index=torch.cat([part.index for part in parts]),
        keys=[key for part in parts for key in part.keys],
        problems=[problem for part in parts for problem in part.problems],
    )


def encode_source_texts(
    model: Tercet, source: Source, config: Config, tokenizer: Tokenizer
) -> tuple[EncodedTexts, list[str]]:
    """Features and tokens of all captions of a source, windows of them by each rank, and the captions themselves."""
    ranks, device = Ranks(), next(model.parameters()).device
    batches = text_batches(source, tokenizer, config.data, TEXT_WINDOW, config.evaluate.limit, ranks)
    parts = ranks.gather_interleaved([encode_texts(model, [batch], device) for batch in batches])
    return EncodedTexts(
        torch.cat([texts.text_feats for texts, _ in parts]),
        [embeds for texts, _ in parts for embeds in texts.text_embeds],
    ), [caption for _, captions in parts for caption in captions]


@torch.no_grad()
def rerank(
    model: Tercet,
    image_embeds: Sequence[Tensor | None],
    texts: EncodedTexts,
    similarities: Tensor,
    count: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Matching logits of the `count` best candidates of every query, the rest behind them in the dual order.

    A pair that both directions ask for is scored once, by the rank that has its image.

    Args:
        model: in evaluation mode, on `device`.
        image_embeds: `[1 + patches, width]` of each image; None of those that other ranks have.
        texts: all texts.
        similarities: cosines `[images, texts]`.
        count: candidates a query.
        device: where the fusion encoder runs.
        progress: told after each image how many pairs it had.
    """
    by_image, by_text = candidate_pairs(similarities, count)
    asked: list[tuple[int, Tensor, Tensor]] = []
    for image, wanted in enumerate(by_image | by_text):
        chosen, tokens = wanted.nonzero().squeeze(1), image_embeds[image]
        if chosen.numel() and tokens is not None:
            asked.append((image, chosen, tokens))
    scores = score_images(model, ((tokens, chosen.numpy()) for _, chosen, tokens in asked), texts.text_embeds, device)
    found: list[tuple[int, Tensor, Tensor]] = []
    for (image, chosen, _), own in zip(asked, scores, strict=True):
        found.append((image, chosen, own))
        if progress is not None:
            progress(int(chosen.numel()))
    rest = similarities + UNRANKED
    scored = Scores(rest.clone(), rest.T.clone())
    for image, chosen, logits in (one for part in Ranks().gather(found) for one in part):
        from_image, from_text = by_image[image, chosen], by_text[image, chosen]
        scored.image_to_text[image, chosen[from_image]] = logits[from_image]
        scored.text_to_image[chosen[from_text], image] = logits[from_text]
    return scored


@dataclass
class RetrievalResult:
    """An evaluation.

    Attributes:
        dual: recall by the dual encoder alone.
        reranked: recall after re-ranking; None when it was not asked for.
        scores: what the better of the two ranks by.
        image_of_text: row of each caption's image in the scores, `[texts]`.
        images: the images, in the order of the scores.
        captions: the captions, in the order of the scores.
        similarities: cosines of the dual encoder `[images, texts]`.
        space: alignment and uniformity of the shared space; see `tercet.tasks.embedding`.
    """

    dual: dict[str, float]
    reranked: dict[str, float] | None
    scores: Scores
    image_of_text: Tensor
    images: EncodedImages
    captions: list[str]
    similarities: Tensor
    space: dict[str, float]

    def metrics(self) -> dict[str, dict[str, float]]:
        """`{"dual": {...}, "reranked": {...}}`, the second only where there is one."""
        return {"dual": self.dual} | ({"reranked": self.reranked} if self.reranked is not None else {})

    @property
    def sizes(self) -> dict[str, int]:
        """How many images and texts there were."""
        return {"images": len(self.images.keys), "texts": len(self.captions)}

    @property
    def problems(self) -> list[str]:
        """Why images were left out."""
        return self.images.problems

    def predictions(self) -> list[dict[str, Any]]:
        """The best of every query: of captions `{"caption", "images"}`, of images `{"image", "captions"}`."""
        keys, captions = self.images.keys, self.captions
        best_images = self.scores.text_to_image.topk(min(RANKS[-1], len(keys)), dim=1).indices.tolist()
        best_texts = self.scores.image_to_text.topk(min(RANKS[-1], len(captions)), dim=1).indices.tolist()
        rows: list[dict[str, Any]] = [
            {"caption": caption, "images": [keys[image] for image in best]}
            for caption, best in zip(captions, best_images, strict=True)
        ]
        return rows + [
            {"image": key, "captions": [captions[text] for text in best]}
            for key, best in zip(keys, best_texts, strict=True)
        ]


def evaluate_source(
    model: Tercet, source: Source, config: Config, progress: Callable[[int], None] | None = None
) -> RetrievalResult:
    """Retrieval among the images of a source and all their captions.

    Args:
        model: with its tokenizer; its mode is kept.
        source: images with captions; broken images are left out, with their captions.
        config: `data` and `evaluate` are read.
        progress: told, while re-ranking, how many pairs were scored.

    Raises:
        TercetError: no image can be read, or the model has no tokenizer.
    """
    device = next(model.parameters()).device
    limit = config.evaluate.limit
    tokenizer = require_tokenizer(model)
    training = model.training
    model.eval()
    try:
        images = encode_source_images(model, source, config, keep_tokens=config.evaluate.rerank > 0)
        if not images.keys:
            raise TercetError(f"none of {source.image_count} images can be read; the first: {images.problems[0]}")
        texts, captions = encode_source_texts(model, source, config, tokenizer)
        texts, captions, image_of_text = of_readable_images(texts, captions, images, caption_owners(source, limit))
        similarities = cosines(images.image_feats, texts.text_feats)
        scores = Scores(similarities, similarities.T)
        dual, reranked = recall(scores, image_of_text), None
        if config.evaluate.rerank > 0:
            scores = rerank(model, images.image_embeds, texts, similarities, config.evaluate.rerank, device, progress)
            reranked = recall(scores, image_of_text)
    finally:
        model.train(training)
    space = shared_space(images.image_feats, texts.text_feats, image_of_text)
    return RetrievalResult(dual, reranked, scores, image_of_text, images, captions, similarities, space)


def evaluate(model: Tercet, source: Source, config: Config) -> dict[str, dict[str, float]]:
    """`evaluate_source`, its metrics alone."""
    return evaluate_source(model, source, config).metrics()


def of_readable_images(
    texts: EncodedTexts, captions: list[str], images: EncodedImages, owners: Tensor
) -> tuple[EncodedTexts, list[str], Tensor]:
    """The captions whose image was read, and the row of that image."""
    rows = torch.full((int(owners.max()) + 1,), -1, dtype=torch.long)
    rows[images.index] = torch.arange(len(images.keys))
    image_of_text = rows[owners]
    kept = (image_of_text >= 0).nonzero().squeeze(1)
    if len(kept) == len(owners):
        return texts, captions, image_of_text
    chosen = kept.tolist()
    fewer = EncodedTexts(texts.text_feats[kept], [texts.text_embeds[index] for index in chosen])
    return fewer, [captions[index] for index in chosen], image_of_text[kept]
