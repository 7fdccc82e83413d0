"""Worker processes: results in order, deaths that are reported, arrays that are shared."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tercet.data.workers import WorkerPool, _Calls
from tercet.errors import TercetError


def slow_square(number: int) -> torch.Tensor:
    time.sleep(0.02 * (number % 2))
    return torch.tensor(number * number)


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise KeyError("a mistake of ours")
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(workers: int) -> None:
    pool = WorkerPool(slow_square, workers)
    assert [int(value) for value in pool.run(range(9))] == [number**2 for number in range(9)]
    assert [int(value) for value in pool.run([5, 1])] == [25, 1]
    assert list(pool.run([])) == []
    pool.close()


def test_a_dead_worker_is_an_error_and_not_a_hang() -> None:
    pool = WorkerPool(die_at_three, 1)
    got: list[int] = []
    start = time.monotonic()
    with pytest.raises(TercetError, match=r"a data worker process died .*set data\.workers lower"):
        for number in pool.run(range(8)):
            got.append(number)
            time.sleep(0.5)  # the worker dies while the reader is busy
    assert got == [0, 1, 2]
    assert time.monotonic() - start < 200  # three deaths, each found within seconds on a quiet machine
    assert list(pool.run([0, 1])) == [0, 1]  # by a new process
    pool.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_of_ours_keeps_its_kind(workers: int) -> None:
    pool = WorkerPool(fail_at_three, workers)
    with pytest.raises(KeyError, match="a mistake of ours"):
        list(pool.run(range(8)))
    pool.close()


def test_workers_outlast_ctrl_c() -> None:
    pool = WorkerPool(interrupt_self, 1)
    assert list(pool.run(range(3))) == [0, 1, 2]
    pool.close()


def interrupt_self(number: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


@dataclass
class Lookup:
    """A function with arrays of any alignment."""

    letters: np.ndarray
    numbers: np.ndarray
    empty: np.ndarray

    def __call__(self, index: int) -> tuple[int, int]:
        return int(self.letters[index]), int(self.numbers[index])


def test_a_started_worker_maps_large_arrays() -> None:
    lookup = Lookup(np.arange(100_001).astype(np.uint8), np.arange(100_001) * 7, np.zeros(0))
    calls = _Calls(lookup)
    sent = pickle.dumps(calls)
    assert len(sent) < 2000
    received = pickle.loads(sent)
    assert received[99_999] == calls[99_999]
    assert received._make.numbers.flags.aligned
    assert not received._make.numbers.flags.owndata
    assert received._make.empty.shape == (0,)


def test_no_threads_are_left_behind() -> None:
    before = threading.active_count()
    pool = WorkerPool(slow_square, 1)
    list(pool.run(range(2)))
    pool.close()
    # A closed pool's threads end on their own, a moment later on a busy machine.
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
