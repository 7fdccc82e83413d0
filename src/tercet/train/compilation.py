"""Compiling the layers of the encoders, once for all of them and for captions of every length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from tercet.model.layers import VisionBlock
from tercet.model.tercet import Tercet
from tercet.model.text import TextLayer

# Of one layer's code: student and teacher, training and evaluation, with and without rows, each in its own graph.
VARIANTS = 32


def compile_encoders(models: Iterable[nn.Module], backend: str = "inductor") -> int:
    """Compile, in place, the blocks of the vision transformer, and of the text's layers what no image memory enters.

    Layers are compiled one by one: all of a kind share one graph, so that a deep model compiles as fast as a shallow
    one.  The number of tokens is a variable of the text's graphs; a caption length that was not seen before compiles
    nothing.  Attention to an image memory stays as it is, since what it reads is a list of any length.  Names of
    parameters do not change.

    Args:
        models: `Tercet`s, or teachers with some of its parts.
        backend: of `torch.compile`.

    Returns:
        How many layers are compiled at their first pass.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)  # type: ignore[attr-defined]
    count = 0
    for model in models:
        for name in ("vision", "text", "fusion"):
            part = getattr(model, name, None)
            for layer in [] if part is None else part.modules():
                count += _compile_layer(layer, backend)
    return count


def _compile_layer(layer: nn.Module, backend: str) -> bool:
    if isinstance(layer, VisionBlock):
        layer.compile(backend=backend)
        return True
    if isinstance(layer, TextLayer):
        for part in ("self_attend", "feed_forward"):
            setattr(layer, part, torch.compile(getattr(layer, part), backend=backend, dynamic=True))
        return True
    return False


def compiled_models(task: nn.Module) -> list[nn.Module]:
    """What of a task is worth compiling: its student, and its teacher where it has one."""
    teacher = getattr(task, "teacher", None)
    student = cast(Tercet, task.student)
    return [student] if teacher is None else [student, cast(nn.Module, teacher.model)]
