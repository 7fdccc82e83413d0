"""What every reader of a foreign file must do: read it, or raise our own error that names it; and nothing else.

No other exception, no file opened for writing, made, moved or removed outside the folder, no process started, and
neither time nor memory without bound.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.target import Target
from tercet.errors import TercetError

SECONDS = 20
MEMORY = 2 << 30  # bytes that one file may ask for beyond what the process holds
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
_PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_allowed: list[str] = []
_trespasses: list[str] = []


class TooSlowError(BaseException):
    """The reader took longer than `SECONDS`."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event in _PROCESSES:
        _trespasses.append(f"{event} {arguments[:2]}")
    elif event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or bool((flags or 0) & _WRITING)
        if writes and isinstance(path, str | bytes):
            _note(event, path)
    elif event in _CHANGES:
        for path in arguments[:2]:
            if isinstance(path, str | bytes | Path):
                _note(event, path)


def _note(event: str, path: str | bytes | Path) -> None:
    absolute = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - of bytes as well
    if absolute != os.devnull and not any(f"{absolute}{os.sep}".startswith(folder) for folder in _allowed):
        _trespasses.append(f"{event} {absolute}")


sys.addaudithook(_watch)
sys.dont_write_bytecode = True  # of modules that a reader imports when it is called


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """At most `SECONDS` and `MEMORY`; more of either is an error in the reader."""
    with open("/proc/self/statm") as stream:  # noqa: PTH123 - the audit hook sees one event less
        held = int(stream.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"more than {SECONDS} seconds")


def check(target: Target, content: bytes) -> str:
    """Hold `target` to the property with `content` in its file.

    Returns:
        'read', or the message of our error.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name).resolve()
        os.environ["TERCET_CACHE"] = str(folder / "cache")
        target.put(folder).write_bytes(content)
        _trespasses.clear()
        _allowed.append(f"{folder}{os.sep}")
        try:
            with _bounded():
                target.read(folder)
            outcome = "read"
        except TercetError as error:
            outcome = str(error)
            named = target.file.rsplit("/", 1)[-1] if target.names is None else target.names
            assert named in outcome, f"the message names no file: {outcome}"
            assert "\n" not in outcome or "\n" in named, f"the message has several lines: {outcome}"
        finally:
            _allowed.clear()
        assert not _trespasses, _trespasses
        return outcome
