"""A model of ours as a published checkpoint, so that the code published with TCL and ALBEF loads it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from tercet.config import ModelConfig
from tercet.errors import TercetError
from tercet.files import write_atomic
from tercet.model.published import state_to_published
from tercet.model.tercet import Tercet

PublishedStyle = Literal["pretraining", "downstream"]

# What the published code keeps a moving average of.
_TAUGHT = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "text_decoder", "cls_head")
_TWO_IMAGES = ("nlvr", "assignment")


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint that was written.

    Attributes:
        file: where.
        style: how deep the text stack lies.
        entries: how many tensors it holds.
        left_out: parts of the model that the published form has no place for.
    """

    file: Path
    style: PublishedStyle
    entries: int
    left_out: list[str]


def write_published(model: Tercet, file: str | Path, style: PublishedStyle | None = None) -> PublishedFile:
    """Write `model` under the published names; `tercet.model.convert.convert` reads it back bit for bit.

    The published fine-tuning scripts read the moving averages as well, so that they are there too, equal to the
    weights.  The queues are not: they hold the features of batches that are past.

    Args:
        model: any; its heads for tasks are written as well.
        file: `.pth` (a dict with the weights under `model`, as published) or `.safetensors`.
        style: default the form of pre-training, and of a model with heads for tasks that of fine-tuning.

    Raises:
        TercetError: another suffix, a model that the published form cannot hold, or a full disk.
    """
    file = Path(file).expanduser()
    if file.suffix not in (".pth", ".pt", ".safetensors"):
        raise TercetError(f"{file}: name the checkpoint FILE.pth or FILE.safetensors")
    if file.is_dir():
        raise TercetError(f"{file} is a folder; name a file")
    heads: set[str] = set(model.config.heads)
    _refuse_together(heads)
    _refuse_ours(model.config)
    style = style or ("downstream" if heads else "pretraining")
    if style == "pretraining" and heads:
        raise TercetError(f"the form of pre-training has no place for {', '.join(sorted(heads))}; leave --style out")
    state = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    left_out: list[str] = []
    if heads & set(_TWO_IMAGES):
        # Both the published models and `find_stack` tell a model for two images by its want of a matching head.
        left_out = ["itm_head"]
        state = {name: value for name, value in state.items() if not name.startswith("itm_head.")}
    published = _with_teacher(state_to_published(state, style))
    write_atomic(file, _serialise(published, file.suffix))
    return PublishedFile(file, style, len(published), left_out)


def _refuse_together(heads: set[str]) -> None:
    classifiers = sorted(heads & {"entailment", *_TWO_IMAGES})
    if "entailment" in heads and len(classifiers) > 1:
        raise TercetError(
            f"the model has heads for {' and '.join(classifiers)}, which bear one name in the published form; "
            "convert the models that were fine-tuned for each"
        )


def _refuse_ours(config: ModelConfig) -> None:
    vision, text = config.vision, config.text
    ours = {
        "model.vision.stem": (vision.stem, "patch"),
        "model.vision.pool": (vision.pool, "class"),
        "model.vision.window": (vision.window, None),
        "model.text.pool": (text.pool, "class"),
    }
    for key, (value, published) in ours.items():
        if value != published:
            raise TercetError(
                f"the model has {key} {value}, which the published form has no place for; train with {key} {published}"
            )


def _with_teacher(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    teacher: dict[str, Tensor] = {}
    for name, value in published.items():
        part, dot, rest = name.partition(".")
        if part in _TAUGHT:
            teacher[f"{part}_m{dot}{rest}"] = value
    return {**published, **teacher}


def _serialise(state: Mapping[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        # This format refuses tensors that share memory, which tied and averaged ones do.
        return save({name: value.clone().contiguous() for name, value in state.items()}, {"format": "pt"})
    stream = io.BytesIO()
    torch.save({"model": dict(state)}, stream)
    return stream.getvalue()
