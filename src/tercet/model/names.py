"""The names that others' checkpoints give to our weights: one table for each family, read in both directions.

A row of a table gives one of our tensors and theirs that make it up, concatenated along the first dimension.  `*`
stands for `weight` and `bias`, and `{text}` for the number of a layer of that stack: ours count from 0, theirs as
`find_layers` says.  Tensors are concatenated and reshaped, never computed with, so gradients map as weights do.

To read another family, add a `Family` to `FAMILIES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tercet.errors import TercetError

Table = dict[str, Sequence[str]]
Layers = dict[str, list[int]]  # for each stack their numbers of its layers, in our order
PublishedStyle = Literal["pretraining", "downstream"]

QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        kind: what it is, for messages.
        marks: beginnings of keys that only this family has, all of them.
        table: our tensors and theirs.
        encoders: prefixes of the encoders; a key under one of them that is not in the table is an error.
        tied: second names of tensors that are stored twice, and the first.
        optional: parts of our model (the first word of a key) that may be missing altogether.
        two_images: whether the layers above the text encoder alternate between a first and a second image.
    """

    kind: str
    marks: tuple[str, ...]
    table: Table
    encoders: tuple[str, ...]
    tied: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    two_images: bool = False


def vision_table(prefix: str) -> Table:
    """A vision transformer under timm's names."""
    block = {
        "attention_norm": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.output": "attn.proj",
        "mlp_norm": "norm2",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }
    return {
        "vision.class_token": (f"{prefix}cls_token",),
        "vision.position_embed": (f"{prefix}pos_embed",),
        "vision.patch_embed.*": (f"{prefix}patch_embed.proj.*",),
        **{
            f"vision.blocks.{{vision}}.{ours}.*": (f"{prefix}blocks.{{vision}}.{theirs}.*",)
            for ours, theirs in block.items()
        },
        "vision.norm.*": (f"{prefix}norm.*",),
    }


_SELF = {
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
# The second image is read through the keys and values of the first one's layer.
_SECOND_CROSS = {ours: theirs for ours, theirs in _CROSS.items() if ours != "cross_attention.key_value"}


def bert_embeddings(ours: str, prefix: str) -> Table:
    """BERT's embeddings."""
    return {
        f"{ours}.word_embed.weight": (f"{prefix}embeddings.word_embeddings.weight",),
        f"{ours}.position_embed.weight": (f"{prefix}embeddings.position_embeddings.weight",),
        f"{ours}.type_embed.weight": (f"{prefix}embeddings.token_type_embeddings.weight",),
        f"{ours}.norm.*": (f"{prefix}embeddings.LayerNorm.*",),
    }


def bert_layers(ours: str, stack: str, prefix: str, layer: Table) -> Table:
    """A stack of BERT's layers."""
    return {
        f"{ours}.layers.{{{stack}}}.{own}.*": tuple(f"{prefix}encoder.layer.{{{stack}}}.{name}.*" for name in names)
        for own, names in layer.items()
    }


def bert_head(ours: str, prefix: str) -> Table:
    """BERT's prediction head; its decoder is the word embeddings."""
    return {
        f"{ours}.transform.*": (f"{prefix}transform.dense.*",),
        f"{ours}.norm.*": (f"{prefix}transform.LayerNorm.*",),
        f"{ours}.bias": (f"{prefix}bias",),
    }


def tied_head(prefix: str, embeddings: str) -> dict[str, str]:
    """Second names in BERT's prediction head."""
    return {
        f"{prefix}decoder.weight": f"{embeddings}embeddings.word_embeddings.weight",
        f"{prefix}decoder.bias": f"{prefix}bias",
    }


def fusion_table(prefix: str) -> Table:
    """A text stack whose upper layers read an image."""
    return {
        **bert_embeddings("text", prefix),
        **bert_layers("text", "text", prefix, _SELF),
        **bert_layers("fusion", "fusion", prefix, _SELF | _CROSS),
    }


_JOINT: Table = {
    "temperature": ("temp",),
    "vision_projection.*": ("vision_proj.*",),
    "text_projection.*": ("text_proj.*",),
    "itm_head.*": ("itm_head.*",),
}
_HEADS = ("vision_projection", "text_projection", "itm_head", "mlm_head", "temperature")
_PREDICTIONS = "text_encoder.cls.predictions."
_ANSWERS, _ANSWER_HEAD = "text_decoder.bert.", "text_decoder.cls.predictions."
_DOWNSTREAM: Table = {
    **vision_table("visual_encoder."),
    **fusion_table("text_encoder."),
    **_JOINT,
    **bert_head("mlm_head", _PREDICTIONS),
    **bert_embeddings("answer_decoder", _ANSWERS),
    **bert_layers("answer_decoder", "answer", _ANSWERS, _SELF | _CROSS),
    **bert_head("answer_decoder.head", _ANSWER_HEAD),
    "assignment_head.*": ("ta_head.*",),
}
_DOWNSTREAM_TIED = tied_head(_PREDICTIONS, "text_encoder.") | tied_head(_ANSWER_HEAD, _ANSWERS)

PRETRAINING = Family(
    kind="published pre-training model",
    marks=("visual_encoder.", "text_encoder.bert."),
    table={
        **vision_table("visual_encoder."),
        **fusion_table("text_encoder.bert."),
        **_JOINT,
        **bert_head("mlm_head", _PREDICTIONS),
    },
    encoders=("visual_encoder.", "text_encoder.bert."),
    tied=tied_head(_PREDICTIONS, "text_encoder.bert."),
)
DOWNSTREAM = Family(
    kind="published fine-tuned model",
    marks=("visual_encoder.",),
    table={
        **_DOWNSTREAM,
        "entailment_head.hidden.*": ("cls_head.0.*",),
        "entailment_head.output.*": ("cls_head.2.*",),
    },
    encoders=("visual_encoder.", "text_encoder."),
    tied=_DOWNSTREAM_TIED,
    optional=_HEADS,
)
TWO_IMAGES = Family(
    kind="published fine-tuned model for two images",
    marks=("visual_encoder.",),
    table={
        **_DOWNSTREAM,
        **bert_layers("second_fusion", "second", "text_encoder.", _SELF | _SECOND_CROSS),
        "nlvr_head.hidden.*": ("cls_head.0.*",),
        "nlvr_head.output.*": ("cls_head.2.*",),
    },
    encoders=("visual_encoder.", "text_encoder."),
    tied={
        **{
            f"text_encoder.encoder.layer.{{second}}.{name}.*": f"text_encoder.encoder.layer.{{fusion}}.{name}.*"
            for name in _CROSS["cross_attention.key_value"]
        },
        **_DOWNSTREAM_TIED,
    },
    optional=_HEADS,
    two_images=True,
)


def _bert(prefix: str) -> Family:
    head = "cls.predictions."
    return Family(
        kind="BERT",
        marks=(f"{prefix}embeddings.word_embeddings.weight",),
        table={
            **bert_embeddings("text", prefix),
            **bert_layers("text", "text", prefix, _SELF),
            **bert_layers("fusion", "fusion", prefix, _SELF),
            **bert_head("mlm_head", head),
        },
        encoders=(prefix,),
        tied=tied_head(head, prefix),
        optional=("mlm_head",),
    )


VISION_TRANSFORMER = Family("vision transformer", ("patch_embed.proj.weight",), vision_table(""), ("",))
# The first that fits is taken.
FAMILIES = (PRETRAINING, TWO_IMAGES, DOWNSTREAM, _bert("bert."), _bert(""), VISION_TRANSFORMER)

# Keys that are skipped, by reason; under an encoder's prefix the last are what may be there besides the encoder.
SKIPPED = {
    "the momentum teacher": r"[^.]*_m(\..*)?",
    "queues of features": "|".join(QUEUES),
    "position numbers": r".*embeddings\.position_ids",
}
FOREIGN_HEADS = r"(head|head_dist|dist_token|pre_logits|pooler|cls)(\..*)?"


def _patch_matrix(kernel: Tensor) -> Tensor:
    """A convolution's kernel `[width, 3, patch, patch]` as `[width, 3 * patch**2]`: `to_patches` has its order."""
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise TercetError(
            f"the kernel of the patches has shape {list(kernel.shape)}; Tercet's are square, of three colours"
        )
    return kernel.flatten(1)


# Shapes of theirs to ours, and back; no-ops where a shape is already ours.
RESHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "vision.patch_embed.weight": _patch_matrix,
    "vision.class_token": lambda token: token.reshape(1, 1, -1),
    "vision.position_embed": lambda rows: rows.reshape(1, -1, rows.shape[-1]),
}


def find_family(state: Iterable[str]) -> Family | None:
    """The family of a checkpoint with these keys; None where it is of none."""
    keys = list(state)
    for family in FAMILIES:
        marked = all(any(key.startswith(mark) for key in keys) for mark in family.marks)
        if marked and (not family.two_images or _reads_two_images(keys)):
            return family
    return None


def find_layers(state: Iterable[str], family: Family) -> Layers:
    """The numbers of the layers that the keys name; a gap shows later as missing tensors.

    Where no layer of the text stack has cross-attention, its upper half starts the fusion encoder.
    """
    keys = list(state)
    layers = {stack: _layer_numbers(keys, family.table, stack) for stack in ("vision", "text", "answer")}
    text, cross = layers["text"], _layer_numbers(keys, family.table, "fusion", "cross_")
    first = cross[0] if cross else len(text) // 2
    above, step = text[first:], 2 if family.two_images else 1
    return layers | {"text": text[:first], "fusion": above[::step], "second": above[1::2] if step == 2 else []}


def expand(table: Table, layers: Layers) -> Table:
    """The table with a row for each layer, weight and bias."""
    ours = {stack: list(range(len(numbers))) for stack, numbers in layers.items()}
    return {
        own: names
        for pattern, theirs in table.items()
        for own, *names in zip(
            _expand_name(pattern, ours), *(_expand_name(name, layers) for name in theirs), strict=True
        )
    }


def tied_names(family: Family, layers: Layers) -> dict[str, str]:
    """Second names of tied tensors, and the first."""
    return {
        alias: name
        for second, first in family.tied.items()
        for alias, name in zip(_expand_name(second, layers), _expand_name(first, layers), strict=True)
    }


@dataclass(frozen=True)
class Gathered:
    """A checkpoint under our names.

    Attributes:
        weights: our tensors; one of which nothing is there is missing.
        used: for each of them their names.
        rows: the table of the family, expanded to the layers of the checkpoint.
        tied: second names of tied tensors, and the first.
        layers: the numbers of the layers.
    """

    weights: dict[str, Tensor]
    used: dict[str, list[str]]
    rows: Table
    tied: dict[str, str]
    layers: Layers


def gather(state: Mapping[str, Tensor], family: Family) -> Gathered:
    """Their tensors as ours.

    Raises:
        TercetError: a part of a tensor is missing, or its parts do not fit together.
    """
    layers = find_layers(state, family)
    rows, tied = expand(family.table, layers), tied_names(family, layers)
    second = {first: alias for alias, first in tied.items()}
    gathered = Gathered({}, {}, rows, tied, layers)
    for ours, theirs in rows.items():
        found = [name if name in state else second.get(name, name) for name in theirs]
        missing = [name for name in found if name not in state]
        if len(missing) == len(found):
            continue
        if missing:
            raise TercetError(f"{missing[0]} is missing, though {next(n for n in found if n in state)} is there")
        gathered.weights[ours] = _concatenate(ours, found, [state[name] for name in found])
        gathered.used[ours] = found
    return gathered


def published_to_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student of a published checkpoint under our names, for `Tercet.load_state_dict`; gradients map the same way.

    Args:
        state: a published model's state dict; teacher, queues and heads of other tasks may be in it.

    Raises:
        TercetError: a part of a tensor is missing.
    """
    return gather(state, find_family(state) or DOWNSTREAM).weights


def state_to_published(
    state: Mapping[str, Tensor], style: PublishedStyle = "pretraining", tied: bool = True
) -> dict[str, Tensor]:
    """Our weights (or gradients) under the published names; `published_to_state` takes them back, bit for bit.

    Args:
        state: as `Tercet.state_dict` gives it, or parts of it.
        style: pre-training models hold the text stack one level deeper than the others.
        tied: also write tied tensors under their second names, and position numbers, as the published code does.
    """
    two_images = any(name.startswith("second_fusion.") for name in state)
    family = PRETRAINING if style == "pretraining" else TWO_IMAGES if two_images else DOWNSTREAM
    counts = {
        stack: len({name.split(".")[2] for name in state if name.startswith(f"{part}.")})
        for stack, part in {
            "vision": "vision.blocks",
            "text": "text.layers",
            "fusion": "fusion.layers",
            "second": "second_fusion.layers",
            "answer": "answer_decoder.layers",
        }.items()
    }
    above = range(counts["text"], counts["text"] + counts["fusion"] + counts["second"])
    layers = {stack: list(range(counts[stack])) for stack in ("vision", "text", "answer")}
    layers |= {"fusion": list(above[:: 2 if two_images else 1]), "second": list(above[1::2] if two_images else [])}
    published: dict[str, Tensor] = {}
    for ours, theirs in expand(family.table, layers).items():
        if ours in state:
            published.update(zip(theirs, _split(ours, state[ours], len(theirs)), strict=True))
    if tied:
        for alias, first in tied_names(family, layers).items():
            head, decoder, _ = alias.rpartition("decoder.")
            if first in published and (not decoder or f"{head}bias" in published):
                published[alias] = published[first]
        for name in [name for name in published if name.endswith("embeddings.position_embeddings.weight")]:
            numbers = torch.arange(published[name].shape[0]).unsqueeze(0)
            published[name.replace("position_embeddings.weight", "position_ids")] = numbers
    return published


def _reads_two_images(keys: list[str]) -> bool:
    """Whether each fusion layer is there twice, and no matching head, as in the published models for two images."""
    if "itm_head.weight" in keys or not any(key.startswith(("cls_head.", "ta_head.")) for key in keys):
        return False
    layers = find_layers(keys, DOWNSTREAM)
    return len(layers["fusion"]) == 2 * len(layers["text"])


def _layer_numbers(keys: list[str], table: Table, stack: str, part: str = "") -> list[int]:
    """The numbers of the layers of a stack, from 0 or from the first that has a `part`, up to the last."""
    row = next((theirs[0] for ours, theirs in table.items() if f"{{{stack}}}" in ours and part in ours), None)
    if row is None:
        return []
    start, _, rest = row.partition(f"{{{stack}}}.")
    pattern = re.compile(re.escape(start) + r"(\d+)\." + (re.escape(rest.split(".")[0]) if part else ""))
    found = [int(match[1]) for key in keys if (match := pattern.match(key))]
    return list(range(min(found) if part else 0, max(found) + 1)) if found else []


def _expand_name(pattern: str, layers: Layers) -> list[str]:
    stack = re.search(r"\{(\w+)\}", pattern)
    names = [pattern.replace(stack[0], str(number)) for number in layers[stack[1]]] if stack else [pattern]
    return [name.replace("*", kind) for name in names for kind in ("weight", "bias")] if "*" in pattern else names


def _concatenate(ours: str, names: list[str], parts: list[Tensor]) -> Tensor:
    for name, part in zip(names[1:], parts[1:], strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise TercetError(
                f"{name} has shape {list(part.shape)}, which does not fit {names[0]} of {list(parts[0].shape)}"
            )
    if len(parts) > 1:
        return torch.cat(parts)
    return RESHAPE[ours](parts[0]) if ours in RESHAPE else parts[0]


def _split(ours: str, value: Tensor, parts: int) -> list[Tensor]:
    if ours == "vision.patch_embed.weight":
        patch = math.isqrt(value.shape[1] // 3)
        return [value.unflatten(1, (3, patch, patch))]
    # A view would drag the whole of its tensor into a file.
    return [value] if parts == 1 else [part.clone() for part in value.chunk(parts)]
