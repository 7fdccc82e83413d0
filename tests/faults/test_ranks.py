"""kill -9 of one of two ranks under torchrun: all start anew, and the run goes on from its newest checkpoint."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from faults.runs import PATIENCE, events, losses, rubbish
from rank_runs import SMALL, run_ranks, train_run
from tercet.train.checkpoint import list_checkpoints

KEYS: dict[str, Any] = {**SMALL, "train.epochs": 6}
STEPS = 18


@contextmanager
def torchrun(folder: Path, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command of docs/distributed.md on two ranks; nothing of it is left running."""
    flags = [part for name, value in KEYS.items() if value != [] for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", "-m", "tercet", "train", "demo", *flags, "--data.validation", "--data.test"]
    with said.open("wb") as stream:
        command += ["--output", str(folder), "--resume-if-there"]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        left = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
        for one in left:
            one.kill()
        process.wait()


def rank_of(process: psutil.Process) -> str | None:
    """Which rank a process is."""
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def test_one_of_two_ranks_is_killed(tmp_path: Path) -> None:
    folder, said, whole = tmp_path / "run", tmp_path / "said", tmp_path / "whole"
    with torchrun(folder, said) as launcher:
        deadline = time.monotonic() + PATIENCE
        while not list_checkpoints(folder / "checkpoints"):
            assert launcher.poll() is None and time.monotonic() < deadline, said.read_text("utf-8", "replace")
            time.sleep(0.005)
        (victim,) = [child for child in psutil.Process(launcher.pid).children() if rank_of(child) == "1"]
        victim.kill()
        assert launcher.wait(PATIENCE) == 0, said.read_text("utf-8", "replace")
    assert run_ranks(2, train_run, "demo", {**KEYS, "output": str(whole)}) == [str(whole)] * 2
    resumed = [line for line in events(folder).splitlines() if line.startswith("resumed at step")]
    assert len(resumed) == 1 and int(resumed[0].split()[-1]) in range(3, STEPS, 3)
    assert [step for step, *_ in losses(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(whole)
    assert rubbish(folder) == []
    assert (folder / "report.html").is_file()
