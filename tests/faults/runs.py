"""Training runs of a tiny model in their own processes, to be killed, starved and interrupted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from tercet.train.checkpoint import list_checkpoints
from tiny_run import TINY, dotted, flags, lines

PATIENCE = 600  # seconds for what takes a few on a quiet machine

# The server has imported Tercet already, so a run starts in a moment.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tercet.train.loop", "tercet.commands.training", "tercet.report.page"])

_started: list[Process] = []


def end_all() -> None:
    """Kill what a test has left running."""
    while _started:
        _started.pop().kill()


class Process:
    """A process that trains in the run folder `folder` and prints to the file `output`."""

    folder: Path
    output: Path
    pid: int | None

    def exit_status(self) -> int | None:
        """None while it runs."""
        raise NotImplementedError

    def until(self, happened: Callable[[], bool], pause: float = 0.005) -> None:
        """Wait until `happened`; fails if the process ends first."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.exit_status() is None or happened(), f"the run ended before: {self.messages}"
            assert time.monotonic() < deadline, f"the run did not get there: {self.messages}"
            time.sleep(pause)

    def end(self) -> int:
        """Wait for it, and return its exit status."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.exit_status()) is None:
            assert time.monotonic() < deadline, f"the run did not end: {self.messages}"
            time.sleep(0.005)
        return status

    def finish(self) -> None:
        """Wait for it to end with success."""
        assert self.end() == 0, self.messages

    def children(self) -> list[psutil.Process]:
        """The data workers of a trainer, or the ranks of torchrun."""
        return psutil.Process(self.pid).children()

    def kill(self) -> None:
        """kill -9."""
        raise NotImplementedError

    @property
    def messages(self) -> str:
        """What it printed."""
        return self.output.read_text("utf-8", "replace") if self.output.is_file() else ""

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return list_checkpoints(self.folder / "checkpoints")


class Run(Process):
    """`tercet train`, forked from the server."""

    def __init__(self, folder: Path, *, resume: bool = False, **keys: Any) -> None:
        """Start or resume it; in `keys`, of the config, two underscores stand for a dot."""
        self.folder = folder
        # Not next to the run, whose disk may be full.
        self.output = folder.parent.parent / f"{folder.parent.name}-{folder.name}.{time.monotonic_ns()}.out"
        words = ["--resume", str(folder)] if resume else ["demo", *flags({**TINY, "output": str(folder)})]
        self.process: BaseProcess = _context.Process(target=_train, args=([*words, *flags(dotted(keys))], self.output))
        _started.append(self)
        self.process.start()
        self.pid = self.process.pid

    def exit_status(self) -> int | None:
        return self.process.exitcode

    def until_step(self, count: int) -> Run:
        """Wait until metrics.jsonl has `count` training lines."""
        self.until(lambda: self.steps() >= count, pause=0.002)
        return self

    def steps(self) -> int:
        """Training lines in metrics.jsonl."""
        return len(lines(self.folder))

    def kill(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE)

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """A signal, to the process or to its whole group."""
        assert self.pid is not None
        (os.killpg if group else os.kill)(self.pid, number)


def _train(words: list[str], output: Path) -> None:
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # for the data workers, as in a run that a user starts
    with output.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    from tercet.cli import main
    from tercet.train.log import RunLogger

    # TensorBoard writes from its own thread, which these tests are not about.
    RunLogger._open_tensorboard = lambda self, step: None  # type: ignore[method-assign]
    sys.exit(main(["train", *words]))


class Launch(Process):
    """torchrun and the ranks that it starts, as docs/distributed.md describes it."""

    def __init__(self, folder: Path, output: Path, keys: dict[str, Any], *where: str) -> None:
        """Start it with torchrun's own flags `where`."""
        # torchrun gives each of several processes one thread, and a single one all; other sums round differently.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if "c10d" in where:
            # Without it, torchrun (2.13) lets a machine that returns wait for an address that nobody writes.
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = [sys.executable, "-m", "torch.distributed.run", *where, "--max-restarts", "3"]
        command += ["-m", "tercet", "train", "demo", *flags(keys), "--output", str(folder), "--resume-if-there"]
        self.folder, self.output = folder, output
        with output.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        self.pid = self.process.pid
        _started.append(self)

    def exit_status(self) -> int | None:
        return self.process.poll()

    def ranks(self) -> dict[str, psutil.Process]:
        """The processes that it runs now, by rank."""
        found = {}
        for child in self.children():
            try:
                found[child.environ().get("RANK", "")] = child
            except psutil.Error:  # it has just ended
                continue
        return found

    def kill(self) -> None:
        """kill -9 of torchrun and its ranks, as simultaneously as the system can."""
        if self.process.poll() is None:
            torchrun = psutil.Process(self.process.pid)
            for one in [torchrun, *torchrun.children(recursive=True)]:
                one.kill()
        self.process.wait(PATIENCE)


def leftovers(folder: Path) -> list[Path]:
    """Files that are half-written or left over."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def assert_gone(processes: list[psutil.Process], seconds: float = 5) -> None:
    """The processes end by themselves."""
    _, alive = psutil.wait_procs(processes, seconds)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
