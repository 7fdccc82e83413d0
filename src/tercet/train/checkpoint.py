"""Checkpoints: written while training continues, complete or absent, verified when read.

checkpoints/
    step-00000500/
        shard-00001-….safetensors   tensors of each rank, by torch.distributed.checkpoint
        checkpoint.json             step, fingerprint of the data, and a digest of every other file
    .step-00001000.partial/         being written, or left by a killed run; never read
    best.json                       which step validated best, and how well

The newest few and the best are kept.  Training waits only while `save` copies tensors to host memory; a thread writes
the copy.  A checkpoint can be read by any number of ranks, sharded or not.  Reading executes no code from a file:
tensors are in safetensors, everything else in JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tercet.distributed import Ranks, lost_rank
from tercet.errors import TercetError
from tercet.files import settle_folder, write_atomic

RECORD = "checkpoint.json"
BEST = "best.json"
FORMAT_VERSION = 3
WRITE_ERRORS = (OSError, RuntimeError, ValueError, CheckpointException)


@dataclass(frozen=True)
class Position:
    """The progress of a run.

    Attributes:
        step: optimizer steps taken.
        data: fingerprint of the training data that those steps saw.
        pairs_per_step: how many pairs each of them took, over all ranks.
    """

    step: int
    data: str
    pairs_per_step: int


@dataclass(frozen=True)
class Best:
    """The step that validated best so far.

    Attributes:
        step: optimizer steps taken then.
        metric: what was compared, such as `reranked.r_mean`.
        value: of the metric; higher is better.
    """

    step: int
    metric: str
    value: float


class Checkpoints:
    """The checkpoints of one run.  Every rank makes the same calls; rank 0 renames and removes folders.

    Attributes:
        folder: may not exist yet.
        keep: how many of the newest are kept.
        best: of the last `keep_best`, in this process or before; None before any validation.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """See the attributes."""
        self.folder = folder
        self.keep = keep
        self._ranks = Ranks()
        self._writing_ranks = self._ranks.new_group()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[None] | None = None
        self._newest: Position | None = None
        self.best = _read_best(folder)

    def save(self, task: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
        """Copy the state of a run and write it atomically while the run continues; delete older checkpoints.

        Waits for an earlier write that has not finished.

        Raises:
            TercetError: the earlier write failed.
        """
        self.wait()
        if position == self._newest:
            return
        stager = DefaultStager(StagingOptions(False, False, False, False))
        state = stager.stage(_state(task, optimizer))
        assert isinstance(state, dict)  # a future only where staging is asynchronous
        self._newest = position
        self._write = self._thread.submit(self._write_out, state, position)

    def keep_best(self, best: Best) -> None:
        """Keep the checkpoint of this step, which was saved before, until a better one comes."""
        self.wait()
        self.best = best
        if self._ranks.first:
            write_atomic(self.folder / BEST, json.dumps(asdict(best)) + "\n")

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            TercetError: the disk is full, or another rank died.
        """
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def load(self, task: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Position, list[str]]:
        """Load the newest intact checkpoint, and remove the partial ones of a killed run.

        Returns:
            The progress of the run, and a message for each newer checkpoint that was damaged.

        Raises:
            TercetError: there is no checkpoint, or none is intact.
        """
        if self._ranks.first:
            for partial in self.folder.glob(".step-*"):
                shutil.rmtree(partial, ignore_errors=True)
        failures: list[str] = []
        for path in self._ranks.broadcast(list_checkpoints(self.folder)):
            try:
                return self._load(path, task, optimizer), failures
            except TercetError as error:
                failures.append(str(error))
        if not failures:
            raise TercetError(f"no checkpoint in {self.folder}; start a new run")
        raise TercetError(f"no checkpoint in {self.folder} can be read: {'; '.join(failures)}")

    def _write_out(self, state: dict[str, Any], position: Position) -> None:
        """The thread's work; the ranks use a group of their own meanwhile."""
        ranks = self._writing_ranks
        path = self.folder / f"step-{position.step:08d}"
        partial = self.folder / f".{path.name}.partial"
        try:
            _on_rank0(ranks, lambda: _clear(partial))
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            with _one_process():
                save(state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.world == 1)
            names = ranks.broadcast(sorted(file.name for file in partial.iterdir()))
            own = {name: _digest(partial / name) for name in names[ranks.rank :: ranks.world]}
            digests = {name: digest for part in ranks.gather(own) for name, digest in part.items()}
            _on_rank0(ranks, lambda: self._settle(partial, path, position, digests))
        except WRITE_ERRORS as error:
            if ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            reason = _reason(error)
            if lost_rank(error):
                raise TercetError(
                    f"another of the {ranks.world} processes is gone, and {path} is not written; see its output, "
                    f"and resume the run ({reason})"
                ) from error
            raise TercetError(f"cannot write {path}: {reason}; free some space and resume the run") from error

    def _settle(self, partial: Path, path: Path, position: Position, digests: dict[str, str]) -> None:
        record = {"format_version": FORMAT_VERSION, **asdict(position), "files": dict(sorted(digests.items()))}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        settle_folder(partial, path)
        best = self.best.step if self.best else None
        for old in list_checkpoints(self.folder)[self.keep :]:
            if old.name != f"step-{best or 0:08d}":
                shutil.rmtree(old)

    def _load(self, path: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
        record = _read_record(path)
        names = sorted(record["files"])
        there = {file.name for file in path.iterdir()} - {RECORD}
        own = names[self._ranks.rank :: self._ranks.world]
        damaged = [name for name in own if name not in there or _digest(path / name) != record["files"][name]]
        damaged += sorted(there - set(names))  # the reader would read them too
        for name in self._ranks.gather(next(iter(damaged), None)):
            if name is not None:
                raise TercetError(f"checkpoint {path} is damaged: {name} is not what was written")
        state = _state(task, optimizer)
        try:
            with _one_process():
                load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=self._ranks.world == 1)
        except (Exception, CheckpointException) as error:  # malicious files can raise nearly anything
            if lost_rank(error):
                raise
            if any(isinstance(failure, KeyboardInterrupt) for failure, _ in getattr(error, "failures", {}).values()):
                raise KeyboardInterrupt from error
            raise TercetError(f"checkpoint {path} does not fit this run: {_reason(error)}") from error
        set_model_state_dict(task, state["task"])
        current = get_optimizer_state_dict(task, optimizer)
        set_optimizer_state_dict(task, optimizer, {**current, "state": state["optimizer"]})
        return Position(record["step"], record["data"], record["pairs_per_step"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if (path / RECORD).is_file()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TercetError(f"checkpoint {path} is damaged: {RECORD} cannot be read ({error})") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise TercetError(
            f"checkpoint {path} was written by another version of tercet; resume with that version, or start a new run"
        )
    counts = [record.get("step"), record.get("pairs_per_step")]
    sound = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    files = record.get("files")
    if not sound or not isinstance(record.get("data"), str) or not isinstance(files, dict):
        raise TercetError(f"checkpoint {path} is damaged: {RECORD} is incomplete")
    return record


def _read_best(folder: Path) -> Best | None:
    """What `best.json` says; None without one."""
    file = folder / BEST
    if not file.is_file():
        return None
    try:
        best = Best(**json.loads(file.read_text("utf-8")))
        if not (isinstance(best.step, int) and isinstance(best.metric, str) and isinstance(best.value, int | float)):
            raise ValueError("no step, metric and value")
        return best
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TercetError(
            f"{file} cannot be read ({error}); remove it, and the next validation counts as the best"
        ) from error


def _state(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors of a run; the settings of the optimizer follow from the config and the step."""
    return {"task": get_model_state_dict(task), "optimizer": get_optimizer_state_dict(task, optimizer)["state"]}


def _clear(folder: Path) -> None:
    """Make `folder`, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _on_rank0(ranks: Ranks, act: Callable[[], None]) -> None:
    """Run `act` on rank 0 while the other ranks wait; if it fails, all fail.

    Raises:
        OSError: what rank 0 raised.
    """
    failure = None
    if ranks.first:
        try:
            act()
        except OSError as error:
            failure = str(error)
    failure = ranks.broadcast(failure)
    if failure is not None:
        raise OSError(failure)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Ignore the warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """The first line of an error; of a failure on several ranks, of the first rank's."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
