"""JSON with some of its values replaced by odd ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any


def mutated_json(seed: bytes, draw: Callable[[Sequence[Any]], Any], parts: Callable[[], Any]) -> bytes:
    """`seed` with some of its values replaced by odd ones.

    Args:
        seed: JSON, or JSON lines.
        draw: chooses one of a sequence.
        parts: makes an odd value.
    """
    try:
        values = [json.loads(seed)]
    except ValueError:
        values = [json.loads(line) for line in seed.split(b"\n") if line.strip()]
    for _ in range(draw(range(1, 4))):
        places = list(_places(values))
        container, key = draw(places)
        what = draw(("replace", "replace", "remove", "double"))
        if what == "replace":
            container[key] = parts()
        elif what == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        if not values:
            break
    return b"\n".join(json.dumps(value).encode() for value in values)


def _places(value: Any) -> Any:
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], list | dict):
            yield from _places(value[key])
