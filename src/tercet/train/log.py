"""What a run prints and writes while it trains: a progress bar, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tercet.errors import TercetError
from tercet.files import write_atomic

METRICS = "metrics.jsonl"
# Fields of a training line that are not losses.
NOT_LOSSES = frozenset({"epoch", "lr", "temperature", "grad_norm", "alpha", "pairs_per_second", "skipped"})
# Lines a run prints into a log file, where a bar cannot be redrawn.
PLAIN_LINES = 40


class NullLogger:
    """The logger of the ranks that neither write nor print; the interface of `RunLogger`."""

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""

    def log_train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of training metrics and show the losses."""

    def log_evaluation(self, step: int, data: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Write the line of an evaluation on `data` (`validation` or `test`)."""

    def event(self, step: int, message: str) -> None:
        """Write and show something that happened."""

    def status(self, description: str) -> None:
        """Show what the run does outside of training steps."""


class RunLogger(NullLogger):
    """Progress bar, metrics.jsonl and TensorBoard of one run; made by `open_logger`.

    Args:
        folder: the run folder.
        total: steps of the run.
        step: steps already taken.
    """

    def __init__(self, folder: Path, total: int, step: int) -> None:
        self.folder = folder
        self.total = total
        self.console = Console(stderr=True, soft_wrap=True)
        with self._report_full_disk():
            _drop_later_lines(folder / METRICS, step)
            # Unbuffered, so that a line that does not fit on the disk is noticed at once and removed again.
            self._stream = (folder / METRICS).open("ab", buffering=0)
        self._board = self._open_tensorboard(step)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("training", total=total, completed=step, status="")
        self._start = time.monotonic(), step
        self._last_plain = step

    @contextlib.contextmanager
    def opened(self) -> Iterator[RunLogger]:
        """Show the bar inside the block, and close all files at its end."""
        try:
            with self._progress, contextlib.closing(self._stream):
                yield self
        except BaseException:
            if self._board is not None:
                with contextlib.suppress(OSError):  # the first error counts
                    self._board.close()
            raise
        with self._report_full_disk():
            if self._board is not None:
                self._board.close()

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        self._progress.update(self._bar, completed=step)

    def log_train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of training metrics and show the losses."""
        self._write("train", step, metrics)
        losses = [name for name in metrics if name not in NOT_LOSSES]
        status = " ".join(f"{name} {metrics[name]:.3f}" for name in losses)
        status += f" | {metrics['pairs_per_second']:.0f} pairs/s"
        self._progress.update(self._bar, completed=step, status=status)
        if not self.console.is_terminal and step - self._last_plain >= self.total / PLAIN_LINES:
            self._last_plain = step
            self.console.print(f"step {step}/{self.total} {status} | {self._time_left(step)} left", highlight=False)

    def log_evaluation(self, step: int, data: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Write the line of an evaluation on `data` (`validation` or `test`)."""
        self._write("evaluate", step, {"data": data, **metrics})

    def event(self, step: int, message: str) -> None:
        """Write and show something that happened."""
        self._write("event", step, {"message": message})
        self.console.print(f"step {step}: {message}", highlight=False, markup=False)

    def status(self, description: str) -> None:
        """Show what the run does outside of training steps."""
        if self.console.is_terminal:
            self._progress.update(self._bar, description=description)
        else:
            self.console.print(f"{description} ...", highlight=False, markup=False)

    def _write(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        line = {"kind": kind, "step": step, "time": time.time(), **fields}
        with self._report_full_disk():
            append(self._stream, (json.dumps(_finite(line)) + "\n").encode())
            if self._board is not None and kind != "event":
                for name, value in _flatten(fields, kind):
                    self._board.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _report_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TercetError(
                f"cannot write into {self.folder}: {error.strerror or error}; free some space or repair the disk, and "
                f"go on with: tercet train --resume {self.folder}"
            ) from error

    def _time_left(self, step: int) -> str:
        since, first = self._start
        seconds = (time.monotonic() - since) / max(1, step - first) * (self.total - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def _open_tensorboard(self, step: int) -> Any:
        if importlib.util.find_spec("tensorboard") is None:
            hint = "TensorBoard is not installed (pip install 'tercet[track]'); metrics.jsonl has everything"
            self.console.print(hint, highlight=False, markup=False)
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=step or None)


@contextlib.contextmanager
def open_logger(folder: Path, total: int, step: int = 0, writes: bool = True) -> Iterator[NullLogger]:
    """The logger of a run.

    Args:
        folder: the run folder.
        total: steps of the run.
        step: steps already taken; later lines of metrics.jsonl, left by a run that was cut off, are dropped.
        writes: whether this rank writes and prints.
    """
    if not writes:
        yield NullLogger()
        return
    with RunLogger(folder, total, step).opened() as logger:
        yield logger


def append(stream: FileIO, data: bytes) -> None:
    """Append `data` to an unbuffered file, completely or not at all.

    Raises:
        OSError: the disk is full.
    """
    start = stream.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(data):
            written += stream.write(data[written:])
    except OSError:
        stream.truncate(start)
        raise


def _drop_later_lines(file: Path, step: int) -> None:
    """Keep the complete lines of steps up to `step`."""
    if not file.is_file():
        return
    kept: list[str] = []
    for line in file.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            print(f"{file}: dropped a line that was cut short", file=sys.stderr)
    write_atomic(file, "".join(f"{line}\n" for line in kept))


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return value


def _flatten(fields: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            pairs.append((f"{prefix}/{name}", float(value)))
    return pairs
