"""What a conversion did: every key used, made new, kept, resized or left over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tercet.config import ModelConfig

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of `tercet.model.convert.convert`; as text, every key, those of like layers on one line.

    Attributes:
        source: the file of weights.
        folder: the model folder that was written.
        kind: what the file is.
        config: the sizes of the model.
        used: our keys, and theirs that each was made of.
        made_new: our keys that got fresh random values.
        kept: our keys that came from the base model.
        resized: what was resized, from what to what.
        left_over: their keys that were not used, by reason.
        notes: what a user should know.
    """

    source: Path
    folder: Path
    kind: str
    config: ModelConfig
    used: dict[str, list[str]]
    made_new: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left_over: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines: the counts and the notes."""
        left = sum(map(len, self.left_over.values()))
        new_parts = ", ".join(dict.fromkeys(map(part_of, self.made_new)))
        counts = [
            f"{len(self.used)} tensors of the model come from it",
            f"{len(self.kept)} from the base model" if self.kept else "",
            f"{len(self.made_new)} were made new ({new_parts})" if self.made_new else "",
            f"{left} entries of it were left over ({', '.join(self.left_over)})" if left else "",
        ]
        return "\n".join(
            [
                f"{self.source.name} is a {self.kind}.",
                "; ".join(filter(None, counts)) + ".",
                *(f"Resized: {line}." for line in self.resized),
                *(f"Note: {line}." for line in self.notes),
            ]
        )

    def __str__(self) -> str:
        sections = {
            "Used": [f"{ours} <- {', '.join(theirs)}" for ours, theirs in self.used.items()],
            "Kept from the base model": self.kept,
            "Made new": self.made_new,
            **{f"Left over, {reason}": names for reason, names in self.left_over.items()},
        }
        lines = []
        for title, names in sections.items():
            if names:
                lines += [f"{title} ({len(names)}):", *(f"  {line}" for line in _collapse(names))]
        return "\n".join([*lines, self.summary()])


def part_of(name: str) -> str:
    """The part of the model that our key `name` belongs to; cross-attention is told apart from its stack."""
    return "cross-attention" if ".cross_" in name else name.split(".")[0]


def _collapse(names: Iterable[str]) -> list[str]:
    """Lines that differ only in layer numbers as one line: `blocks.{0-11}.norm1.weight`."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in _NUMBER.findall(name)]
        groups.setdefault(_NUMBER.sub("#", name), []).append(numbers)
    lines = []
    for pattern, rows in groups.items():
        ranges = iter(_range(sorted(set(column))) for column in zip(*rows, strict=True))
        lines.append(re.sub("#", lambda _, ranges=ranges: next(ranges), pattern))
    return lines


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"
