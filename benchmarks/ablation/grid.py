"""What an ablation compares: a recipe, cells that change keys of it, shares of shuffled captions, and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from tercet.config import Section
from tercet.errors import TercetError


class Grid(Section):
    """An ablation, as its YAML file describes it."""

    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    cells: dict[str, dict[str, Any]]
    baseline: str
    noise: list[float] = Field(default_factory=lambda: [0.0])
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2])

    def runs(self) -> Iterator[Run]:
        """Every run, all cells of one seed before the next seed: an interrupted grid compares what it has."""
        for seed, noise, cell in itertools.product(self.seeds, self.noise, self.cells):
            yield Run(cell, noise, seed, {**self.overrides, **self.cells[cell], "train.seed": seed})


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        cell: name of what is changed.
        noise: share of training images whose captions are exchanged.
        seed: of the training and of the noise.
        flags: dotted config keys.
    """

    cell: str
    noise: float
    seed: int
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.cell.replace(' ', '-')}-noise{round(100 * self.noise)}-seed{self.seed}"

    def command(self) -> list[str]:
        """The flags as words of a command line."""
        words: list[str] = []
        for key, value in self.flags.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{key}", *("none" if one is None else str(one).lower() for one in values)]
        return words


def read_grid(file: Path) -> Grid:
    """The grid in a YAML file.

    Raises:
        TercetError: the file is missing or malformed, or the baseline is none of its cells.
    """
    try:
        grid = Grid.model_validate(yaml.safe_load(file.read_text("utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TercetError(f"{file}: {error}") from None
    if grid.baseline not in grid.cells:
        raise TercetError(f"{file}: baseline {grid.baseline!r} is none of the cells {', '.join(grid.cells)}")
    return grid
