"""One thread that owns the model, and the jobs that wait for it: those of a kind go through the model together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


class BatcherClosedError(Exception):
    """The server is stopping and takes no more jobs."""


@dataclass
class _Waiting:
    job: Any
    cost: int
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects jobs and runs those of a kind together, in one thread.

    The kind whose first job waits longest comes next.  It goes when its jobs cost a whole batch, or when that first
    job has waited for the window; so a lone request waits no longer than the window, and while the model works on
    one batch the next gathers.  Whoever submits bounds how many wait.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Any]], Sequence[Any]],
        batch: int = 64,
        window: float = 0.003,
        observe: Callable[[Hashable, int, float], None] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            run: takes a kind and its jobs, gives their results in order; called in the thread alone.
            batch: cost of the jobs that run together; a job that costs more runs alone.
            window: seconds that the first job waits for others.
            observe: told the kind, the number of jobs and the seconds of each batch.
        """
        self._run, self._batch, self._window, self._observe = run, batch, window, observe
        self._waiting: dict[Hashable, deque[_Waiting]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken and worked at."""
        return self._thread.is_alive() and not self._closed

    def submit(self, kind: Hashable, job: Any, cost: int = 1) -> Future[Any]:
        """Add a job.  A future that is cancelled before its turn costs nothing.

        Raises:
            BatcherClosedError: after `close`.
        """
        entry = _Waiting(job, cost)
        with self._changed:
            if self._closed:
                raise BatcherClosedError
            self._waiting.setdefault(kind, deque()).append(entry)
            self._changed.notify()
        return entry.future

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
                kind, entries = self._take()
            self._finish(kind, [entry for entry in entries if entry.future.set_running_or_notify_cancel()])

    def _take(self) -> tuple[Hashable, list[_Waiting]]:
        """Wait until the next batch is whole or due, and take it."""
        kind = min(self._waiting, key=lambda kind: self._waiting[kind][0].arrived)
        line = self._waiting[kind]
        due = line[0].arrived + self._window
        while sum(entry.cost for entry in line) < self._batch and not self._closed:
            left = due - time.monotonic()
            if left <= 0:
                break
            self._changed.wait(left)
        taken, cost = [line.popleft()], 0
        cost += taken[0].cost
        while line and cost + line[0].cost <= self._batch:
            cost += line[0].cost
            taken.append(line.popleft())
        if not line:
            del self._waiting[kind]
        return kind, taken

    def _finish(self, kind: Hashable, entries: list[_Waiting]) -> None:
        if not entries:
            return
        started = time.monotonic()
        try:
            results = self._run(kind, [entry.job for entry in entries])
        except Exception as error:  # a job's fault goes to whoever waits for it; the thread must live on
            if len(entries) == 1:
                entries[0].future.set_exception(error)
                return
            # One job's fault is not the others': each shows for itself.
            for entry in entries:
                self._finish(kind, [entry])
            return
        if self._observe is not None:
            self._observe(kind, len(entries), time.monotonic() - started)
        for entry, result in zip(entries, results, strict=True):
            entry.future.set_result(result)
