"""Jobs of the same call run together, each gets its own result or its own error, and none is lost at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from tercet.serve.batching import Batcher, BatcherClosedError


class Recorder:
    """Multiplies numbers, records the batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def multiply(self, numbers: list[int], factor: int) -> list[int]:
        self.gate.wait(10)
        self.batches.append((factor, numbers))
        if any(number < 0 for number in numbers):
            raise ValueError("a negative number")
        return [number * factor for number in numbers]

    def hold(self, batcher: Batcher) -> None:
        """Keep the thread busy until the gate opens, so that what follows gathers."""
        self.gate.clear()
        batcher.submit(self.multiply, (0,), (0,))
        time.sleep(0.05)


@pytest.fixture
def run() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.gate.set()


def test_jobs_of_a_call_run_together(run: Recorder) -> None:
    observed: list[tuple[str, int]] = []
    batcher = Batcher(8, 0.0, lambda call, jobs, seconds: observed.append((call, jobs)))
    run.hold(batcher)
    futures = [batcher.submit(run.multiply, (number,), (2 + number % 2,)) for number in range(10)]
    run.gate.set()
    assert [future.result(10) for future in futures] == [number * (2 + number % 2) for number in range(10)]
    assert run.batches[1:] == [(2, [0, 2, 4, 6, 8]), (3, [1, 3, 5, 7, 9])]
    batcher.close()
    assert observed == [("multiply", 1), ("multiply", 5), ("multiply", 5)]


def test_a_batch_is_limited_by_cost(run: Recorder) -> None:
    batcher = Batcher(4, 0.0)
    run.hold(batcher)
    futures = [batcher.submit(run.multiply, (number,), (2,), cost) for number, cost in enumerate([1, 2, 2, 9, 1])]
    run.gate.set()
    assert [future.result(10) for future in futures] == [0, 2, 4, 6, 8]
    assert [jobs for _, jobs in run.batches[1:]] == [[0, 1], [2], [3], [4]]
    batcher.close()


def test_a_full_batch_does_not_wait_for_the_window(run: Recorder) -> None:
    batcher = Batcher(3, 5.0)
    futures = [batcher.submit(run.multiply, (number,), (2,)) for number in range(3)]
    assert [future.result(4) for future in futures] == [0, 2, 4]
    assert run.batches == [(2, [0, 1, 2])]
    batcher.close()


def test_an_error_is_its_own_jobs_alone(run: Recorder) -> None:
    batcher = Batcher(8, 0.0)
    run.hold(batcher)
    good, broken, also_good = (batcher.submit(run.multiply, (number,), (2,)) for number in (1, -1, 3))
    run.gate.set()
    assert good.result(10) == 2 and also_good.result(10) == 6
    with pytest.raises(ValueError, match="negative"):
        broken.result(10)
    assert batcher.alive
    batcher.close()


def test_cancelled_jobs_do_not_run(run: Recorder) -> None:
    batcher = Batcher(8, 0.0)
    run.hold(batcher)
    first, second = (batcher.submit(run.multiply, (number,), (2,)) for number in (1, 2))
    assert first.cancel()
    run.gate.set()
    assert second.result(10) == 4
    with pytest.raises(CancelledError):
        first.result(10)
    assert run.batches[1:] == [(2, [2])]
    batcher.close()


def test_closing_finishes_what_waits(run: Recorder) -> None:
    batcher = Batcher(2, 60.0)
    run.hold(batcher)
    futures = [batcher.submit(run.multiply, (number,), (2,)) for number in range(5)]
    run.gate.set()
    batcher.close(10)
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]
    assert not batcher.alive
    with pytest.raises(BatcherClosedError):
        batcher.submit(run.multiply, (1,), (2,))
