"""Processes that make batches ahead of the step that reads them."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tercet.errors import TercetError

PREFETCH = 2
ALIGNMENT = 64  # numpy copies a whole array that does not begin at a multiple of its items' size

Made = TypeVar("Made")


class WorkerPool(Generic[Made]):
    """Calls `make` on each of a list of tasks, in `workers` processes that stay alive between lists.

    Results come in the order of the tasks.  With 0 workers the caller's own process does the work.

    Args:
        make: turns one task into a batch; it is copied to every worker, and must give the same whichever runs it.
        workers: number of processes.
    """

    def __init__(self, make: Callable[[Any], Made], workers: int) -> None:
        self._tasks = _Tasks()
        self._workers = workers
        self._loader: DataLoader[Made] | None = None
        self._make = make

    def run(self, tasks: Sequence[Any]) -> Iterator[Made]:
        """The results of `tasks`, in their order.

        Raises:
            TercetError: a worker process died.
        """
        if not tasks:
            return
        self._tasks.tasks = tasks
        if self._loader is None:
            self._loader = self._start()
        with _deaths_told_on_reading():
            iterator = iter(self._loader)
        for _ in tasks:
            try:
                made = next(iterator)
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error) and "is killed by signal" not in str(error):
                    raise
                self._loader = None
                raise TercetError(
                    "a data worker process died (out of memory, or /dev/shm too small?); set data.workers lower, "
                    f"or to 0 to see why: {' '.join(str(error).split())}"
                ) from error
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
            worker_init_fn=_begin_worker,
        )


@contextlib.contextmanager
def _deaths_told_on_reading() -> Iterator[None]:
    """Keep DataLoader from raising, when a worker dies, wherever the training process happens to be.

    Its signal handler would do so in the middle of a step.  Without it the next read finds the death, within seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


class _Tasks(Sampler[Any]):
    """The tasks of the list that is running now."""

    def __init__(self) -> None:
        self.tasks: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


class _Calls(Dataset[Made]):
    """A function seen as a data set: `calls[task]` is `make(task)`.

    Where workers are not forked but started anew, the function is pickled for each.  Its large arrays then go through a
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


def _begin_worker(_: int) -> None:
    # The processes are the parallelism; threads inside each would only take turns on the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal.  The training process wants to finish its step and write a
    # checkpoint; it then ends the workers itself, by SIGTERM if need be, which must therefore stay as it is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
