"""Training runs of a tiny model in processes of their own, to be killed, starved and interrupted.

They start from a server that has imported Tercet already, so that a run begins in a moment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tiny_run import TINY, flag

PATIENCE = 600  # seconds for what takes a few where nothing else runs

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tercet.train.loop", "tercet.commands.training", "tercet.report.page"])


_started: list[Run] = []


def end_all() -> None:
    """Kill what a test has left running."""
    while _started:
        _started.pop().kill()


class Run:
    """A process that trains, as `tercet train` does.

    Attributes:
        folder: the run folder.
        process: the process; its workers are its children.
    """

    def __init__(self, folder: Path, *, resume: bool = False, tensorboard: bool = False, **keys: Any) -> None:
        """Start it.

        Args:
            folder: the run folder.
            resume: go on in it.
            tensorboard: whether TensorBoard's files are written too.
            keys: of the config, with two underscores for a dot.
        """
        self.folder = folder
        # Not beside the run, which may lie on a disk that is full.
        self.said = folder.parent.parent / f"{folder.parent.name}-{folder.name}.{time.monotonic_ns()}.said"
        settings = {name.replace("__", "."): value for name, value in keys.items()}
        if not resume:
            settings = {**TINY, "output": str(folder), **settings}
        arguments = (settings, folder if resume else None, self.said, tensorboard)
        self.process: BaseProcess = _context.Process(target=_train, args=arguments)
        _started.append(self)
        self.process.start()

    def until(self, happened: Callable[[], bool], pause: float = 0.01) -> Run:
        """Wait until something has happened; the run must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.is_alive() or happened(), f"the run ended before: {self.messages}"
            assert time.monotonic() < deadline, f"the run did not get there: {self.messages}"
            time.sleep(pause)
        return self

    def until_step(self, count: int) -> Run:
        """Wait until metrics.jsonl has `count` training lines."""
        return self.until(lambda: self.steps() >= count, pause=0.002)

    def steps(self) -> int:
        """Training lines in metrics.jsonl."""
        return len(lines(self.folder))

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.join(PATIENCE)

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """A signal, to the process or to its whole group."""
        assert self.process.pid is not None
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self) -> int:
        """Wait for it, and return its exit status."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"the run did not end: {self.messages}"
        return self.process.exitcode

    def finish(self) -> None:
        """Wait for it to end well."""
        assert self.end() == 0, self.messages

    def workers(self) -> list[psutil.Process]:
        """Its children."""
        return psutil.Process(self.process.pid).children()

    @property
    def messages(self) -> str:
        """What it printed."""
        return self.said.read_text("utf-8", "replace") if self.said.is_file() else ""


def _train(settings: dict[str, Any], resume: Path | None, said: Path, tensorboard: bool) -> None:
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as where a run is started by hand
    with said.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    if not tensorboard:
        # Its files are written by a thread of its own, which has nothing to do with what these tests are about.
        from tercet.train.log import RunLogger

        RunLogger._open_tensorboard = lambda self, step: None  # type: ignore[method-assign]
    from tercet.cli import main

    flags = [part for name, value in settings.items() for part in flag(name, value)]
    sys.exit(main(["train", *(["--resume", str(resume)] if resume else ["demo"]), *flags]))


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl of one kind."""
    file = folder / "metrics.jsonl"
    text = file.read_text("utf-8") if file.is_file() else ""
    read = [json.loads(line) for line in text.split("\n")[:-1]]
    return [line for line in read if line["kind"] == kind]


def events(folder: Path) -> str:
    """All messages of a run."""
    return "\n".join(line["message"] for line in lines(folder, "event"))


def losses(folder: Path) -> list[tuple[float, ...]]:
    """What every step of a run gave, to the last bit."""
    names = ("step", "loss", "cma", "imc", "lmi", "itm", "mlm", "lr", "temperature", "grad_norm", "alpha")
    return [tuple(line[name] for name in names) for line in lines(folder)]


def assert_equal(first: Path, second: Path) -> int:
    """Two finished runs gave the same at every step and end in the same parameters, bit for bit; how many steps."""
    assert losses(first) == losses(second)
    expected, actual = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    return len(losses(first))


def rubbish(folder: Path) -> list[Path]:
    """Files that are half-written or left over."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]
