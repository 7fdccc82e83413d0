"""Stopping on request: after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TypeVar

from tercet.distributed import Ranks

Result = TypeVar("Result")


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Work that can be dropped was interrupted by a request to stop."""


class StopRequest:
    """While open, the first Ctrl-C or SIGTERM is noted instead of acted on; a second one interrupts at once.

    Work that `drop_when_stopped` does is interrupted by the first one too: an evaluation may last longer than the
    seconds between a cluster's SIGTERM and its SIGKILL.

    Attributes:
        received: name of the signal, None before one came.
        dropped: whether work was dropped for it.
    """

    def __init__(self, alone: bool = True) -> None:
        """Note signals; `alone`: no other rank waits for what this process drops."""
        self.received: str | None = None
        self.alone = alone
        self.dropped = False
        self._before: dict[signal.Signals, object] = {}
        self._interruptible = False

    def agreed(self, ranks: Ranks) -> str | None:
        """Name of the signal that any of the ranks received, so that all stop behind the same step."""
        if not ranks.any(self.received is not None):
            return None
        return next(name for name in ranks.gather(self.received) if name is not None)

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def drop_when_stopped(self, work: Callable[[], Result]) -> Result | None:
        """Do work that is of no use to a run that stops; None, and `dropped`, when a signal came before it was done."""
        try:
            self._interruptible = self.alone
            if self.received is None or not self.alone:
                return work()
        except Interrupted:
            pass  # noted in `received` by who raised it
        finally:
            self._interruptible = False
        self.dropped = True
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if self._interruptible:
            raise Interrupted
