"""kill -9 of one of two ranks, or of one of two machines, under torchrun: the run goes on from a checkpoint."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from faults.launches import launches
from faults.runs import events, losses, rubbish
from rank_runs import SMALL, run_ranks, train_run
from tercet.train.checkpoint import list_checkpoints

KEYS: dict[str, Any] = {**SMALL, "train.epochs": 6}
STEPS = 18


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks that nothing hit."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    assert run_ranks(2, train_run, "demo", {**KEYS, "output": str(folder)}) == [str(folder)] * 2
    return folder


def resumed_at(folder: Path) -> list[int]:
    """The steps that a run was gone on with at."""
    said = events(folder).splitlines()
    return [int(line.split()[-1]) for line in said if line.startswith("resumed at step")]


def assert_as_unbroken(folder: Path, whole: Path) -> None:
    """Every number of every step is that of the run that nothing hit, and it came to its end."""
    assert [step for step, *_ in losses(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(whole)
    assert rubbish(folder) == []
    assert (folder / "report.html").is_file()


def test_one_of_two_ranks_is_killed(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    with launches() as launch:
        run = launch(folder, tmp_path / "said", KEYS, "--standalone", "--nproc-per-node", "2")
        run.until(lambda: bool(list_checkpoints(folder / "checkpoints")))
        run.ranks()["1"].kill()
        assert run.end() == 0, run.messages
    (step,) = resumed_at(folder)
    assert step in range(3, STEPS, 3)
    assert_as_unbroken(folder, whole)


def two_machines() -> list[str]:
    """torchrun's flags on each of two machines, for which two groups of one rank on this one stand."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    return [*flags, "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]


def listens(flags: list[str]) -> bool:
    """Whether the meeting point is there, so that the machine that is started next is the second."""
    address, port = flags[flags.index("--rdzv-endpoint") + 1].split(":")
    with socket.socket() as probe:
        return probe.connect_ex((address, int(port))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["second", "first"])
def test_one_of_two_machines_is_killed(tmp_path: Path, whole: Path, lost: str) -> None:
    """The second comes back and finds the first; with the first the meeting point is gone, and both start again."""
    folder, flags = tmp_path / "run", two_machines()
    with launches() as launch:
        first = launch(folder, tmp_path / "first", KEYS, *flags)
        first.until(lambda: listens(flags))
        second = launch(folder, tmp_path / "second", KEYS, *flags)
        first.until(lambda: bool(list_checkpoints(folder / "checkpoints")))
        assert len(first.ranks()) == len(second.ranks()) == 1
        victim, other = (second, first) if lost == "second" else (first, second)
        began = time.monotonic()
        victim.kill()
        assert victim.process.returncode == -signal.SIGKILL
        if lost == "first":
            assert other.end() != 0
            other = launch(folder, tmp_path / "other again", KEYS, *flags)
            other.until(lambda: listens(flags))
        again = launch(folder, tmp_path / "again", KEYS, *flags)
        assert (other.end(), again.end()) == (0, 0), other.messages + again.messages
        print(f"the {lost} machine was killed; both came to the end {time.monotonic() - began:.0f} seconds later")
    (step,) = resumed_at(folder)
    assert step in range(3, STEPS, 3)
    assert_as_unbroken(folder, whole)
