"""Checkpoints: complete or absent, verified when read, the newest few kept.

checkpoints/
    step-00000500/
        __0_0.distcp ...   tensors, by torch.distributed.checkpoint
        .metadata          where each tensor lies
        checkpoint.json    step, what the data was, and a digest of every other file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tercet.errors import TercetError
from tercet.files import atomic_folder

RECORD = "checkpoint.json"
FORMAT_VERSION = 1
# How dcp names a failure depends on what is broken; all of these mean that the files do not fit this run.
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException)


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps taken.
        data: fingerprint of the training data that those steps saw.
    """

    step: int
    data: str


def save_checkpoint(
    folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer, position: Position, keep: int
) -> Path:
    """Write a checkpoint under `folder`, whole or not at all, then drop all but the `keep` newest.

    Raises:
        TercetError: the disk is full.
    """
    path = folder / f"step-{position.step:08d}"
    state = _state(task, optimizer)
    with atomic_folder(path) as partial:
        try:
            with _one_process():
                save(state, checkpoint_id=partial, no_dist=True)
        except LOAD_ERRORS as error:
            raise TercetError(f"cannot write {path}: {error}; free some space and resume the run") from error
        record = {"format_version": FORMAT_VERSION, "step": position.step, "data": position.data}
        record["files"] = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return path


def load_newest(folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Position, list[str]]:
    """Load the newest checkpoint that is whole.

    Returns:
        Where the run stands, and a message for each newer checkpoint that was damaged.

    Raises:
        TercetError: there is no checkpoint, or none is whole.
    """
    complaints: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return _load(path, task, optimizer), complaints
        except TercetError as error:
            complaints.append(str(error))
    if not complaints:
        raise TercetError(f"no checkpoint in {folder}; start the run anew")
    raise TercetError(f"no checkpoint in {folder} can be read: {'; '.join(complaints)}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if (path / RECORD).is_file()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _load(path: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    record = _read_record(path)
    for name, digest in record["files"].items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            raise TercetError(f"checkpoint {path} is damaged: {name} is not what was written")
    state = _state(task, optimizer)
    try:
        with _one_process():
            load(state, checkpoint_id=path, no_dist=True)
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TercetError(f"checkpoint {path} does not fit this run: {reason}") from error
    set_model_state_dict(task, state["task"])
    set_optimizer_state_dict(task, optimizer, state["optimizer"])
    return Position(step=record["step"], data=record["data"])


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TercetError(f"checkpoint {path} is damaged: {RECORD} cannot be read ({error})") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise TercetError(f"checkpoint {path} has a format that this version does not know; update tercet")
    return record


def _state(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"task": get_model_state_dict(task), "optimizer": get_optimizer_state_dict(task, optimizer)}


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Without the warning that there is no process group: one process is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(size):
            yield block
