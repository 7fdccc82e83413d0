"""Bytes from where they lie: files, byte ranges of large files, and whatever fsspec reaches by URL."""

from __future__ import annotations

import difflib
import os
import re
import stat
from pathlib import Path

import fsspec
import numpy as np

from tercet.data.packed import PackedStrings
from tercet.errors import TercetError

# No photograph is larger; a name in a foreign file may lead to anything, a device without end among it.
LARGEST_IMAGE = 1 << 30
URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://|^[a-zA-Z0-9]+::")
PROBES = 16


def is_url(location: str) -> bool:
    """Whether fsspec, not the file system, is to be asked for `location`."""
    return URL.match(location) is not None


def cache_folder() -> Path:
    """Where copies of remote and of repacked files are kept: TERCET_CACHE, or tercet in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tercet"
    return Path(os.environ.get("TERCET_CACHE", default))


def writable(folder: Path) -> bool:
    """Whether files may be put into a folder.  One that is marked read-only is left alone, by root as well."""
    try:
        return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)
    except OSError:
        return False


def read_bytes(location: str) -> bytes:
    """The whole content of a file or URL.

    Raises:
        TercetError: it is not there or cannot be read; the message names the nearest file beside it.
    """
    if is_url(location):
        try:
            with fsspec.open(location, "rb") as stream:
                return stream.read()  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:  # each protocol has exceptions of its own, with no common base
            raise TercetError(f"cannot read {location}: {reason_of(error)}") from error
    try:
        return Path(location).read_bytes()
    except FileNotFoundError as error:
        raise TercetError(missing(location)) from error
    except (OSError, ValueError) as error:
        raise TercetError(f"cannot read {location}: {reason_of(error)}") from error


def read_image(location: str) -> bytes:
    """The bytes of an image's file or URL, of at most `LARGEST_IMAGE`.

    Raises:
        OSError, TercetError: it is not there, cannot be read, is larger, or is no file (a folder, a pipe, a device).
    """
    if is_url(location):
        try:
            with fsspec.open(location, "rb") as stream:
                data = stream.read(LARGEST_IMAGE + 1)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:  # each protocol has exceptions of its own, with no common base
            raise TercetError(f"cannot read {location}: {reason_of(error)}") from error
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


def is_file(location: str | Path) -> bool:
    """Whether there is a file, also for names that no file can have, which `Path.is_file` raises on."""
    return os.path.isfile(location)  # noqa: PTH113


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


def missing(location: str) -> str:
    """The message for a file that is not there, with the nearest name beside it."""
    if is_url(location):
        return f"no file at {location}"
    path = Path(location)
    there = os.path.isdir(path.parent)  # noqa: PTH112 - as in is_file
    beside = [entry.name for entry in path.parent.iterdir()] if there else []
    near = difflib.get_close_matches(path.name, beside, 1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    if not there:
        hint = f"; there is no folder {path.parent}"
    return f"no file {location}{hint}"


class FileImages:
    """Images that are files of their own, named relative to `root` or by URL."""

    def __init__(self, root: str, names: PackedStrings) -> None:
        self.root = root
        self.names = names

    def location(self, index: int) -> str:
        """The file's absolute path, or its URL."""
        name = os.fsdecode(self.names.raw(index))
        if is_url(name):
            return name
        if is_url(self.root):
            return f"{self.root.rstrip('/')}/{name}"
        return os.path.abspath(Path(self.root) / name)  # noqa: PTH100 - links stay as they are

    def read(self, index: int) -> bytes:
        """The file's bytes.  Raises OSError or TercetError when it cannot be read."""
        name = os.fsdecode(self.names.raw(index))
        if is_url(name):
            return read_image(name)
        if is_url(self.root):
            return read_image(f"{self.root.rstrip('/')}/{name}")
        return read_image(str(Path(self.root) / name))

    def require_some(self, file: str) -> None:
        """Raise TercetError when none of a few images spread over the set is there: the folder is surely wrong."""
        if is_url(self.root):
            return
        indices = np.unique(np.linspace(0, len(self.names) - 1, PROBES).astype(int))
        names = [os.fsdecode(self.names.raw(index)) for index in indices]
        if not any(is_url(name) or is_file(Path(self.root) / name) for name in names):
            raise TercetError(
                f"{file}: none of its images is there, such as {Path(self.root) / names[0]}; "
                "set data.image_root to the folder that the names start from"
            )


class RangeImages:
    """Images that are byte ranges of a few large files, such as tar shards.

    Attributes:
        files: paths of the large files.
        file_index: int32 [images]; which file.
        offsets, sizes: int64 [images]; where in it.
    """

    def __init__(self, files: list[str], file_index: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
        self.files = files
        self.file_index = file_index
        self.offsets = offsets
        self.sizes = sizes
        self._handles: dict[int, int] = {}

    def read(self, index: int) -> bytes:
        """The image's bytes.  Raises OSError when the file is gone or has become shorter."""
        file = int(self.file_index[index])
        size = int(self.sizes[index])
        if size > LARGEST_IMAGE:
            raise OSError(f"{size} bytes in {self.files[file]} are no image")
        data = read_range(self._handle(file), int(self.offsets[index]), size)
        if len(data) < size:
            raise OSError(f"{self.files[file]} is shorter than when it was opened")
        return data

    def _handle(self, file: int) -> int:
        # A forked worker may share these handles: reads name their position, so no two disturb each other.
        if file not in self._handles:
            self._handles[file] = os.open(self.files[file], os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return self._handles[file]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)


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


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
