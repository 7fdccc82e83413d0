"""What a training step costs, by arithmetic alone: parameters and FLOPs.  Needs neither torch nor the model.

A multiply and an add count as two FLOPs; as usual only matrix products are counted.  The backward pass of a product
costs one more for its input's gradient and one more for its weight's.  Counted is what a CPU does; a GPU projects
keys and values of the images for every fusion layer, up to 2 % more.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from tercet.config import ModelConfig, ObjectivesConfig, TextConfig, VisionConfig
from tercet.model.vision import kept_patches


@dataclass(frozen=True)
class Shape:
    """The sizes of one batch.

    Attributes:
        batch: pairs.
        tokens: word pieces of the longest caption, `[CLS]` included.
        masked: hidden words of the whole batch.
        slots: hidden words of the caption that has most.
    """

    batch: int
    tokens: int
    masked: int
    slots: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of one step over a batch."""

    student_forward: int
    student_backward: int
    teacher: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.student_forward + self.student_backward + self.teacher


@dataclass(frozen=True)
class Needs:
    """What the enabled objectives ask for; mirrors `tercet.tasks.pretrain`."""

    contrasts: bool
    matches: bool
    masks: bool
    teacher: bool
    teaches_words: bool
    queue: int

    @classmethod
    def of(cls, objectives: ObjectivesConfig) -> Needs:
        """Read off the config."""
        enabled = set(objectives.enabled)
        contrasts = bool(enabled & {"cma", "imc", "lmi"})
        teaches_words = objectives.teacher and "mlm" in enabled and objectives.alpha > 0
        teacher = objectives.teacher and (contrasts or teaches_words)
        queue = objectives.queue_size if teacher and enabled & {"cma", "imc"} else 0
        return cls(contrasts, "itm" in enabled, "mlm" in enabled, teacher, teaches_words, queue)


class Tally:
    """FLOPs of matrix products, forward and backward, of a model that sees `patches` of each image."""

    def __init__(self, patches: int) -> None:
        self.patches = patches
        self.forward = 0
        self.backward = 0

    def add(self, forward: int, gradients: int = 2) -> None:
        """Count a product; `gradients` is the number of its two operands that need one."""
        self.forward += forward
        self.backward += forward * gradients


def expected_shape(batch: int, tokens: int, mlm_probability: float) -> Shape:
    """The batch to expect when every caption has `tokens` word pieces."""
    words = tokens - 1
    mean = words * mlm_probability
    spread = math.sqrt(mean * (1 - mlm_probability))
    slots = min(words, math.ceil(mean + spread * math.sqrt(2 * math.log(max(batch, 2)))))
    return Shape(batch, tokens, masked=round(batch * mean), slots=max(1, slots))


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the model."""
    vision, text = model.vision, model.text
    width, encoder, fusion = text.width, text.fusion_layer, text.depth - text.fusion_layer
    layer = _attention_parameters(width) + 4 * width + _mlp_parameters(width, text.mlp_width)
    cross = 2 * (width * width + width) + 2 * width * (vision.width + 1) + 2 * width
    vision_block = (
        _attention_parameters(vision.width) + 4 * vision.width + _mlp_parameters(vision.width, _mlp_width(vision))
    )
    return {
        "image encoder": _stem_parameters(vision)
        + (2 + vision.grid**2) * vision.width
        + vision.depth * vision_block
        + 2 * vision.width,
        "word embedding": text.vocabulary_size * width,
        "text encoder": (text.max_positions + 4) * width + encoder * layer,
        "fusion encoder": fusion * (layer + cross),
        "projections": (vision.width + 1 + width + 1) * model.embed_dim + 1,
        "itm head": 2 * (width + 1),
        "mlm head": width * width + 3 * width + text.vocabulary_size,
    }


def _stem_parameters(vision: VisionConfig) -> int:
    if vision.stem == "patch":
        return (3 * vision.patch_size**2 + 1) * vision.width
    channels = vision.stem_channels
    halving = sum(9 * before * after + after for before, after in itertools.pairwise((3, *channels)))
    residual = sum(9 * width * width + 3 * width for width in channels)
    return halving + residual + 2 * channels[-1] + (channels[-1] + 1) * vision.width


def teacher_parameters(model: ModelConfig, objectives: ObjectivesConfig) -> int:
    """Parameters that the teacher keeps: those its outputs need."""
    needs, parts = Needs.of(objectives), count_parameters(model)
    if not needs.teacher:
        return 0
    unread = ["itm head"] + ([] if needs.teaches_words else ["fusion encoder", "mlm head"])
    return sum(count for name, count in parts.items() if name not in unread) - 1


def trained_parameters(model: ModelConfig, objectives: ObjectivesConfig) -> int:
    """Parameters that an enabled objective reaches."""
    needs, parts = Needs.of(objectives), count_parameters(model)
    unread = [] if needs.contrasts else ["projections"]
    unread += [] if needs.matches or needs.masks else ["fusion encoder"]
    unread += [] if needs.matches else ["itm head"]
    unread += [] if needs.masks else ["mlm head"]
    return sum(count for name, count in parts.items() if name not in unread)


def count_flops(model: ModelConfig, objectives: ObjectivesConfig, shape: Shape) -> Flops:
    """FLOPs of one training step over a batch."""
    needs = Needs.of(objectives)
    patches = model.vision.grid**2
    student, teacher = Tally(kept_patches(patches, objectives.patch_drop)), Tally(patches)
    _encode_image(student, model.vision, shape.batch)
    _encode_text(student, model.text, shape)
    if needs.masks:
        _encode_text(student, model.text, shape)
    _project(student, model, shape, 2 if needs.contrasts else 0)
    _fuse_student(student, model, shape, needs)
    if needs.teacher:
        _encode_image(teacher, model.vision, shape.batch)
    if needs.teacher and needs.contrasts:
        _encode_text(teacher, model.text, shape)
        _project(teacher, model, shape, 0)
    if needs.teaches_words:
        _encode_text(teacher, model.text, shape)
        projected = _projects(model, teacher.patches, shape.tokens, shape.slots)
        _remember(teacher, model, shape, projected)
        _fuse_lower(teacher, model, shape, shape.batch, shape.batch, projected[0])
        _fuse_last(teacher, model, shape, shape.batch, shape.slots, projected[1])
        _vocabulary(teacher, model.text, shape)
    _contrast(student, teacher, model, objectives, shape)
    return Flops(student.forward, student.backward, teacher.forward)


def _encode_image(tally: Tally, vision: VisionConfig, images: int) -> None:
    patches, width = tally.patches, vision.width
    if vision.stem == "convolution":
        _convolve(tally, vision, images)
    else:
        # The pixels need no gradient.
        tally.add(2 * images * patches * 3 * vision.patch_size**2 * width, gradients=1)
    for _ in range(vision.depth):
        _layer(tally, images, 1 + patches, 1 + patches, width, _mlp_width(vision))


def _convolve(tally: Tally, vision: VisionConfig, images: int) -> None:
    """The convolution stem, which sees the whole image whatever share of its patches is left out later."""
    channels = vision.stem_channels
    for stage, (before, after) in enumerate(itertools.pairwise((3, *channels)), start=1):
        places = images * (vision.image_size >> stage) ** 2
        tally.add(18 * places * before * after, gradients=1 if stage == 1 else 2)
        tally.add(18 * places * after * after)
    tally.add(2 * images * vision.grid**2 * channels[-1] * vision.width)


def _encode_text(tally: Tally, text: TextConfig, shape: Shape) -> None:
    for _ in range(text.fusion_layer):
        _layer(tally, shape.batch, shape.tokens, shape.tokens, text.width, text.mlp_width)


def _layer(tally: Tally, batch: int, rows: int, tokens: int, width: int, mlp_width: int) -> None:
    """Self-attention of `rows` queries to `tokens` keys, and the MLP on the rows."""
    _attend(tally, batch, rows, tokens, width)
    tally.add(4 * batch * rows * width * mlp_width)


def _attend(tally: Tally, batch: int, rows: int, tokens: int, width: int) -> None:
    tally.add(2 * batch * (2 * rows + 2 * tokens) * width * width)
    tally.add(4 * batch * rows * tokens * width)


def _cross(tally: Tally, model: ModelConfig, pairs: int, rows: int, projected: bool) -> None:
    width, image_width, image_tokens = model.text.width, model.vision.width, _image_tokens(model, tally.patches)
    tally.add(4 * pairs * rows * width * width)
    if projected:
        tally.add(4 * pairs * rows * image_tokens * width)
    else:
        tally.add(4 * pairs * rows * width * image_width)
        tally.add(4 * pairs * rows * model.text.heads * image_tokens * image_width)


def _image_tokens(model: ModelConfig, patches: int) -> int:
    """Of an image, the tokens that the fusion encoder reads."""
    return 1 + patches - model.vision.first_fused


def _project(tally: Tally, model: ModelConfig, shape: Shape, gradients: int) -> None:
    tally.add(2 * shape.batch * (model.vision.width + model.text.width) * model.embed_dim, gradients)


def _projects(model: ModelConfig, patches: int, lower: int, last: int) -> tuple[bool, bool]:
    """Whether lower layers and the last one keep keys and values, for the numbers of text tokens that read an image."""
    return True, True


def _remember(tally: Tally, model: ModelConfig, shape: Shape, projected: tuple[bool, bool]) -> None:
    lower, last = projected
    layers = (model.text.depth - model.text.fusion_layer - 1) * lower + last
    image_tokens = _image_tokens(model, tally.patches)
    tally.add(layers * 2 * shape.batch * image_tokens * model.vision.width * 2 * model.text.width)


def _fuse_lower(tally: Tally, model: ModelConfig, shape: Shape, texts: int, pairs: int, projected: bool) -> None:
    """Layers below the last one; `texts` that make up the `pairs` attend to themselves once in the first of them."""
    text = model.text
    for _ in range(text.depth - text.fusion_layer - 1):
        _attend(tally, pairs, shape.tokens, shape.tokens, text.width)
        tally.add(4 * pairs * shape.tokens * text.width * text.mlp_width)
        _cross(tally, model, pairs, shape.tokens, projected)


def _fuse_last(tally: Tally, model: ModelConfig, shape: Shape, pairs: int, rows: int, projected: bool) -> None:
    text = model.text
    _layer(tally, pairs, rows, shape.tokens, text.width, text.mlp_width)
    _cross(tally, model, pairs, rows, projected)


def _vocabulary(tally: Tally, text: TextConfig, shape: Shape) -> None:
    tally.add(2 * shape.masked * text.width * (text.width + text.vocabulary_size))


def _fuse_student(tally: Tally, model: ModelConfig, shape: Shape, needs: Needs) -> None:
    if not (needs.matches or needs.masks):
        return
    texts, passes = needs.matches + needs.masks, 3 * needs.matches + needs.masks
    projected = _projects(model, tally.patches, shape.tokens * passes, 3 * needs.matches + shape.slots * needs.masks)
    _remember(tally, model, shape, projected)
    _fuse_lower(tally, model, shape, shape.batch * texts, shape.batch * passes, projected[0])
    if needs.matches:
        _fuse_last(tally, model, shape, 3 * shape.batch, 1, projected[1])
        tally.add(2 * 3 * shape.batch * model.text.width * 2)
        # Similarities that the hard negatives are drawn by, without gradient.
        tally.add(4 * shape.batch**2 * model.embed_dim, gradients=0)
    if needs.masks:
        _fuse_last(tally, model, shape, shape.batch, shape.slots, projected[1])
        _vocabulary(tally, model.text, shape)


def _contrast(student: Tally, teacher: Tally, model: ModelConfig, objectives: ObjectivesConfig, shape: Shape) -> None:
    needs = Needs.of(objectives)
    both_ways = 4 * shape.batch * model.embed_dim * (shape.batch + needs.queue)
    if objectives.cma:
        student.add(both_ways, gradients=1 if needs.teacher else 2)
        if needs.teacher and objectives.alpha > 0:
            teacher.add(both_ways)
    if objectives.imc:
        student.add(both_ways, gradients=1)
    if objectives.lmi:
        words, patches = shape.tokens - 1, model.vision.grid**2
        teacher.add(2 * shape.batch * patches * model.vision.width * model.embed_dim)
        teacher.add(2 * shape.batch * words * model.text.width * model.embed_dim)
        regions = (objectives.local_grid or math.isqrt(model.vision.grid)) ** 2
        student.add(2 * shape.batch**2 * (regions + words) * model.embed_dim, gradients=1)


def _attention_parameters(width: int) -> int:
    return 4 * width * (width + 1)


def _mlp_parameters(width: int, mlp_width: int) -> int:
    return 2 * width * mlp_width + width + mlp_width


def _mlp_width(vision: VisionConfig) -> int:
    return int(vision.width * vision.mlp_ratio)
