"""Bytes from where they lie: files, ranges of large files, URLs through fsspec, and local copies of remote files."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import stat
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import fsspec
from filelock import FileLock, Timeout

from tercet.errors import TercetError

LARGEST_IMAGE = 1 << 30  # bytes; a name in a foreign file may lead to anything, an endless device among it
URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://|^[a-zA-Z0-9]+::")
CHUNK = 4 << 20
ATTEMPTS = 3
PARTIAL, COPY = ".part", ".copy"


def is_url(location: str) -> bool:
    """Whether fsspec, not the file system, reads `location`."""
    return URL.match(location) is not None


def cache_folder() -> Path:
    """Where copies of remote and repacked files are kept: TERCET_CACHE, or tercet in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tercet"
    return Path(os.environ.get("TERCET_CACHE", default))


def writable(folder: Path) -> bool:
    """Whether files may be put into a folder.  One that is marked read-only is left alone, by root as well."""
    try:
        return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)
    except OSError:
        return False


def is_file(location: str | Path) -> bool:
    """Whether there is a file, also for names that no file can have, which `Path.is_file` raises on."""
    return os.path.isfile(location)  # noqa: PTH113


def read_bytes(location: str) -> bytes:
    """The whole content of a file or URL.

    Raises:
        TercetError: it is missing or cannot be read; the message names the nearest file beside it.
    """
    if is_url(location):
        return _read_url(location, -1)
    try:
        return Path(location).read_bytes()
    except FileNotFoundError as error:
        raise TercetError(missing(location)) from error
    except (OSError, ValueError) as error:
        raise TercetError(f"cannot read {location}: {reason_of(error)}") from error


def read_text(location: str) -> str:
    """The whole content of a file or URL as text, in UTF-8 with or without a byte order mark.

    Raises:
        TercetError: it cannot be read, or is not UTF-8.
    """
    data = read_bytes(location)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TercetError(
            f"{location}: not UTF-8 at line {line}, byte {error.start}; convert it, as with iconv -t UTF-8"
        ) from error


def read_image(location: str) -> bytes:
    """The bytes of an image's file or URL, of at most `LARGEST_IMAGE`.

    Raises:
        OSError, TercetError: it is missing, cannot be read, is larger, or is no file (a folder, a pipe, a device).
    """
    if is_url(location):
        data = _read_url(location, LARGEST_IMAGE + 1)
    elif "\0" in location:
        raise OSError("not a file name: it holds a null character")
    else:
        if not stat.S_ISREG(os.stat(location).st_mode):  # noqa: PTH116 - before a pipe is opened, which may block
            raise OSError(f"not a file: {location}")
        with Path(location).open("rb") as stream:
            data = stream.read(LARGEST_IMAGE + 1)
    if len(data) > LARGEST_IMAGE:
        raise TercetError(f"{location}: larger than {LARGEST_IMAGE >> 30} GiB, which is no image")
    return data


def _read_url(url: str, size: int) -> bytes:
    try:
        with fsspec.open(url, "rb") as stream:
            return stream.read(size)  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # each protocol has exceptions of its own, with no common base
        raise TercetError(f"cannot read {url}: {reason_of(error)}") from error


def open_to_read(location: str) -> int:
    """A handle for `read_range`.  Raises TercetError when the file is missing or cannot be opened."""
    try:
        return os.open(location, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise TercetError(missing(location)) from error
    except OSError as error:
        raise TercetError(f"cannot read {location}: {error.strerror}") from error


def read_range(handle: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes at `offset` of an open file; fewer at its end."""
    if not hasattr(os, "pread"):
        os.lseek(handle, offset, os.SEEK_SET)
        return os.read(handle, size)
    parts: list[bytes] = []
    while size > 0:
        part = os.pread(handle, size, offset)
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def missing(location: str) -> str:
    """The message for a file that is missing, with the nearest name beside it."""
    if is_url(location):
        return f"no file at {location}"
    path = Path(location)
    if not os.path.isdir(path.parent):  # noqa: PTH112 - as in is_file
        return f"no file {location}; there is no folder {path.parent}"
    beside = {_fold(entry.name): entry.name for entry in path.parent.iterdir()}
    stems = {_fold(Path(name).stem): name for name in beside.values()}
    near = beside.get(_fold(path.name)) or stems.get(_fold(path.name))
    near = near or next((beside[name] for name in difflib.get_close_matches(_fold(path.name), beside, 1)), None)
    return f"no file {location}" + (f"; did you mean {path.parent / near}?" if near else "")


def _fold(name: str) -> str:
    """A name without what differs between systems: capitals, and how accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def local_copy(location: str) -> str:
    """A path on this machine for `location`: itself, or for a URL a copy that stays in the cache folder.

    Raises:
        TercetError: the download failed.
    """
    if not is_url(location):
        return location
    storage = str(cache_folder() / "downloads")
    try:
        return str(fsspec.open_local(f"filecache::{location}", filecache={"cache_storage": storage}))
    except Exception as error:  # each protocol has exceptions of its own, with no common base
        raise TercetError(f"cannot fetch {location}: {reason_of(error)}") from error


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL: its size in bytes, and a mark that changes with its content."""

    url: str
    size: int
    mark: str


def find_remote(url: str) -> RemoteFile:
    """Ask the server about a file.

    Raises:
        TercetError: it is missing, or the server does not report its size.
    """
    try:
        system, path = fsspec.url_to_fs(url)
        info = system.info(path)
    except Exception as error:  # each protocol has exceptions of its own, with no common base
        raise TercetError(f"cannot fetch {url}: {reason_of(error)}") from error
    if info.get("size") is None:
        raise TercetError(f"cannot fetch {url}: the server does not report its size; copy the file here first")
    marks = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified") if key in info]
    return RemoteFile(url, int(info["size"]), " ".join(marks))


@dataclass(frozen=True)
class FileCache:
    """Local copies of remote files in a folder that processes and runs share; the least recently used are deleted.

    fsspec's own file cache has no limit of size, writes under the final name, and does not know of other processes.
    Here a copy appears whole or not at all, and one that is deleted stays readable to those who have it open.

    Attributes:
        folder: where the copies lie.
        limit: bytes that all copies together may take.
    """

    folder: Path
    limit: int

    def open(self, remote: RemoteFile) -> int:
        """A handle to read a copy of `remote`, downloaded now if there is none.

        Raises:
            TercetError: it cannot be downloaded, is larger than the limit, or was changed meanwhile.
        """
        path = self.path_of(remote)
        handle = _open_used(path)
        if handle is not None:
            return handle
        if remote.size > self.limit:
            raise TercetError(
                f"{remote.url} has {remote.size / 1e9:.2f} GB and the cache may hold {self.limit / 1e9:.2f}; "
                "raise data.cache_gigabytes"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._bucket(path)):
                handle = _open_used(path)  # another process may have downloaded it while this one waited
                return self._download(remote, path) if handle is None else handle
        except OSError as error:
            raise TercetError(
                f"cannot keep a copy of {remote.url} in {self.folder}: {error.strerror or error}; "
                "free some space, or set data.cache_folder or data.cache_gigabytes"
            ) from error

    def path_of(self, remote: RemoteFile) -> Path:
        """Where the copy of a file in that state lies; another state has another path."""
        name = hashlib.sha256(f"{remote.url}\n{remote.size}\n{remote.mark}".encode()).hexdigest()[:32]
        return self.folder / f"{name}{COPY}"

    def _bucket(self, path: Path) -> str:
        """One of 256 locks that say which downloads are under way."""
        return str(self.folder / f"{path.name[:2]}.lock")

    def _download(self, remote: RemoteFile, path: Path) -> int:
        partial = path.with_suffix(PARTIAL)
        handle = None
        try:
            with FileLock(self.folder / "folder.lock"):
                self._make_space(remote.size, partial)
                with partial.open("wb") as stream:
                    stream.truncate(remote.size)  # other processes count it from now on
            _copy(remote, partial)
            with FileLock(self.folder / "folder.lock"):
                handle = os.open(partial, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return handle

    def _make_space(self, size: int, own: Path) -> None:
        """Delete what killed processes left and the least recently used copies until `size` more bytes fit."""
        copies: list[tuple[int, int, Path]] = []
        total = size
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may have finished or removed it
                state = path.stat()
                if path.suffix == PARTIAL and (path == own or self._is_abandoned(path)):
                    path.unlink()
                elif path.suffix in (PARTIAL, COPY):
                    total += state.st_size
                    if path.suffix == COPY:
                        copies.append((state.st_mtime_ns, state.st_size, path))
        for _, taken, path in sorted(copies):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= taken

    def _is_abandoned(self, partial: Path) -> bool:
        """Whether no process is downloading it any more."""
        try:
            with FileLock(self._bucket(partial), timeout=0):
                return True
        except Timeout:
            return False


def _copy(remote: RemoteFile, partial: Path) -> None:
    written = 0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with fsspec.open(remote.url, "rb") as source, partial.open("r+b") as stream:
                shutil.copyfileobj(source, stream, CHUNK)  # pyright: ignore[reportArgumentType]
                written = stream.tell()
            break
        except Exception as error:  # each protocol has exceptions of its own, with no common base
            if attempt == ATTEMPTS:
                raise TercetError(f"cannot fetch {remote.url} ({ATTEMPTS} attempts): {reason_of(error)}") from error
            time.sleep(attempt)
    if written != remote.size:
        raise TercetError(
            f"{remote.url}: {written} bytes came where {remote.size} were announced; it was changed or cut short"
        )


def _open_used(path: Path) -> int | None:
    """A handle to a copy, marked as used now; None when there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    with contextlib.suppress(OSError):  # a folder that others own: then the copies go by age
        os.utime(path)
    return handle
