"""A model's sizes, read off the shapes of a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tercet.config import ModelConfig
from tercet.errors import TercetError
from tercet.model.published import Stack, find_names, find_stack, layer_numbers

_HEAD_WIDTH = 64  # channels of an attention head in every published vision transformer and BERT


def vision_sizes(state: Mapping[str, Tensor], prefix: str, heads: int | None) -> dict[str, Any]:
    """`model.vision` of a checkpoint, read off the shapes; the position table must hold one class row.

    Raises:
        TercetError: a tensor that tells a size is missing, the grid is not square, or `heads` must be given.
    """
    kernel = needed(state, f"{prefix}patch_embed.proj.weight")
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise TercetError(
            f"{prefix}patch_embed.proj.weight has shape {list(kernel.shape)}; Tercet's patches are square and of three "
            "colours"
        )
    width, patch = kernel.shape[0], kernel.shape[2]
    cells = needed(state, f"{prefix}pos_embed").shape[1] - 1
    grid = math.isqrt(cells)
    if grid * grid != cells:
        raise TercetError(f"{prefix}pos_embed has {cells} rows besides the class row, which make no square grid")
    blocks = layer_numbers(state, rf"{re.escape(prefix)}blocks\.(\d+)\.")
    hidden = needed(state, f"{prefix}blocks.0.mlp.fc1.weight").shape[0]
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "depth": blocks[-1] + 1,
        "heads": _heads(width, heads, "vision_heads", "--vision-heads"),
        "mlp_ratio": _ratio(hidden, width),
    }


def text_sizes(state: Mapping[str, Tensor], prefix: str, stack: Stack, heads: int | None) -> dict[str, Any]:
    """`model.text` of a checkpoint, read off the shapes.

    Raises:
        TercetError: a tensor that tells a size is missing, or `heads` must be given.
    """
    vocabulary, width = needed(state, f"{prefix}embeddings.word_embeddings.weight").shape
    return {
        "vocabulary_size": vocabulary,
        "max_positions": needed(state, f"{prefix}embeddings.position_embeddings.weight").shape[0],
        "width": width,
        "mlp_width": needed(state, f"{prefix}encoder.layer.0.intermediate.dense.weight").shape[0],
        "depth": len(stack.text) + len(stack.fusion),
        "fusion_layer": len(stack.text),
        "heads": _heads(width, heads, "text_heads", "--text-heads"),
    }


def published_config(
    state: Mapping[str, Tensor], vision_heads: int | None = None, text_heads: int | None = None
) -> ModelConfig:
    """The sizes of a published model, read off its shapes.

    Args:
        state: a published model's state dict.
        vision_heads: attention heads of the vision transformer; default 64 channels a head.
        text_heads: attention heads of the text stack; default 64 channels a head.

    Raises:
        TercetError: a tensor that tells a size is missing, or a number of heads must be given.
    """
    names = find_names(state)
    sizes: dict[str, Any] = {
        "vision": vision_sizes(state, names.vision or "", vision_heads),
        "text": text_sizes(state, names.text or "", find_stack(state, names), text_heads),
    }
    if "vision_proj.weight" in state:
        sizes["embed_dim"] = state["vision_proj.weight"].shape[0]
    sizes["heads"] = _task_heads(state, find_stack(state, names))
    return ModelConfig.model_validate(sizes)


def _task_heads(state: Mapping[str, Tensor], stack: Stack) -> list[str]:
    """`model.heads` of a published model for a downstream task."""
    heads = ["answer"] if stack.answers else []
    if "cls_head.0.weight" in state:
        heads.append("nlvr" if stack.doubled else "entailment")
    if "ta_head.weight" in state:
        heads.append("assignment")
    return heads


def needed(state: Mapping[str, Tensor], name: str) -> Tensor:
    """`state[name]`.

    Raises:
        TercetError: it is not there.
    """
    if name not in state:
        raise TercetError(f"{name} is missing; the file is incomplete or of another architecture")
    return state[name]


def _heads(width: int, heads: int | None, option: str, flag: str) -> int:
    if heads is None:
        if width % _HEAD_WIDTH:
            raise TercetError(
                f"the number of attention heads cannot be told from width {width}; give it as {flag} ({option})"
            )
        return width // _HEAD_WIDTH
    if heads < 1 or width % heads:
        raise TercetError(f"{flag} {heads} does not divide width {width}")
    return heads


def _ratio(hidden: int, width: int) -> float:
    """The smallest quotient that gives `hidden` back as `int(width * ratio)`."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio
