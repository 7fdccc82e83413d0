"""Runs of several ranks that torchrun starts, as docs/distributed.md tells, in processes that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from faults.runs import PATIENCE
from tiny_run import flag


class Launch:
    """A torchrun and the ranks that it has started.

    Attributes:
        process: torchrun.
        said: where it and its ranks write what they print.
    """

    def __init__(self, folder: Path, said: Path, keys: dict[str, Any], *where: str) -> None:
        """Start it.

        Args:
            folder: the run folder.
            said: a new file.
            keys: of the config.
            where: torchrun's own flags.
        """
        # torchrun gives each of several processes one thread, and a single one all; other sums round differently.
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
        if "c10d" in where:
            # Else torchrun (2.13) leaves a machine that comes back waiting for an address that nobody writes.
            surroundings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        flags = [part for name, value in keys.items() for part in flag(name, value)]
        command = [sys.executable, "-m", "torch.distributed.run", *where, "--max-restarts", "3"]
        command += ["-m", "tercet", "train", "demo", *flags]
        command += ["--output", str(folder), "--resume-if-there"]
        self.said = said
        with said.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=surroundings)

    def ranks(self) -> dict[str, psutil.Process]:
        """The processes that it runs now, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                found[child.environ().get("RANK", "")] = child
            except psutil.Error:  # it has just ended
                continue
        return found

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened; it must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.messages
            time.sleep(0.005)

    def kill(self) -> None:
        """kill -9 of torchrun and of its ranks, all at once as far as the system can."""
        if self.process.poll() is None:
            for one in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
                one.kill()
        self.process.wait(PATIENCE)

    def end(self) -> int:
        """Wait for it, and return its exit status."""
        return self.process.wait(PATIENCE)

    @property
    def messages(self) -> str:
        """What was printed."""
        return self.said.read_text("utf-8", "replace")


@contextmanager
def launches() -> Iterator[Callable[..., Launch]]:
    """Gives `Launch`; nothing of what it has started is left running."""
    started: list[Launch] = []

    def launch(*arguments: Any) -> Launch:
        started.append(Launch(*arguments))
        return started[-1]

    try:
        yield launch
    finally:
        for one in started:
            one.kill()
