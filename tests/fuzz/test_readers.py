"""Every reader, on valid files, damaged files and random bytes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.property import check
from fuzz.targets import all_targets

TARGETS = all_targets()
# Always the same files, so that the suite never fails by chance; `explore.py` looks for new ones.
MANY = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
NAMES = ["", "\ud800", "a\0b", "x" * 5000, "../../etc/passwd", "/dev/zero", "http://", "~nobody/x", "1.jpg"]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, math.nan, math.inf, -math.inf]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(NAMES),
)
JSON_STARTS = (b'{"', b'["', b"[{", b"{\n")
ODD = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3)
)


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """A valid file with a few of its bytes changed, cut, doubled or taken away; sometimes bytes of no sense."""
    content = bytearray(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 512]))
        kind = draw(st.sampled_from(["set", "set", "flip", "cut", "remove", "insert", "double", "swap"]))
        if kind == "cut":
            del content[start:]
        elif kind == "remove":
            del content[start : start + length]
        elif kind == "insert":
            content[start:start] = draw(st.binary(max_size=16))
        elif kind == "double":
            content[start:start] = content[start : start + length]
        elif kind == "flip" and content:
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "swap" and content:
            other = draw(st.integers(0, len(content) - 1))
            content[start], content[other] = content[other], content[start]
        elif content:
            fill = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"9", b"[", b'"']))
            content[start : start + length] = fill * len(content[start : start + length])
    return bytes(content)


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
        slots = list(_slots(values))
        container, key = draw(slots)
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


def _slots(value: Any) -> Any:
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], list | dict):
            yield from _slots(value[key])


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_read(name: str) -> None:
    outcomes = [check(TARGETS[name], seed) for seed in TARGETS[name].seeds]
    assert outcomes.count("read") == len(outcomes) or name in REFUSED, outcomes


# Seeds that are whole but refused: a file without images, a checkpoint that is compressed.
REFUSED = {"file names", "weights packed pth", "vqa questions"}


@pytest.mark.parametrize("name", TARGETS)
@MANY
@given(data=st.data())
def test_damaged_files_give_our_error_or_are_read(name: str, data: st.DataObject) -> None:
    check(TARGETS[name], data.draw(damaged(list(TARGETS[name].seeds))))


JSON_TARGETS = [name for name, target in TARGETS.items() if target.seeds[0][:2] in JSON_STARTS]


@pytest.mark.parametrize("name", JSON_TARGETS)
@MANY
@given(data=st.data())
def test_json_of_odd_values_gives_our_error_or_is_read(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(list(TARGETS[name].seeds)))
    check(
        TARGETS[name],
        mutated_json(seed, lambda values: data.draw(st.sampled_from(list(values))), lambda: data.draw(ODD)),
    )
