"""The names that published TCL and ALBEF checkpoints give to our weights, and the mapping both ways.

One table, `layout`, says which of their tensors make up each of ours.  BERT checkpoints and timm's vision transformers
use parts of the same names under other prefixes, so `tercet.model.convert` reads them with the same table.  Tensors are
only laid behind one another and flattened, never computed with: gradients and averages of weights map as weights do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tercet.errors import TercetError

QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")


@dataclass(frozen=True)
class Names:
    """Where the parts stand in a checkpoint; None for a part that this kind of checkpoint does not have.

    Attributes:
        vision: prefix of the vision transformer.
        text: prefix of the text stack.
        prediction: prefix of BERT's prediction head.
        joint: whether projections, temperature and matching head are there, under their published names.
        answers: prefix of the answer decoder, which has embeddings and a prediction head of its own.
        labels: whether heads that choose a label may be there, under their published names.
    """

    vision: str | None = None
    text: str | None = None
    prediction: str | None = None
    joint: bool = False
    answers: str | None = None
    labels: bool = False


PRETRAINING = Names("visual_encoder.", "text_encoder.bert.", "text_encoder.cls.predictions.", joint=True)
DOWNSTREAM = Names(
    "visual_encoder.",
    "text_encoder.",
    "text_encoder.cls.predictions.",
    joint=True,
    answers="text_decoder.",
    labels=True,
)


@dataclass(frozen=True)
class Piece:
    """One of our tensors and those of theirs that make it up, in order along the first dimension."""

    ours: str
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """The layers of a checkpoint: their numbers, in our order.

    Attributes:
        vision: blocks of the vision transformer.
        text: layers of the text encoder.
        fusion: layers of the fusion encoder.
        doubled: second layers of the pairs that models for two images have in place of each fusion layer; the
            published code stores the keys and values of their cross-attention under both layers' names.
        answers: layers of the answer decoder.
    """

    vision: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    fusion: list[int] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)


_BLOCK = {
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.output": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_LAYER = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "mlp.up": ("intermediate.dense",),
    "mlp.down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
_CROSS = {
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.output": ("crossattention.output.dense",),
    "cross_norm": ("crossattention.output.LayerNorm",),
}
_SECOND_CROSS = {ours: theirs for ours, theirs in _CROSS.items() if ours != "cross_attention.key_value"}
_JOINT = {"vision_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}


def layout(names: Names, stack: Stack) -> list[Piece]:
    """The whole table: each of our tensors that such a checkpoint can hold, in our order."""
    pieces: list[Piece] = []
    if names.vision is not None:
        pieces += _vision_layout(names.vision, stack.vision)
    if names.text is not None:
        pieces += _text_layout(names.text, stack)
    if names.joint:
        pieces.append(Piece("temperature", ("temp",)))
        for ours, theirs in _JOINT.items():
            pieces += _weight_and_bias(ours, (theirs,))
    if names.prediction is not None:
        pieces += _prediction_layout("mlm_head", names.prediction)
    if names.answers is not None:
        pieces += _embedding_layout("answer_decoder", f"{names.answers}bert.embeddings.")
        for index, layer in enumerate(stack.answers):
            ours, theirs = f"answer_decoder.layers.{index}", f"{names.answers}bert.encoder.layer.{layer}"
            pieces += _layer_layout(ours, theirs, _LAYER | _CROSS)
        pieces += _prediction_layout("answer_decoder.head", f"{names.answers}cls.predictions.")
    if names.labels:
        classifier = "nlvr_head" if stack.doubled else "entailment_head"
        pieces += _weight_and_bias(f"{classifier}.hidden", ("cls_head.0",))
        pieces += _weight_and_bias(f"{classifier}.output", ("cls_head.2",))
        pieces += _weight_and_bias("assignment_head", ("ta_head",))
    return pieces


def find_names(state: Iterable[str]) -> Names:
    """Which of the two published styles the keys are in: pre-training models hold the text stack one level deeper."""
    return PRETRAINING if any(name.startswith("text_encoder.bert.") for name in state) else DOWNSTREAM


def find_stack(state: Mapping[str, Tensor], names: Names) -> Stack:
    """The layers that the keys name.

    Models for two images hold a pair for each fusion layer; the first becomes our fusion layer, the second reads the
    second image.
    """
    vision = [] if names.vision is None else layer_numbers(state, rf"{re.escape(names.vision)}blocks\.(\d+)\.")
    if names.text is None:
        return Stack(vision)
    answers: list[int] = []
    if names.answers is not None:
        answers = layer_numbers(state, re.escape(names.answers) + r"bert\.encoder\.layer\.(\d+)\.")
    prefix = re.escape(names.text) + r"encoder\.layer\.(\d+)\."
    layers, cross = layer_numbers(state, prefix), layer_numbers(state, prefix + "crossattention")
    if not cross:
        lower = len(layers) // 2
        return Stack(vision, layers[:lower], layers[lower:])
    text, fusion = layers[: cross[0]], layers[cross[0] :]
    two_images = any(name.startswith(("cls_head.", "ta_head.")) for name in state) and "itm_head.weight" not in state
    if two_images and len(fusion) == 2 * len(text):
        return Stack(vision, text, fusion[::2], fusion[1::2])
    return Stack(vision, text, fusion, answers=answers)


def layer_numbers(state: Iterable[str], pattern: str) -> list[int]:
    """0 up to the largest number that `pattern` finds at the start of a key; a gap shows as missing tensors later."""
    found = [int(match.group(1)) for name in state if (match := re.match(pattern, name))]
    if not found:
        return []
    first = min(found) if "crossattention" in pattern else 0
    return list(range(first, max(found) + 1))


def tied_names(names: Names, stack: Stack) -> dict[str, str]:
    """Second names that the published code stores tied tensors under, and the first."""
    tied: dict[str, str] = {}
    for first, second in zip(stack.fusion, stack.doubled, strict=False):
        for theirs in _CROSS["cross_attention.key_value"]:
            for kind in ("weight", "bias"):
                alias, own = (f"{names.text}encoder.layer.{layer}.{theirs}.{kind}" for layer in (second, first))
                tied[alias] = own
    if names.prediction is not None and names.text is not None:
        tied[f"{names.prediction}decoder.weight"] = f"{names.text}embeddings.word_embeddings.weight"
        tied[f"{names.prediction}decoder.bias"] = f"{names.prediction}bias"
    if names.answers is not None:
        head = f"{names.answers}cls.predictions."
        tied[f"{head}decoder.weight"] = f"{names.answers}bert.embeddings.word_embeddings.weight"
        tied[f"{head}decoder.bias"] = f"{head}bias"
    return tied


def gather(state: Mapping[str, Tensor], names: Names, stack: Stack) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Lay their tensors together into ours.

    Args:
        state: their tensors; what the table does not name is left alone.
        names: where they stand.
        stack: their layers.

    Returns:
        Our tensors, and for each the names it was made from.  Tensors of which nothing is there are left out.

    Raises:
        TercetError: a part of a tensor is missing, or its parts do not fit together.
    """
    second = {first: alias for alias, first in tied_names(names, stack).items()}
    gathered: dict[str, Tensor] = {}
    origins: dict[str, list[str]] = {}
    for piece in layout(names, stack):
        found = [name if name in state else second.get(name, name) for name in piece.theirs]
        missing = [name for name in found if name not in state]
        if len(missing) == len(found):
            continue
        if missing:
            raise TercetError(f"{missing[0]} is missing, though {next(n for n in found if n in state)} is there")
        gathered[piece.ours] = _lay_together(piece.ours, found, [state[name] for name in found])
        origins[piece.ours] = found
    return gathered, origins


def published_to_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student of a published checkpoint under our names; gradients map the same way.

    Args:
        state: a published model's state dict; teacher, queues and heads of other tasks may be in it.

    Returns:
        Every tensor of ours that it holds, for `Tercet.load_state_dict`.

    Raises:
        TercetError: a part of a tensor is missing.
    """
    names = find_names(state)
    return gather(state, names, find_stack(state, names))[0]


def published_teacher(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The momentum teacher of a published checkpoint under our names.

    It has no temperature and no matching head, which the published method never averages.  Empty where there is none.

    Raises:
        TercetError: a part of a tensor is missing.
    """
    return published_to_state({_student_name(name): value for name, value in state.items() if is_teacher(name)})


def published_queues(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The feature queues as they are: `image_queue` and `text_queue` `[embed_dim, queue]`, `queue_ptr` `[1]`, and in
    retrieval models `idx_queue` `[1, queue]`."""
    return {name: state[name] for name in QUEUES if name in state}


def is_teacher(name: str) -> bool:
    """Whether a published name belongs to the momentum teacher."""
    return name.split(".", 1)[0].endswith("_m")


def state_to_published(
    state: Mapping[str, Tensor], style: Literal["pretraining", "downstream"] = "pretraining", tied: bool = True
) -> dict[str, Tensor]:
    """Our weights (or gradients) under the published names; `published_to_state` takes them back, bit for bit.

    Args:
        state: as `Tercet.state_dict` gives it, or parts of it.
        style: pre-training models hold the text stack one level deeper than the others.
        tied: whether tied tensors also stand under their second names, and the position numbers are there, as in the
            state dict of the published code.
    """
    names = PRETRAINING if style == "pretraining" else DOWNSTREAM
    text, fusion, second, vision, answers = (
        len(layer_numbers(state, rf"{part}\.(\d+)\."))
        for part in (
            r"text\.layers",
            r"fusion\.layers",
            r"second_fusion\.layers",
            r"vision\.blocks",
            r"answer_decoder\.layers",
        )
    )
    above = list(range(text, text + fusion + second))
    stack = Stack(
        list(range(vision)),
        list(range(text)),
        above[::2] if second else above,
        above[1::2] if second else [],
        list(range(answers)),
    )
    published: dict[str, Tensor] = {}
    for piece in layout(names, stack):
        if piece.ours in state:
            parts = _take_apart(piece.ours, state[piece.ours], len(piece.theirs))
            published.update(zip(piece.theirs, parts, strict=True))
    if tied:
        for alias, first in tied_names(names, stack).items():
            head, decoder, _ = alias.rpartition("decoder.")
            if first in published and (not decoder or f"{head}bias" in published):
                published[alias] = published[first]
        for embeddings in (f"{names.text}embeddings.", f"{names.answers}bert.embeddings."):
            positions = published.get(f"{embeddings}position_embeddings.weight")
            if positions is not None:
                published[f"{embeddings}position_ids"] = torch.arange(positions.shape[0]).unsqueeze(0)
    return published


def _student_name(name: str) -> str:
    part, dot, rest = name.partition(".")
    return part.removesuffix("_m") + dot + rest


def _vision_layout(prefix: str, blocks: list[int]) -> list[Piece]:
    pieces = [
        Piece("vision.class_token", (f"{prefix}cls_token",)),
        Piece("vision.position_embed", (f"{prefix}pos_embed",)),
        *_weight_and_bias("vision.patch_embed", (f"{prefix}patch_embed.proj",)),
    ]
    for index, block in enumerate(blocks):
        for ours, theirs in _BLOCK.items():
            pieces += _weight_and_bias(f"vision.blocks.{index}.{ours}", (f"{prefix}blocks.{block}.{theirs}",))
    return pieces + _weight_and_bias("vision.norm", (f"{prefix}norm",))


def _text_layout(prefix: str, stack: Stack) -> list[Piece]:
    pieces = _embedding_layout("text", f"{prefix}embeddings.")
    for part, layers, table in (
        ("text", stack.text, _LAYER),
        ("fusion", stack.fusion, _LAYER | _CROSS),
        ("second_fusion", stack.doubled, _LAYER | _SECOND_CROSS),
    ):
        for index, layer in enumerate(layers):
            pieces += _layer_layout(f"{part}.layers.{index}", f"{prefix}encoder.layer.{layer}", table)
    return pieces


def _embedding_layout(ours: str, theirs: str) -> list[Piece]:
    return [
        Piece(f"{ours}.word_embed.weight", (f"{theirs}word_embeddings.weight",)),
        Piece(f"{ours}.position_embed.weight", (f"{theirs}position_embeddings.weight",)),
        Piece(f"{ours}.type_embed.weight", (f"{theirs}token_type_embeddings.weight",)),
        *_weight_and_bias(f"{ours}.norm", (f"{theirs}LayerNorm",)),
    ]


def _layer_layout(ours: str, theirs: str, table: Mapping[str, tuple[str, ...]]) -> list[Piece]:
    pieces: list[Piece] = []
    for part, names in table.items():
        pieces += _weight_and_bias(f"{ours}.{part}", tuple(f"{theirs}.{name}" for name in names))
    return pieces


def _prediction_layout(ours: str, theirs: str) -> list[Piece]:
    return [
        *_weight_and_bias(f"{ours}.transform", (f"{theirs}transform.dense",)),
        *_weight_and_bias(f"{ours}.norm", (f"{theirs}transform.LayerNorm",)),
        Piece(f"{ours}.bias", (f"{theirs}bias",)),
    ]


def _weight_and_bias(ours: str, theirs: tuple[str, ...]) -> list[Piece]:
    return [Piece(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs)) for kind in ("weight", "bias")]


def _lay_together(ours: str, names: list[str], parts: list[Tensor]) -> Tensor:
    if ours == "vision.patch_embed.weight":
        # A convolution's kernel is a patch: channels, rows, columns, the order that `to_patches` gives.
        return parts[0].flatten(1)
    if len(parts) == 1:
        return parts[0]
    for name, part in zip(names[1:], parts[1:], strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise TercetError(
                f"{name} has shape {list(part.shape)}, which does not fit {names[0]} of {list(parts[0].shape)}"
            )
    return torch.cat(parts)


def _take_apart(ours: str, value: Tensor, parts: int) -> list[Tensor]:
    if ours == "vision.patch_embed.weight":
        patch = math.isqrt(value.shape[1] // 3)
        return [value.unflatten(1, (3, patch, patch))]
    if parts == 1:
        return [value]
    # A view would drag the whole of its tensor into a file.
    return [part.clone() for part in value.chunk(parts)]
