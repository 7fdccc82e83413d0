"""Jobs of the same call run together, each gets its own result or its own error, and none is lost at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future

import pytest

from tercet.serve.batching import Batcher, BatcherClosedError


class Held(Batcher):
    """Multiplies numbers and records the batches; jobs gather until `release`, which gives their results."""

    def __init__(self, limit: int, window: float = 0.0) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.observed: list[tuple[str, int]] = []
        self.gate = threading.Event()
        super().__init__(limit, window, lambda call, jobs, seconds: self.observed.append((call, jobs)))
        self.double(0)
        time.sleep(0.05)

    def multiply(self, numbers: list[int], factor: int) -> list[int]:
        self.gate.wait(10)
        self.batches.append((factor, numbers))
        if any(number < 0 for number in numbers):
            raise ValueError("a negative number")
        return [number * factor for number in numbers]

    def double(self, number: int, cost: int = 1) -> Future[int]:
        return self.submit(self.multiply, (number,), (2,), cost)

    def release(self, futures: Iterable[Future[int]]) -> list[int]:
        self.gate.set()
        return [future.result(10) for future in futures]


def test_jobs_of_a_call_run_together() -> None:
    held = Held(8)
    futures = [held.submit(held.multiply, (number,), (2 + number % 2,)) for number in range(10)]
    assert held.release(futures) == [number * (2 + number % 2) for number in range(10)]
    assert held.batches[1:] == [(2, [0, 2, 4, 6, 8]), (3, [1, 3, 5, 7, 9])]
    held.close()
    assert held.observed == [("multiply", 1), ("multiply", 5), ("multiply", 5)]


def test_a_batch_is_limited_by_cost() -> None:
    held = Held(4)
    assert held.release([held.double(*job) for job in enumerate([1, 2, 2, 9, 1])]) == [0, 2, 4, 6, 8]
    assert [jobs for _, jobs in held.batches[1:]] == [[0, 1], [2], [3], [4]]
    held.close()


def test_an_error_is_its_own_jobs_alone_and_cancelled_jobs_do_not_run() -> None:
    held = Held(8)
    good, broken, cancelled, also_good = (held.double(number) for number in (1, -1, 2, 3))
    assert cancelled.cancel()
    assert held.release([good, also_good]) == [2, 6]
    with pytest.raises(ValueError, match="negative"):
        broken.result(10)
    with pytest.raises(CancelledError):
        cancelled.result(10)
    assert held.alive and not any(2 in jobs for _, jobs in held.batches)
    held.close()


def test_a_full_batch_does_not_wait_for_the_window_and_closing_finishes_what_waits() -> None:
    held = Held(2, 60.0)
    futures = [held.double(number) for number in (1, 2, 3, 4)]
    assert held.release(futures[:3]) == [2, 4, 6]
    held.close(10)
    assert futures[3].result(0) == 8 and not held.alive
    assert held.batches == [(2, [0, 1]), (2, [2, 3]), (2, [4])]
    with pytest.raises(BatcherClosedError):
        held.double(1)
