"""Timing that holds on a shared machine: medians of runs taken in turn, and the matrix rate measured between them."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tercet.device import processor_name, tune_malloc

# Rows, inner and outer width of a matrix product: the up-projection of 8 images of 257 tokens in a base-size block,
# which the published method's share of the rate was measured against, and a large square one.
BASE_SHAPE = (2056, 768, 3072)
SQUARE_SHAPE = (2048, 2048, 2048)
# What a GPU is measured by: as many tokens as 256 images have, and a square that fills it.
GPU_SHAPES = ((65792, 768, 3072), (8192, 8192, 8192))


@dataclass
class MatrixRate:
    """FLOPs a second of plain matrix products, sampled between the timed runs so that both see the same machine.

    Attributes:
        clock: seconds from any start.
        device: where they are multiplied.
        dtype: of the matrices.
        shapes: rows, inner and outer width of each product.
        samples: FLOP/s of each shape, one an occasion.
    """

    clock: Callable[[], float] = time.perf_counter
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    shapes: tuple[tuple[int, int, int], ...] = (BASE_SHAPE, SQUARE_SHAPE)
    samples: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._operands = {
            (rows, inner, outer): (self._draw(rows, inner), self._draw(inner, outer), self._draw(rows, outer))
            for rows, inner, outer in self.shapes
        }
        for left, right, product in self._operands.values():
            torch.mm(left, right, out=product)

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def now(self) -> float:
        """The clock, once the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def sample(self, repeats: int = 3) -> None:
        """Time each shape `repeats` times and keep all of them."""
        for shape, (left, right, product) in self._operands.items():
            rows, inner, outer = shape
            for _ in range(repeats):
                started = self.now()
                torch.mm(left, right, out=product)
                rate = 2 * rows * inner * outer / (self.now() - started)
                self.samples.setdefault(shape, []).append(rate)

    def median(self) -> float:
        """FLOP/s of the first shape."""
        return statistics.median(self.samples[self.shapes[0]])

    def summary(self) -> dict[str, float]:
        """GFLOP/s by shape."""
        return {
            "x".join(map(str, shape)): round(statistics.median(rates) / 1e9, 1) for shape, rates in self.samples.items()
        }


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, rate: MatrixRate) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times, all runs in turn in every round.

    Args:
        runs: what to time; each was called before, so that nothing is done for the first time here.
        rounds: times each.
        rate: sampled around every run; its clock times the runs too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rate.sample()
            started = rate.now()
            run()
            seconds[name].append(rate.now() - started)
    rate.sample()
    return seconds


def describe_machine(arguments: argparse.Namespace) -> dict[str, object]:
    """Processor, cores, threads, versions and how it was timed: what a reader needs to interpret a number."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "keeps_memory": not arguments.return_memory and tune_malloc(),
        "clock": "processor" if arguments.processor_time else "wall",
        "card": torch.cuda.get_device_name() if getattr(arguments, "device", "cpu") == "cuda" else None,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark of this folder has."""
    parser.add_argument("--quick", action="store_true", help="a small model, under 50 s on 2 cores")
    parser.add_argument("--no-plain", dest="plain", action="store_false", help="time ours alone")
    parser.add_argument("--return-memory", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, and its processor time instead of wall time: for a machine that others keep busy",
    )


def prepare(arguments: argparse.Namespace) -> MatrixRate:
    """Set threads, allocator and seed as the options say; the rate holds the clock to time with."""
    if arguments.processor_time:
        torch.set_num_threads(1)
    if not arguments.return_memory:
        tune_malloc()
    torch.manual_seed(0)
    if getattr(arguments, "device", "cpu") == "cuda":
        return MatrixRate(time.perf_counter, "cuda", torch.bfloat16, GPU_SHAPES)
    dtype = torch.bfloat16 if getattr(arguments, "precision", "fp32") == "bf16" else torch.float32
    return MatrixRate(time.process_time if arguments.processor_time else time.perf_counter, dtype=dtype)


def spread(seconds: list[float]) -> list[float]:
    """Minimum and maximum, which show how quiet the machine was."""
    return [round(min(seconds), 4), round(max(seconds), 4)]
