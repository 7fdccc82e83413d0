"""kill -9 of one of two ranks, or of one of two machines, under torchrun: the run resumes from a checkpoint."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from faults.runs import Launch, leftovers
from rank_runs import SMALL, run_ranks, train_run
from tiny_run import events, losses

KEYS: dict[str, Any] = {**SMALL, "train.epochs": 6}
STEPS = 18


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks without a fault."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    assert run_ranks(2, train_run, "demo", {**KEYS, "output": str(folder)}) == [str(folder)] * 2
    return folder


def assert_resumed_once_and_equal(folder: Path, whole: Path) -> None:
    """The run resumed once from a checkpoint; it finished, and every number of every step is that of `whole`."""
    (resumed,) = [line for line in events(folder).splitlines() if line.startswith("resumed at step")]
    assert int(resumed.split()[-1]) in range(3, STEPS, 3)
    assert [step for step, *_ in losses(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(whole)
    assert leftovers(folder) == []
    assert (folder / "report.html").is_file()


def test_one_of_two_ranks_is_killed(tmp_path: Path, whole: Path) -> None:
    run = Launch(tmp_path / "run", tmp_path / "output", KEYS, "--standalone", "--nproc-per-node", "2")
    run.until(lambda: bool(run.checkpoints()))
    run.ranks()["1"].kill()
    run.finish()
    assert_resumed_once_and_equal(run.folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["second", "first"])
def test_one_of_two_machines_is_killed(tmp_path: Path, whole: Path, lost: str) -> None:
    """Two groups of one rank stand for two machines.

    The second returns and finds the first; with the first the rendezvous is gone, and both start again.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    where += ["--rdzv-endpoint", f"{address[0]}:{address[1]}", "--local-addr", "127.0.0.1"]

    def launch(name: str) -> Launch:
        return Launch(tmp_path / "run", tmp_path / name, KEYS, *where)

    def listens() -> bool:
        """Whether the rendezvous is up, so that the machine that starts next is the second."""
        with socket.socket() as probe:
            return probe.connect_ex(address) == 0

    first = launch("first")
    first.until(listens)
    second = launch("second")
    first.until(lambda: bool(first.checkpoints()))
    assert len(first.ranks()) == len(second.ranks()) == 1
    victim, other = (second, first) if lost == "second" else (first, second)
    began = time.monotonic()
    victim.kill()
    assert victim.end() == -signal.SIGKILL
    if lost == "first":
        assert other.end() != 0
        other = launch("other again")
        other.until(listens)
    again = launch("again")
    assert (other.end(), again.end()) == (0, 0), other.messages + again.messages
    print(f"the {lost} machine was killed; both finished {time.monotonic() - began:.0f} seconds later")
    assert_resumed_once_and_equal(first.folder, whole)
