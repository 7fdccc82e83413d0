"""Copies of remote files on this machine, no more than a limit of them; the least recently used give way.

Several processes may share the folder.  A copy appears whole under its name, never half; one that is deleted while
another process reads it stays readable there until that process closes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

from tercet.data.storage import reason_of
from tercet.errors import TercetError

try:
    import fcntl
except ImportError:  # Windows has none: there two processes may fetch the same file twice, which costs time alone
    fcntl = None

CHUNK = 4 << 20
ATTEMPTS = 3
PARTIAL = ".part"


@dataclass(frozen=True)
class RemoteState:
    """What a server says of a file: its size in bytes, and a mark that changes with its content."""

    size: int
    mark: str


def remote_state(url: str) -> RemoteState:
    """Ask for the state of a remote file.

    Raises:
        TercetError: it is not there, or the server does not say its size.
    """
    try:
        system, path = fsspec.url_to_fs(url)
        told = system.info(path)
        size = told.get("size")
        marks = [str(told[key]) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified") if key in told]
    except Exception as error:  # each protocol has exceptions of its own, with no common base
        raise TercetError(f"cannot fetch {url}: {reason_of(error)}") from error
    if size is None:
        raise TercetError(f"cannot fetch {url}: the server does not say how large it is; copy it here first")
    return RemoteState(int(size), " ".join(marks))


class FileCache:
    """A folder of copies.

    Args:
        folder: where they lie; it may be shared by processes, and by runs.
        limit: bytes that all copies together may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, url: str, state: RemoteState) -> int:
        """A handle to read a copy of `url` in that state, fetched now where there is none.

        Raises:
            TercetError: it cannot be fetched, is larger than the limit, or was changed meanwhile.
        """
        path = self.path_of(url, state)
        handle = _open_used(path)
        if handle is not None:
            return handle
        if state.size > self.limit:
            raise TercetError(
                f"{url} has {state.size / 1e9:.2f} GB and the cache may hold {self.limit / 1e9:.2f}; "
                "raise data.cache_gigabytes"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One of 256 locks by the name: locks that came and went with the copies would not keep two fetches apart.
            with _locked(self.folder / f"{path.name[:2]}.lock"):
                handle = _open_used(path)  # another process may have fetched it while this one waited
                return self._fetch(url, state, path) if handle is None else handle
        except OSError as error:
            raise TercetError(
                f"cannot keep a copy of {url} in {self.folder}: {error.strerror or error}; "
                "free some space, or set data.cache_folder or data.cache_gigabytes"
            ) from error

    def path_of(self, url: str, state: RemoteState) -> Path:
        """Where the copy of a file in that state lies; another state has another place."""
        name = hashlib.sha256(f"{url}\n{state.size}\n{state.mark}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.copy"

    def _fetch(self, url: str, state: RemoteState, path: Path) -> int:
        partial = path.with_suffix(PARTIAL)
        handle = -1
        try:
            with _locked(self.folder / "folder.lock"):
                handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
                # Held until the copy is whole: others count it as in use, and remove it when this process has died.
                _lock(handle, wait=True)
                self._make_room(state.size)
                if hasattr(os, "posix_fallocate") and state.size:
                    os.posix_fallocate(handle, 0, state.size)
            _download(url, state, handle)
            # A name that changes while another process walks the folder can be missed there, or counted twice.
            with _locked(self.folder / "folder.lock"):
                partial.replace(path)
        except BaseException:
            if handle >= 0:
                os.close(handle)
            partial.unlink(missing_ok=True)
            raise
        _unlock(handle)
        return handle

    def _make_room(self, size: int) -> None:
        """Delete the copies that were not used for longest until `size` bytes more are within the limit."""
        copies: list[tuple[int, int, Path]] = []
        total = size
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may have finished or removed it
                state = path.stat()
                if path.suffix == PARTIAL and not _is_held(path):
                    path.unlink()
                elif path.suffix == PARTIAL:
                    total += state.st_size
                elif path.suffix == ".copy":
                    copies.append((state.st_mtime_ns, state.st_size, path))
                    total += state.st_size
        for _, taken, path in sorted(copies):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= taken


def _download(url: str, state: RemoteState, handle: int) -> None:
    written = 0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            os.lseek(handle, 0, os.SEEK_SET)
            written = 0
            with fsspec.open(url, "rb") as stream:
                while chunk := stream.read(CHUNK):  # pyright: ignore[reportAttributeAccessIssue]
                    written += len(chunk)
                    while chunk:
                        chunk = chunk[os.write(handle, chunk) :]
            break
        except Exception as error:  # each protocol has exceptions of its own, with no common base
            if attempt == ATTEMPTS:
                raise TercetError(f"cannot fetch {url} ({ATTEMPTS} attempts): {reason_of(error)}") from error
            time.sleep(attempt)
    if written != state.size:
        raise TercetError(f"{url}: {written} bytes came where {state.size} were announced; it was changed or cut short")


def _open_used(path: Path) -> int | None:
    """A handle to a copy that is there, marked as used now."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    with contextlib.suppress(OSError):  # a folder that others own: then the copies go by age
        os.utime(path)
    return handle


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process at the latest."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _unlock(handle: int) -> None:
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)


def _is_held(path: Path) -> bool:
    """Whether a process is still writing a partial copy."""
    handle = os.open(path, os.O_RDWR)
    try:
        return not _lock(handle, wait=False)
    finally:
        os.close(handle)
