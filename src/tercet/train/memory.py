"""What memory a training step takes, by arithmetic alone.  Needs neither torch nor the model."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.config import ModelConfig, ObjectivesConfig, TextConfig, VisionConfig
from tercet.model.vision import kept_patches
from tercet.train.cost import Needs, Shape, count_parameters, expected_shape, teacher_parameters, trained_parameters

# What a process holds before the model: interpreter, libraries, threads.
PROCESS = 400 << 20
# What passes through a step on a CPU takes so much more than its bytes: gaps that the C library leaves between blocks
# of many sizes, and results that one layer holds for a moment.  Measured on the base model (docs/performance.md).
CPU_GAPS = 1.45
# Of a card's memory, what its context, its libraries and gaps between tensors take.
UNUSABLE = 0.08


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass of a batch keeps for the backward one.

    Attributes:
        vision: by the image encoder, whose backward pass is the last.
        others: by everything else.
        working: what the backward pass of one block of the image encoder holds besides.
    """

    vision: int
    others: int
    working: int

    @property
    def total(self) -> int:
        """What is kept together."""
        return self.vision + self.others


def count_memory(
    model: ModelConfig,
    objectives: ObjectivesConfig,
    shape: Shape,
    half: bool,
    cuda: bool = False,
    recompute: bool = False,
) -> dict[str, int]:
    """Bytes that a training step holds at its fullest moment, by what they are for.

    Gradients and activations are not at their most at the same time: those of text and fusion are there when the
    backward pass reaches the image encoder, whose activations go as its gradients come.

    Args:
        model: the sizes.
        objectives: what is enabled.
        shape: one batch.
        half: the encoders' activations are kept in bf16; everything else is fp32.
        cuda: on a GPU; else on a CPU, whose memory the process itself counts in.
        recompute: with activation checkpointing.
    """
    needs, parts = Needs.of(objectives), count_parameters(model)
    trained = trained_parameters(model, objectives)
    kept = count_activations(model, objectives, shape, half, recompute)
    others = trained - parts["image encoder"]
    passing = max(kept.total, kept.vision + kept.working + 4 * others, 4 * trained + kept.working)
    return {
        "process": 0 if cuda else PROCESS,
        "weights": 4 * sum(parts.values()),
        "bf16 copies": 2 * trained if half else 0,
        "AdamW moments": 8 * trained,
        "teacher": 4 * teacher_parameters(model, objectives),
        "queue": needs.queue * (2 * 4 * model.embed_dim + 8),
        "activations and gradients": passing if cuda else round(CPU_GAPS * passing),
    }


def largest_batch(
    model: ModelConfig,
    objectives: ObjectivesConfig,
    tokens: int,
    half: bool,
    recompute: bool = False,
    card: float = 80e9,
) -> int:
    """The most pairs a step on a card of `card` bytes; 0 when not even one fits."""

    def fits(batch: int) -> bool:
        shape = expected_shape(batch, tokens, objectives.mlm_probability)
        held = count_memory(model, objectives, shape, half, cuda=True, recompute=recompute)
        return sum(held.values()) <= card * (1 - UNUSABLE)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def count_activations(
    model: ModelConfig, objectives: ObjectivesConfig, shape: Shape, half: bool, recompute: bool = False
) -> Activations:
    """What the forward pass of a batch keeps; about, since libraries differ."""
    size = 2 if half else 4
    image_tokens = 1 + kept_patches(model.vision.grid**2, objectives.patch_drop)
    vision, block = _vision_bytes(model.vision, image_tokens, half, recompute)
    others = size * _text_elements(model, objectives, shape, image_tokens - model.vision.first_fused, recompute)
    others += 4 * _compared_elements(model.text, objectives, shape)
    working = size * image_tokens * (4 * model.vision.width + 2 * int(model.vision.width * model.vision.mlp_ratio))
    working += block if recompute else 0
    return Activations(shape.batch * vision, round(shape.batch * others), shape.batch * working)


def _vision_bytes(vision: VisionConfig, image_tokens: int, half: bool, recompute: bool) -> tuple[int, int]:
    """Of an image what the encoder keeps, and what one block keeps.

    Of a token, a block keeps 8 widths (two norms with inputs and outputs, queries, keys, values, and what attention
    gives) and the MLP's hidden layer twice.  The norms read fp32 whatever the precision.
    """
    size, width = (2 if half else 4), vision.width
    block = image_tokens * (size * (8 * width + 2 * int(width * vision.mlp_ratio)) + (4 - size) * 2 * width)
    layers = vision.depth * (image_tokens * 4 * width if recompute else block)
    return layers + size * 2 * image_tokens * width + size * _stem_elements(vision), block


def _stem_elements(vision: VisionConfig) -> int:
    """Of an image in a convolution stem: what each stage reads, and its norm's input and output."""
    if vision.stem == "patch":
        return 0
    places = [(vision.image_size >> stage) ** 2 for stage in range(len(vision.stem_channels) + 1)]
    read = sum(place * width for place, width in zip(places, (3, *vision.stem_channels), strict=True))
    return read + sum(2 * place * width for place, width in zip(places[1:], vision.stem_channels, strict=True))


def _text_elements(
    model: ModelConfig, objectives: ObjectivesConfig, shape: Shape, image_tokens: int, recompute: bool
) -> float:
    """Of a pair, in text encoder and fusion encoder: as in a vision block, and 4 widths more for cross-attention."""
    needs, text = Needs.of(objectives), model.text
    fusion = text.depth - text.fusion_layer
    readings, passes = 1 + needs.masks, 3 * needs.matches + needs.masks
    layer = shape.tokens * (8 * text.width + 2 * text.mlp_width)
    # Dropout keeps a mask of a byte an element, and the attention weights before and after it.  On a CPU the mask is of
    # floats, which at base size is 1 % more in all and left out here.
    layer += (text.dropout > 0) * shape.tokens * (text.width // 2 + 2 * text.heads * shape.tokens)
    cross = shape.tokens * 4 * text.width + (text.dropout > 0) * 2 * shape.tokens * text.heads * image_tokens
    if recompute:
        layer, cross = shape.tokens * text.width, 0
    # The last layer runs for [CLS] or the hidden words alone.
    elements = readings * text.fusion_layer * layer + passes * (fusion - 1) * (layer + cross)
    # Keys and values of the images, and once more for the negative images.
    fuses = needs.matches or needs.masks
    return elements + fuses * (1 + needs.matches) * fusion * image_tokens * 2 * text.width


def _compared_elements(text: TextConfig, objectives: ObjectivesConfig, shape: Shape) -> float:
    """Of a pair, logits over vocabulary and queue, always fp32."""
    needs = Needs.of(objectives)
    logits = shape.masked / shape.batch * text.vocabulary_size * (4 if needs.teaches_words else 2) * needs.masks
    candidates = shape.batch + needs.queue
    compared = candidates * (6 * bool(objectives.cma) + 4 * bool(objectives.imc) + 2 * bool(needs.queue))
    return logits + compared
