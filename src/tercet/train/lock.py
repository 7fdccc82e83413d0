"""One trainer a run folder: a second one would delete what the first is writing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tercet.errors import TercetError

LOCK = ".lock"


class FolderLock:
    """Holds a run folder for this process; the system lets go of it however the process ends.

    A record lock, which child processes do not inherit: a worker that outlives a killed trainer holds nothing.  Where
    the file system has no locks, or on Windows, the folder is not held.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._descriptor: int | None = None

    def hold(self, folder: Path) -> None:
        """Hold `folder`.

        Raises:
            TercetError: another process holds it, or it cannot be written.
        """
        if sys.platform == "win32":
            return
        self._path = folder / LOCK
        import fcntl

        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise TercetError(f"cannot write {self._path}: {error.strerror}; is the disk full or read-only?") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise TercetError(
                f"another process is training in {folder}; wait for it or stop it, or name another --output"
            ) from error
        except OSError as error:  # no locks on this file system
            print(f"{folder} is not guarded against a second trainer: {error.strerror}", file=sys.stderr)
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go of the folder."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.release()
