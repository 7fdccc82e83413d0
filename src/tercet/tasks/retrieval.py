"""Image-text retrieval: recall by the dual encoder, and after the fusion encoder re-ranked the best candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config
from tercet.data.batch import ImageBatch
from tercet.data.loader import caption_owners, cleaned_captions, image_batches
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable
from tercet.device import cosines
from tercet.distributed import Ranks
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.embedding import embedding_metrics
from tercet.tasks.encoding import EncodedTexts, encode_texts
from tercet.tasks.evaluation import TaskResult, gather_batches, map_over_ranks, require_some, within_positions
from tercet.tasks.pretrain import Pretraining
from tercet.tasks.rerank import candidate_pairs, score_images
from tercet.tasks.task import TaskSpec

RANKS = (1, 5, 10)
# Below every logit of a candidate, yet small enough that fp32 keeps similarities apart to 1e-5 when they are added: the
# dual encoder's order stays among the rest.
UNRANKED = -100.0
# Texts that are encoded together, those of similar length in one pass.
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
    text_ranks, image_ranks = query_ranks(scores, image_of_text)
    result: dict[str, float] = {}
    for name, found in (("text", text_ranks), ("image", image_ranks)):
        for rank in RANKS:
            result[f"{name}_r{rank}"] = 100.0 * (found < rank).double().mean().item()
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{rank}"] for rank in RANKS) / len(RANKS)
    result["r_mean"] = (result["text_r_mean"] + result["image_r_mean"]) / 2
    return result


def query_ranks(scores: Scores, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks, from 0, of the best right text of each image `[images]` and of the right image of each text `[texts]`.

    A tie counts against the right one, so that a model whose scores are all equal finds nothing.  Images without a
    text are skipped.
    """
    owner = image_of_text[None, :] == torch.arange(scores.image_to_text.shape[0])[:, None]
    best = scores.image_to_text.masked_fill(~owner, float("-inf")).amax(dim=1, keepdim=True)
    text_ranks = ((scores.image_to_text >= best) & ~owner).sum(dim=1)[owner.any(dim=1)]
    right = scores.text_to_image.gather(1, image_of_text[:, None])
    image_ranks = (scores.text_to_image >= right).sum(dim=1) - 1
    return text_ranks, image_ranks


@dataclass
class EncodedImages:
    """Images out of the image encoder; features on the host, tokens on the device while it has memory for them.

    Attributes:
        image_feats: unit vectors `[images, embed_dim]`.
        class_tokens: the summary token of each image before its projection, `[images, width]`.
        image_embeds: for each image its tokens `[1 + patches, width]`; None where another rank has them, or where they
            were not asked for.
        index: which image of its source each is, `[images]`; broken ones are missing.
        keys: names of the images.
        problems: why the missing ones are.
    """

    image_feats: Tensor
    class_tokens: Tensor
    image_embeds: Sequence[Tensor | None]
    index: Tensor
    keys: list[str]
    problems: list[str]


def encode_images(model: Tercet, source: SampleTable, config: Config, keep_tokens: bool = False) -> EncodedImages:
    """Encode all images of a source that can be read, each batch on one rank.

    Args:
        model: in evaluation mode.
        source: the images.
        config: `data` and `evaluate` are read.
        keep_tokens: keep the tokens of this rank's images.

    Raises:
        TercetError: no image can be read.
    """
    device, size, limit = model.temperature.device, config.evaluate.batch_size, config.evaluate.limit
    tokens: dict[int, Tensor] = {}

    def encode(batch: ImageBatch) -> EncodedImages:
        image_embeds = torch.empty(0, 1, model.config.vision.width, device=device)
        if len(batch):
            image_embeds = model.encode_image(batch.images.to(device))
        if keep_tokens:
            kept = image_embeds if _has_memory(device) else image_embeds.cpu()
            tokens.update(zip(batch.indices.tolist(), kept, strict=True))
        summary = image_embeds[:, 0]
        feats = model.project_image(summary).cpu()
        return EncodedImages(feats, summary.float().cpu(), [], batch.indices, batch.keys, batch.skipped)

    batches = image_batches(source, config.data, model.config.vision.image_size, size, limit, ranks=Ranks())
    parts = gather_batches(map(encode, batches))
    keys = [key for part in parts for key in part.keys]
    problems = [problem for part in parts for problem in part.problems]
    require_some(keys, source.image_count, "images", problems)
    index = torch.cat([part.index for part in parts])
    return EncodedImages(
        image_feats=torch.cat([part.image_feats for part in parts]),
        class_tokens=torch.cat([part.class_tokens for part in parts]),
        image_embeds=[tokens.get(image) for image in index.tolist()],
        index=index,
        keys=keys,
        problems=problems,
    )


def _has_memory(device: torch.device) -> bool:
    """Whether a GPU has half of its memory left."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return 2 * free > total


def encode_captions(
    model: Tercet, source: SampleTable, config: Config, images: EncodedImages
) -> tuple[EncodedTexts, list[str], Tensor]:
    """Encode the captions of `images`, each window of texts on one rank.

    Returns:
        The texts; the captions as cleaned; the row of each one's image in `images`, `[texts]`.

    Raises:
        TercetError: the model has no tokenizer.
    """
    data, limit, tokenizer = within_positions(config.data, model), config.evaluate.limit, require_tokenizer(model)
    owners = caption_owners(source, limit)
    rows = torch.full((int(owners.max()) + 1,), -1, dtype=torch.long)
    rows[images.index] = torch.arange(len(images.keys))
    image_of_text = rows[owners]
    readable = image_of_text >= 0
    cleaned = zip(cleaned_captions(source, data.max_words, limit), readable.tolist(), strict=True)
    captions = [caption for caption, kept in cleaned if kept]

    def encode(texts: Sequence[str]) -> EncodedTexts:
        return encode_texts(model, *tokenizer.encode(list(texts), data.max_tokens))

    parts = map_over_ranks(encode, captions, TEXT_WINDOW)
    texts = EncodedTexts(
        torch.cat([part.text_feats for part in parts]), [embeds for part in parts for embeds in part.text_embeds]
    )
    return texts, captions, image_of_text[readable]


@torch.no_grad()
def rerank(
    model: Tercet,
    image_embeds: Sequence[Tensor | None],
    texts: EncodedTexts,
    similarities: Tensor,
    count: int,
    device: torch.device,
) -> Scores:
    """Matching logits of the `count` best candidates of every query, the rest after them in the dual encoder's order.

    A pair that both directions ask for is scored once, by the rank that has its image.

    Args:
        model: in evaluation mode, on `device`.
        image_embeds: `[1 + patches, width]` of each image; None of those that other ranks have.
        texts: all texts.
        similarities: cosines `[images, texts]`.
        count: candidates a query.
        device: where the fusion encoder runs.
    """
    by_image, by_text = candidate_pairs(similarities, count)
    due: list[tuple[int, Tensor, Tensor]] = []
    for image, wanted in enumerate(by_image | by_text):
        chosen, tokens = wanted.nonzero().squeeze(1), image_embeds[image]
        if chosen.numel() and tokens is not None:
            due.append((image, chosen, tokens))
    scores = score_images(model, ((tokens, chosen.numpy()) for _, chosen, tokens in due), texts.text_embeds, device)
    found = [(image, chosen, own) for (image, chosen, _), own in zip(due, scores, strict=True)]
    rest = similarities + UNRANKED
    scored = Scores(rest.clone(), rest.T.clone())
    for image, chosen, logits in (pair for part in Ranks().gather(found) for pair in part):
        from_image, from_text = by_image[image, chosen], by_text[image, chosen]
        scored.image_to_text[image, chosen[from_image]] = logits[from_image]
        scored.text_to_image[chosen[from_text], image] = logits[from_text]
    return scored


@dataclass
class RetrievalResult(TaskResult):
    """An evaluation; metrics are `dual`, recall by the dual encoder alone, and `reranked` where it was asked for.

    Attributes:
        scores: what the better of the two ranks by.
        image_of_text: row of each caption's image in the scores, `[texts]`.
        images: the images, in the order of the scores.
        captions: the captions, in the order of the scores.
        similarities: cosines of the dual encoder `[images, texts]`.
        embeddings: alignment and uniformity of the shared space; see `tercet.tasks.embedding`.
    """

    scores: Scores
    image_of_text: Tensor
    images: EncodedImages
    captions: list[str]
    similarities: Tensor
    embeddings: dict[str, float]


def evaluate_retrieval(model: Tercet, source: SampleTable, config: Config) -> RetrievalResult:
    """Retrieval among the images of a source and all their captions.

    Args:
        model: with its tokenizer, in evaluation mode.
        source: images with captions; broken images are skipped, with their captions.
        config: `data` and `evaluate` are read.

    Raises:
        TercetError: no image can be read, or the model has no tokenizer.
    """
    require_tokenizer(model)
    count = config.evaluate.rerank
    images = encode_images(model, source, config, keep_tokens=count > 0)
    texts, captions, image_of_text = encode_captions(model, source, config, images)
    similarities = cosines(images.image_feats, texts.text_feats)
    scores = Scores(similarities, similarities.T)
    metrics = {"dual": recall(scores, image_of_text)}
    if count > 0:
        scores = rerank(model, images.image_embeds, texts, similarities, count, model.temperature.device)
        metrics["reranked"] = recall(scores, image_of_text)
    return RetrievalResult(
        metrics=metrics,
        sizes={"images": len(images.keys), "texts": len(captions)},
        problems=images.problems,
        predictions=ranked_lists(scores, images.keys, captions),
        scores=scores,
        image_of_text=image_of_text,
        images=images,
        captions=captions,
        similarities=similarities,
        embeddings=embedding_metrics(images.image_feats, texts.text_feats, image_of_text),
    )


def ranked_lists(scores: Scores, keys: Sequence[str], captions: Sequence[str]) -> list[dict[str, Any]]:
    """The best of every query: of captions `{"caption", "images"}`, of images `{"image", "captions"}`."""
    best_images = scores.text_to_image.topk(min(RANKS[-1], len(keys)), dim=1).indices.tolist()
    best_texts = scores.image_to_text.topk(min(RANKS[-1], len(captions)), dim=1).indices.tolist()
    rows: list[dict[str, Any]] = [
        {"caption": caption, "images": [keys[image] for image in best]}
        for caption, best in zip(captions, best_images, strict=True)
    ]
    return rows + [
        {"image": key, "captions": [captions[text] for text in best]}
        for key, best in zip(keys, best_texts, strict=True)
    ]


def build_pretraining(config: Config, student: Tercet) -> Pretraining:
    """The five objectives over images with captions, which pre-training, retrieval and grounding train by."""
    published = config.compat == "published"
    # The published pre-training makes every pair its own only positive; its fine-tuning goes by image ids.
    match_ids = config.task != "pretrain" or not published
    return Pretraining(student, config.objectives, published, match_ids)


_PAIRS = TaskSpec(
    open=open_sources,
    build=build_pretraining,
    evaluate=evaluate_retrieval,
    selection_metrics=("reranked.r_mean", "dual.r_mean"),
    samples=False,
)
TASKS = {"pretrain": _PAIRS, "retrieval": _PAIRS}
