"""One thread that owns the models, and the jobs that wait for it: jobs of the same call run together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Call = Callable[..., Any]  # takes lists, gives a result for each of their elements


class BatcherClosedError(Exception):
    """The server is stopping and takes no more jobs."""


@dataclass
class _Job:
    arguments: tuple[Any, ...]
    cost: int
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects jobs and runs those of the same call together, in one thread.

    A call takes lists: `call(firsts, seconds, *shared)` gives a result for each job `(first, second)`.  The call whose
    first job has waited longest comes next.  It runs when its jobs cost a whole batch, or when that first job has
    waited for the window; so a lone request waits no longer than the window, and while the model works on one batch
    the next gathers.
    """

    def __init__(
        self, batch: int = 64, window: float = 0.003, observe: Callable[[str, int, float], None] | None = None
    ) -> None:
        """Start the thread.

        Args:
            batch: cost of the jobs that run together; a job that costs more runs alone.
            window: seconds that the first job waits for others.
            observe: called with the call's name, the number of jobs and the seconds of each batch.
        """
        self._batch, self._window, self._observe = batch, window, observe
        self._waiting: dict[tuple[Call, tuple[Hashable, ...]], deque[_Job]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._closed

    def submit(
        self, call: Call, arguments: tuple[Any, ...], shared: tuple[Hashable, ...] = (), cost: int = 1
    ) -> Future[Any]:
        """Add a job.  A future that is cancelled before its turn costs nothing.

        Args:
            call: takes a list of each argument, and `shared`.
            arguments: of this job.
            shared: arguments that must be equal for jobs to run together.
            cost: of the job, in units of `batch`.

        Raises:
            BatcherClosedError: after `close`.
        """
        job = _Job(arguments, cost)
        with self._changed:
            if self._closed:
                raise BatcherClosedError
            self._waiting.setdefault((call, shared), deque()).append(job)
            self._changed.notify()
        return job.future

    def close(self, seconds: float | None = None) -> None:
        """Take no more jobs, finish those that wait, and end the thread; give up waiting for it after `seconds`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                call, shared, jobs = self._take()
            self._run(call, shared, [job for job in jobs if job.future.set_running_or_notify_cancel()])

    def _take(self) -> tuple[Call, tuple[Hashable, ...], list[_Job]]:
        """Wait until the next batch is full or due, and take it."""
        key = min(self._waiting, key=lambda key: self._waiting[key][0].arrived)
        line = self._waiting[key]
        due = line[0].arrived + self._window
        while sum(job.cost for job in line) < self._batch and not self._closed:
            left = due - time.monotonic()
            if left <= 0:
                break
            self._changed.wait(left)
        jobs = [line.popleft()]
        while line and sum(job.cost for job in jobs) + line[0].cost <= self._batch:
            jobs.append(line.popleft())
        if not line:
            del self._waiting[key]
        return *key, jobs

    def _run(self, call: Call, shared: tuple[Hashable, ...], jobs: list[_Job]) -> None:
        if not jobs:
            return
        started = time.monotonic()
        try:
            columns = [list(column) for column in zip(*(job.arguments for job in jobs), strict=True)]
            results = list(call(*columns, *shared))
        except Exception as error:  # a job's error goes to whoever waits for it; the thread must live on
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            # One job's error is not the others': each runs alone.
            for job in jobs:
                self._run(call, shared, [job])
            return
        if self._observe is not None:
            self._observe(getattr(call, "__name__", "call"), len(jobs), time.monotonic() - started)
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
