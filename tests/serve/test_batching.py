"""Jobs of a kind run together, each gets its own result or its own fault, and none is lost at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from tercet.serve.batching import Batcher, BatcherClosedError


class Recorder:
    """Doubles numbers; can be held up, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[Hashable, list[Any]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, kind: Hashable, jobs: list[Any]) -> list[Any]:
        self.gate.wait(10)
        self.batches.append((kind, jobs))
        if any(job == "broken" for job in jobs):
            raise ValueError("a broken job")
        return [job * 2 for job in jobs]


def hold(batcher: Batcher, run: Recorder) -> None:
    """Keep the thread busy until the gate opens, so that what follows gathers."""
    run.gate.clear()
    batcher.submit("hold", 0)
    time.sleep(0.05)


def test_jobs_of_a_kind_run_together() -> None:
    run = Recorder()
    batcher = Batcher(run, batch=8, window=0.0)
    hold(batcher, run)
    futures = [batcher.submit("a" if number % 2 else "b", number) for number in range(10)]
    run.gate.set()
    assert [future.result(10) for future in futures] == [2 * number for number in range(10)]
    assert run.batches[1:] == [("b", [0, 2, 4, 6, 8]), ("a", [1, 3, 5, 7, 9])]
    batcher.close()


def test_a_batch_is_bounded_by_cost() -> None:
    run = Recorder()
    batcher = Batcher(run, batch=4, window=0.0)
    hold(batcher, run)
    futures = [batcher.submit("a", number, cost) for number, cost in enumerate([1, 2, 2, 9, 1])]
    run.gate.set()
    assert [future.result(10) for future in futures] == [0, 2, 4, 6, 8]
    assert [jobs for _, jobs in run.batches[1:]] == [[0, 1], [2], [3], [4]]
    batcher.close()


def test_the_first_waits_for_others_within_the_window() -> None:
    run = Recorder()
    batcher = Batcher(run, batch=3, window=5.0)
    futures = [batcher.submit("a", number) for number in range(3)]
    assert [future.result(4) for future in futures] == [0, 2, 4]  # a whole batch need not wait
    assert run.batches == [("a", [0, 1, 2])]
    batcher.close()


def test_a_fault_is_its_own_jobs_alone() -> None:
    run = Recorder()
    batcher = Batcher(run, window=0.0)
    hold(batcher, run)
    good, broken, also_good = (batcher.submit("a", job) for job in (1, "broken", 3))
    run.gate.set()
    assert good.result(10) == 2 and also_good.result(10) == 6
    with pytest.raises(ValueError, match="a broken job"):
        broken.result(10)
    assert batcher.alive
    batcher.close()


def test_cancelled_jobs_are_not_run() -> None:
    run = Recorder()
    batcher = Batcher(run, window=0.0)
    hold(batcher, run)
    first, second = batcher.submit("a", 1), batcher.submit("a", 2)
    assert first.cancel()
    run.gate.set()
    assert second.result(10) == 4
    with pytest.raises(CancelledError):
        first.result(10)
    assert run.batches[1:] == [("a", [2])]
    batcher.close()


def test_closing_finishes_what_waits() -> None:
    run = Recorder()
    batcher = Batcher(run, batch=2, window=60.0)
    hold(batcher, run)
    futures = [batcher.submit("a", number) for number in range(5)]
    run.gate.set()
    batcher.close(10)
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]
    assert not batcher.alive
    with pytest.raises(BatcherClosedError):
        batcher.submit("a", 1)
