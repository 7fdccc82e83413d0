"""Atomic writes, where a reader sees the old file or the new one and never a part of it, and locks of folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tercet.errors import TercetError


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write `data` beside `path`, flush it to the disk and rename it into place.

    Raises:
        TercetError: the disk is full, or the folder cannot be written.
    """
    with atomic_stream(path) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextlib.contextmanager
def atomic_stream(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` when the block succeeds, and is removed when it does not.

    Raises:
        TercetError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that replaces it when the block succeeds, and is removed when it does not.

    Raises:
        TercetError: the disk is full, or the parent folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        settle_folder(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def settle_folder(temporary: Path, path: Path) -> None:
    """Flush a finished folder to the disk and rename it to `path` beside it, replacing a folder there as a whole.

    Raises:
        OSError: the disk is full, or the parent folder cannot be written.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_folder(temporary)
    temporary.chmod(0o777 & ~_umask())
    if path.exists():
        # A folder cannot be renamed over one that is not empty.
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        path.rename(old / path.name)
        temporary.rename(path)
        shutil.rmtree(old)
    else:
        temporary.rename(path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def lock_folder(folder: str | Path, name: str, doing: str, timeout: float = 0) -> Iterator[None]:
    """Be the only process that holds the lock `folder`/`name`; the system releases it however the process ends.

    Args:
        folder: created if missing.
        name: of the lock file.
        doing: what the other process does, for the message, such as "training in".
        timeout: seconds to wait for it.

    Raises:
        TercetError: another process holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path = Path(folder) / name
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout:
        raise TercetError(
            f"another process is {doing} {folder}; wait for it or stop it, or choose another folder"
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def only_writer(folder: str | Path, prefix: str) -> Iterator[None]:
    """Be the only process that writes files of that prefix into a folder, and remove unfinished ones of killed writers.

    Raises:
        TercetError: another process does, or the folder cannot be written.
    """
    with lock_folder(folder, f".{prefix}lock", "writing into"):
        for unfinished in Path(folder).glob(f".{prefix}*.*.*"):
            unfinished.unlink()
        yield


def cannot_write(path: Path, error: OSError) -> TercetError:
    """The error of a disk that is full or read-only."""
    return TercetError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder")


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself.  Windows has no such call on folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
