"""Published tensors of the parity folder, and what checkpoints hold besides the student: teacher and queues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tercet.model.names import QUEUES, published_to_state


def fixture_part(folder: Path, name: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of a fixture under a prefix, without it."""
    tensors = load_file(folder / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def is_teacher(name: str) -> bool:
    """Whether a published name belongs to the momentum teacher."""
    return name.partition(".")[0].endswith("_m")


def published_teacher(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The momentum teacher under our names; it has no temperature and no matching head, which are never averaged."""
    parts = {name: name.partition(".") for name in state if is_teacher(name)}
    return published_to_state(
        {part.removesuffix("_m") + dot + rest: state[name] for name, (part, dot, rest) in parts.items()}
    )


def published_queues(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The feature queues as they are: `[embed_dim, queue]`, `queue_ptr` `[1]`, `idx_queue` `[1, queue]`."""
    return {name: state[name] for name in QUEUES if name in state}
