"""Writing files so that a reader sees the old one or the new one, never half of one."""

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
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise TercetError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    return path


@contextlib.contextmanager
def atomic_stream(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and vanishes when it does not.

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
        raise TercetError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: str | Path, prefix: str) -> Iterator[None]:
    """Be the only process that writes files of that prefix into a folder; what killed ones left unfinished is removed.

    Raises:
        TercetError: another process does, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / f".{prefix}lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TercetError(f"cannot write into {folder}: {error.strerror or error}; choose another folder") from error
    try:
        if os.name != "nt":  # Windows has no such locks
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TercetError(f"another process is writing into {folder}; wait for it, or stop it") from error
        for left in folder.glob(f".{prefix}*.*.*"):
            left.unlink()
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    A folder already at `path` is replaced as a whole.

    Raises:
        TercetError: the disk is full, or the parent folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise TercetError(f"cannot write beside {path}: {error.strerror or error}") from error
    try:
        yield temporary
        settle_folder(temporary, path)
    except OSError as error:
        raise TercetError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle_folder(temporary: Path, path: Path) -> None:
    """Flush a finished folder to the disk and move it, from beside `path`, into its place.

    A folder already at `path` is replaced as a whole.

    Raises:
        OSError: the disk is full, or the parent folder cannot be written.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_folder(temporary)
    temporary.chmod(0o777 & ~_umask())
    _swap(temporary, path)
    _sync_folder(path.parent)


def _swap(temporary: Path, path: Path) -> None:
    """Move `temporary` to `path`; what stood there steps aside, since a folder cannot be renamed over a full one."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.rename(aside / path.name)
    temporary.rename(path)
    shutil.rmtree(aside)


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
