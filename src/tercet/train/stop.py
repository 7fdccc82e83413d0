"""Stopping on request: after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from tercet.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While open, the first Ctrl-C or SIGTERM is noted instead of acted on; a second one interrupts at once.

    Attributes:
        received: name of the signal, None before one came.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, object] = {}

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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
