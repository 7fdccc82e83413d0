"""Where in an image a text is seen: attention weights times their positive gradients (Grad-CAM, arXiv 1610.02391)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.errors import TercetError
from tercet.model.layers import AttentionTap, SelfAttention
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttention, TextLayer
from tercet.tasks.answering import decoder_of, next_log_probabilities

Mode = Literal["itm", "itc", "answer"]


def default_layer(model: Tercet, mode: Mode) -> int:
    """The layer to look at, counted as published: text layer 8 of 12 for `itm`, ViT block 8 of 12 for `itc`.

    For `answer`, which is ours, the last text layer: what the decoder reads is what its words saw there.
    """
    if mode == "itc":
        return model.config.vision.depth * 2 // 3
    text = model.config.text
    if mode == "answer":
        return text.depth - 1
    return text.fusion_layer + (text.depth - text.fusion_layer) // 3


def match_heatmaps(
    model: Tercet, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor, layer: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mode `itm`: where each token looks in the image, as far as that raises the logit of a match.

    Args:
        model: in evaluation mode.
        image_embeds: `[images, 1 + patches, vision_width]`.
        text_embeds: `[pairs, tokens, width]` from the text encoder; consecutive pairs share an image, as in
            `ImageMemory`.
        attention_mask: bool `[pairs, tokens]`.
        layer: index in the whole text stack; default `default_layer`.

    Returns:
        Maps `[pairs, tokens, patches]`, averaged over heads, 0 at padding (in the last layer the logit reads `[CLS]`
        alone, so only that token has a map); and `itm_logits` `[pairs, 2]` of the same pass.

    Raises:
        TercetError: there is no fusion layer of that index.
    """
    layer = default_layer(model, "itm") if layer is None else layer
    weights, gradient, logits = fusion_attention(model, image_embeds, text_embeds, attention_mask, layer)
    return _token_maps(weights, gradient, image_embeds, attention_mask), logits


def answer_heatmaps(
    model: Tercet,
    image_embeds: Tensor,
    text_embeds: Tensor,
    attention_mask: Tensor,
    layer: int | None = None,
    pieces: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mode `answer`: where each token of a question looks, as far as that makes the model's own answer likelier.

    The score is the log-probability of the first word piece of the likeliest answer.

    Args:
        model: fine-tuned for questions, in evaluation mode.
        image_embeds: `[images, 1 + patches, vision_width]`.
        text_embeds: of the questions, `[pairs, tokens, width]`; consecutive pairs share an image.
        attention_mask: bool `[pairs, tokens]`.
        layer: index in the whole text stack; default `default_layer`.
        pieces: what answers begin with, see `tercet.tasks.answering.first_pieces`; None: any word piece.

    Returns:
        As `match_heatmaps`.

    Raises:
        TercetError: the model answers no questions, or there is no fusion layer of that index.
    """
    decoder = decoder_of(model)

    def likelihood(fused: Tensor) -> Tensor:
        start = torch.full((fused.shape[0], 1), model.config.text.cls_id, device=fused.device)
        log_probabilities = next_log_probabilities(decoder, start, decoder.project_kv(fused, attention_mask))
        return (log_probabilities if pieces is None else log_probabilities[:, pieces]).amax(dim=-1)

    layer = default_layer(model, "answer") if layer is None else layer
    weights, gradient, logits = fusion_attention(model, image_embeds, text_embeds, attention_mask, layer, likelihood)
    return _token_maps(weights, gradient, image_embeds, attention_mask), logits


def contrast_heatmaps(model: Tercet, images: Tensor, text_feats: Tensor, layer: int | None = None) -> Tensor:
    """Mode `itc`: where the image's class token looks, as far as that raises the similarity to a text.

    Args:
        model: in evaluation mode.
        images: `[images, 3, height, width]`, uint8 or normalised floats.
        text_feats: `[pairs, embed_dim]`; consecutive pairs share an image.
        layer: index of the ViT block; default `default_layer`.

    Returns:
        `[pairs, patches]`, averaged over heads.

    Raises:
        TercetError: there is no block of that index.
    """
    layer = default_layer(model, "itc") if layer is None else layer
    weights, gradient = contrast_attention(model, images, text_feats, layer)
    own = weights[:, None, :, 0, 1:].float() * gradient[:, :, :, 0, 1:].float().clamp(min=0)
    return own.mean(dim=2).flatten(0, 1)


def fusion_attention(
    model: Tercet,
    image_embeds: Tensor,
    text_embeds: Tensor,
    attention_mask: Tensor,
    layer: int,
    score: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-attention of a fusion layer, the gradient of a score with respect to it, and `itm_logits` `[pairs, 2]`.

    Arguments are those of `match_heatmaps`; `score` makes `[pairs]` of the fused texts `[pairs, tokens, width]`, by
    default the logit of a match.

    Returns:
        `[pairs, heads, tokens, image_tokens]` twice, of the image tokens that the fusion encoder reads; the logits.
    """
    text = model.config.text
    if not text.fusion_layer <= layer < text.depth:
        raise TercetError(
            f"layer {layer} has no cross-attention; the fusion layers are {text.fusion_layer} to {text.depth - 1}"
        )
    chosen = model.fusion.layers[layer - text.fusion_layer]
    assert isinstance(chosen, TextLayer)
    with _tapped(chosen.cross_attention) as tap:
        kv = model.project_kv(_without_graph(image_embeds))
        # Whatever parameters are frozen, the graph starts here.
        texts = _without_graph(text_embeds).requires_grad_()
        fused = model.fuse(texts, attention_mask, kv)
        logits = model.itm_head(fused[:, 0])
        weights = tap.weights
        assert weights is not None
        scores = logits[:, 1] if score is None else score(fused)
        (gradient,) = torch.autograd.grad(scores.sum(), weights)
    pairs = texts.shape[0]
    return _unfold(weights.detach(), pairs), _unfold(gradient, pairs), logits.detach()


def contrast_attention(model: Tercet, images: Tensor, text_feats: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Self-attention of a ViT block and the gradients of the similarities, over the temperature, with respect to it.

    Arguments are those of `contrast_heatmaps`.

    Returns:
        `[images, heads, 1 + patches, 1 + patches]`, and the same for each text of an image,
        `[images, texts, heads, 1 + patches, 1 + patches]`.
    """
    blocks = model.vision.blocks
    if not 0 <= layer < len(blocks):
        raise TercetError(f"no ViT block {layer}; the blocks are 0 to {len(blocks) - 1}")
    attention = blocks[layer].attention
    assert isinstance(attention, SelfAttention)
    group = text_feats.shape[0] // images.shape[0]
    with _tapped(attention) as tap:
        pixels = _without_graph(model.vision.normalise(images)).requires_grad_()
        image_feats = model.project_image(model.encode_image(pixels)[:, 0])
        weights = tap.weights
        assert weights is not None
        feats = _without_graph(text_feats).unflatten(0, (images.shape[0], group))
        logits = torch.einsum("ie,ige->gi", image_feats, feats) / model.temperature.detach()
        # One backward pass for each text of an image, over the blocks above the tapped one alone.
        gradients = [
            torch.autograd.grad(own.sum(), weights, retain_graph=text + 1 < group)[0] for text, own in enumerate(logits)
        ]
    return weights.detach(), torch.stack(gradients, dim=1)


def average_words(maps: Tensor, attention_mask: Tensor, published: bool = False) -> Tensor:
    """One map a text: the mean over its tokens.

    Args:
        maps: `[pairs, tokens, patches]` from `match_heatmaps`.
        attention_mask: bool `[pairs, tokens]`.
        published: divide by all tokens, padding included, so that the map's scale depends on the rest of the batch.

    Returns:
        `[pairs, patches]`.
    """
    if published:
        return maps.mean(dim=1)
    return maps.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)


def to_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """`[..., patches]` to `[..., rows, columns]` for images of `height` x `width` pixels, or patches, of that shape."""
    rows = round(math.sqrt(maps.shape[-1] * height / width))
    return maps.unflatten(-1, (rows, maps.shape[-1] // rows))


def blur(maps: Tensor, weight: float) -> Tensor:
    """`[batch, rows, columns]` in which each patch adds its neighbours, across and down, by `weight`.

    Nothing lies beyond the edge.
    """
    line = torch.tensor([weight, 1.0, weight], dtype=maps.dtype, device=maps.device) / (1 + 2 * weight)
    return F.conv2d(maps[:, None], (line[:, None] * line)[None, None], padding=1)[:, 0]


def enlarge(maps: Tensor, height: int, width: int) -> Tensor:
    """`[batch, rows, columns]` to `[batch, height, width]` pixels, bicubic; a cubic may dip below 0 near a peak."""
    return F.interpolate(maps[:, None], size=(height, width), mode="bicubic", align_corners=False)[:, 0]


def _token_maps(weights: Tensor, gradient: Tensor, image_embeds: Tensor, attention_mask: Tensor) -> Tensor:
    """Attention to the patches times its positive gradient, averaged over heads, in fp32; 0 at padding."""
    maps = (weights.float() * gradient.float().clamp(min=0))[..., 1 - image_embeds.shape[1] :].mean(dim=1)
    return maps * attention_mask[..., None]


def _without_graph(values: Tensor) -> Tensor:
    """`values` without their graph; a tensor of inference mode is copied, since no graph can hold it."""
    return values.clone() if values.is_inference() else values.detach()


@contextmanager
def _tapped(attention: SelfAttention | CrossAttention) -> Iterator[AttentionTap]:
    """Keeps the weights of `attention`, with gradients even where the caller has switched them off."""
    tap = attention.tap = AttentionTap()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield tap
    finally:
        attention.tap = None


def _unfold(weights: Tensor, pairs: int) -> Tensor:
    """Weights `[pairs, heads, queries, keys]`; attention may have folded the pairs of an image into one query."""
    images = weights.shape[0]
    if pairs == images:
        return weights
    return weights.unflatten(2, (pairs // images, -1)).transpose(1, 2).flatten(0, 1)
