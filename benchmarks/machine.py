"""Timing that holds on a shared machine: medians of runs taken in turn, and the matrix rate measured between them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Rows, inner and outer width of a matrix product: the up-projection of 8 images of 257 tokens in a base-size block,
# which the published method's share of the rate was measured against, and a large square one.
BASE_SHAPE = (2056, 768, 3072)
SQUARE_SHAPE = (2048, 2048, 2048)


@dataclass
class MatrixRate:
    """FLOPs a second of plain fp32 matrix products, sampled between the timed runs so that both see the same machine.

    Attributes:
        shapes: rows, inner and outer width of each product.
        samples: FLOP/s of each shape, one an occasion.
    """

    shapes: tuple[tuple[int, int, int], ...] = (BASE_SHAPE, SQUARE_SHAPE)
    samples: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._operands = {
            (rows, inner, outer): (torch.randn(rows, inner), torch.randn(inner, outer), torch.empty(rows, outer))
            for rows, inner, outer in self.shapes
        }
        for left, right, product in self._operands.values():
            torch.mm(left, right, out=product)

    def sample(self, repeats: int = 3) -> None:
        """Time each shape `repeats` times and keep all of them."""
        for shape, (left, right, product) in self._operands.items():
            rows, inner, outer = shape
            for _ in range(repeats):
                started = time.perf_counter()
                torch.mm(left, right, out=product)
                rate = 2 * rows * inner * outer / (time.perf_counter() - started)
                self.samples.setdefault(shape, []).append(rate)

    def median(self, shape: tuple[int, int, int] = BASE_SHAPE) -> float:
        """FLOP/s of a shape."""
        return statistics.median(self.samples[shape])

    def summary(self) -> dict[str, float]:
        """GFLOP/s by shape."""
        return {"x".join(map(str, shape)): round(self.median(shape) / 1e9, 1) for shape in self.samples}


def take_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, rate: MatrixRate | None = None
) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times, all runs in turn in every round.

    Args:
        runs: what to time; each was called before, so that nothing is done for the first time here.
        rounds: times each.
        rate: sampled around every run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if rate is not None:
                rate.sample()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    if rate is not None:
        rate.sample()
    return seconds


def describe_machine() -> dict[str, object]:
    """Processor, cores, threads and versions: what a figure means nothing without."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def processor_name() -> str:
    """The processor as the system names it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def spread(seconds: list[float]) -> list[float]:
    """Least and greatest, for a reader to see how quiet the machine was."""
    return [round(min(seconds), 4), round(max(seconds), 4)]
