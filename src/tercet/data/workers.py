"""Processes that make batches ahead of the step that reads them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tercet.errors import TercetError

PREFETCH = 2
DEATHS = 3  # in a row without a batch between them, after which a run gives up
_PR_SET_PDEATHSIG = 1  # Linux's prctl: the signal to get when the parent dies
ALIGNMENT = 64  # numpy copies a whole array that does not begin at a multiple of its items' size

Made = TypeVar("Made")


class WorkerPool(Generic[Made]):
    """Calls `make` on each of a list of tasks, in `workers` processes that stay alive between lists.

    Results come in the order of the tasks.  With 0 workers the caller's own process does the work.  When a process
    dies, new ones go on with the task that was due, which `make` turns into the same batch.

    Args:
        make: turns one task into a batch; it is copied to every worker, and must give the same whichever runs it.
        workers: number of processes.
    """

    def __init__(self, make: Callable[[Any], Made], workers: int) -> None:
        self._tasks: list[Any] = []
        self._workers = workers
        self._loader: DataLoader[Made] | None = None
        self._make = make

    def run(self, tasks: Sequence[Any]) -> Iterator[Made]:
        """The results of `tasks`, in their order.

        Raises:
            TercetError: worker processes died `DEATHS` times over one task.
        """
        done = deaths = 0
        while done < len(tasks):
            try:
                for made in self._run(tasks[done:]):
                    yield made
                    done, deaths = done + 1, 0
            except _WorkerDiedError as error:
                deaths += 1
                reason = " ".join(str(error).split())
                if deaths == DEATHS:
                    raise TercetError(
                        f"a data worker process died (out of memory, or /dev/shm too small?), {deaths} times over one "
                        f"batch; set data.workers lower, or to 0 to see why: {reason}"
                    ) from error
                print(f"a data worker process died and is started again: {reason}", file=sys.stderr)

    def _run(self, tasks: Sequence[Any]) -> Iterator[Made]:
        self._tasks[:] = tasks
        if self._loader is None:
            self._loader = self._start()
        with _deaths_found_on_read():
            iterator = iter(self._loader)
        for _ in tasks:
            try:
                made = next(iterator)
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error) and "is killed by signal" not in str(error):
                    raise
                self._loader = None
                raise _WorkerDiedError(str(error)) from error
            yield made

    def close(self) -> None:
        """End the processes."""
        self._loader = None

    def _start(self) -> DataLoader[Made]:
        workers = self._workers
        return DataLoader(
            _Calls(self._make),
            sampler=self._tasks,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=functools.partial(_begin_worker, threading.current_thread() is threading.main_thread()),
        )


class _WorkerDiedError(Exception):
    """A process ended before its batch was made."""


@contextlib.contextmanager
def _deaths_found_on_read() -> Iterator[None]:
    """Keep DataLoader from raising, when a worker dies, wherever the training process happens to be.

    Its signal handler would do so in the middle of a step.  Without it the next read finds the death, within seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


class _Calls(Dataset[Made]):
    """A function seen as a data set: `calls[task]` is `make(task)`.

    Where workers are not forked but spawned, the function is pickled for each.  Its large arrays then go through a
    file that all workers map, so that a long list of captions is in memory once and not once a worker.
    """

    def __init__(self, make: Callable[[Any], Made]) -> None:
        self._make = make
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __getitem__(self, task: Any) -> Made:
        return self._make(task)

    def __reduce__(self) -> tuple[Any, ...]:
        buffers: list[pickle.PickleBuffer] = []
        small = pickle.dumps(self._make, protocol=5, buffer_callback=buffers.append)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tercet-", ignore_cleanup_errors=True)
            with Path(self._folder.name, "arrays").open("wb") as stream:
                for buffer in buffers:
                    stream.write(buffer.raw())
                    stream.write(bytes(-stream.tell() % ALIGNMENT))
        sizes = [buffer.raw().nbytes for buffer in buffers]
        return _restore, (small, str(Path(self._folder.name, "arrays")), sizes)


def _restore(small: bytes, file: str, sizes: list[int]) -> _Calls[Any]:
    """The function of a `_Calls` in a worker, its arrays mapped from `file`."""
    everything = np.memmap(file, np.uint8, "r") if any(sizes) else np.zeros(0, np.uint8)
    starts = itertools.accumulate((size + -size % ALIGNMENT for size in sizes), initial=0)
    buffers = [everything[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return _Calls(pickle.loads(small, buffers=buffers))


def _unchanged(batch: Made) -> Made:
    """Keeps DataLoader from turning what is inside a batch into tensors."""
    return batch


def _begin_worker(started_by_main_thread: bool, _: int) -> None:
    # The processes are the parallelism; threads inside each would only take turns on the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    _outlast_signals()
    if started_by_main_thread:
        _end_with_parent()


def _outlast_signals() -> None:
    """Ignore Ctrl-C and SIGTERM, which reach every process of a terminal or of a cluster's job.

    The training process wants to finish its step and write a checkpoint, and reads batches until then.  It ends the
    workers itself, by SIGTERM if need be, so that a SIGTERM from it still ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    # Only who waits for a signal learns who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parents_sigterm, args=(parent.pid,), name="sigterm", daemon=True).start()


def _await_parents_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_with_parent() -> None:
    """End at once when the training process is killed: DataLoader's own watch takes seconds to notice it.

    Linux alone does so, and by parent it means the thread that started this process: only the main thread is sure to
    last as long as its process.
    """
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None or os.getppid() != parent.pid:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died in between
        os._exit(1)
