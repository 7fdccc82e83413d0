"""Bytes of local and remote files: files that are images, and whole copies of remote ones within a limit."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tercet.config import DataConfig
from tercet.data import storage
from tercet.data.readers import open_sources
from tercet.data.storage import FileCache, RemoteFile, find_remote, read_image
from tercet.data.table import SampleTable
from tercet.errors import TercetError

SIZE = 100_000


def make_files(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.bin").write_bytes(bytes([number]) * SIZE)
    return [f"file://{folder}/{number}.bin" for number in range(count)]


def read(cache: FileCache, url: str) -> bytes:
    handle = cache.open(find_remote(url))
    try:
        return os.pread(handle, 10 * SIZE, 0)
    finally:
        os.close(handle)


def copies(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".copy"]


def test_the_least_recently_used_are_removed(tmp_path: Path) -> None:
    urls = make_files(tmp_path / "remote", 5)
    cache = FileCache(tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2, 0, 3):  # 0 is used again before room is needed
        assert read(cache, urls[number]) == bytes([number]) * SIZE
        time.sleep(0.01)
    kept = {url for url in urls if cache.path_of(find_remote(url)).exists()}
    assert kept == {urls[0], urls[2], urls[3]}
    held = cache.open(find_remote(urls[0]))
    for number in (1, 2, 4):
        read(cache, urls[number])
    assert not cache.path_of(find_remote(urls[0])).exists()
    assert os.pread(held, 3, 0) == bytes(3)  # one that is open stays readable
    os.close(held)


def test_another_state_is_another_copy(tmp_path: Path) -> None:
    urls = make_files(tmp_path / "remote", 1)
    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    read(cache, urls[0])
    (tmp_path / "remote" / "0.bin").write_bytes(b"new" * 5)
    assert read(cache, urls[0]) == b"new" * 5


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    urls = make_files(tmp_path / "remote", 1)
    with pytest.raises(TercetError, match=r"has 0\.00 GB and the cache may hold 0\.00; raise data\.cache_gigabytes"):
        read(FileCache(tmp_path / "cache", SIZE - 1), urls[0])
    with pytest.raises(TercetError, match="cannot fetch file:///nowhere/x"):
        find_remote("file:///nowhere/x.tar")
    cache = FileCache(tmp_path / "cache", 9 * SIZE)
    state = find_remote(urls[0])
    with pytest.raises(TercetError, match="100000 bytes came where 100007 were announced"):
        cache.open(RemoteFile(urls[0], state.size + 7, state.mark))
    (tmp_path / "remote" / "0.bin").unlink()
    with pytest.raises(TercetError, match=r"cannot fetch .*0\.bin \(1 attempts\)"):
        cache.open(state)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()].count(".part") == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(TercetError, match=r"cannot keep a copy of .*; free some space, or set data\.cache_folder"):
        FileCache(tmp_path / "file" / "cache", 9 * SIZE).open(state)


def test_a_fetch_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = make_files(tmp_path / "remote", 1)
    real, calls = storage.fsspec.open, []

    def sometimes(url: str, mode: str) -> object:
        calls.append(url)
        if len(calls) < 3:
            raise OSError("connection reset")
        return real(url, mode)

    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    monkeypatch.setattr(storage.fsspec, "open", sometimes)
    assert read(FileCache(tmp_path / "cache", 2 * SIZE), urls[0]) == bytes(SIZE)
    assert len(calls) == 3


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    urls = make_files(tmp_path / "remote", 2)
    cache = FileCache(tmp_path / "cache", 2 * SIZE)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "dead.part").write_bytes(bytes(2 * SIZE))
    assert read(cache, urls[1]) == b"\1" * SIZE
    assert not (tmp_path / "cache" / "dead.part").exists()


def _hammer(folder: str, urls: list[str], seed: int, failures: multiprocessing.Queue) -> None:
    import numpy as np

    cache = FileCache(Path(folder), 3 * SIZE)
    for number in np.random.default_rng(seed).integers(len(urls), size=40).tolist():
        if read(cache, urls[number]) != bytes([number]) * SIZE:
            failures.put(f"wrong bytes of {number}")
        with FileLock(Path(folder) / "folder.lock"):  # so that it is one moment that is counted
            taken = sum(path.stat().st_size for path in copies(Path(folder)))
        if taken > 3 * SIZE:
            failures.put(f"{taken} bytes are kept")


def test_several_processes_share_a_cache(tmp_path: Path) -> None:
    urls = make_files(tmp_path / "remote", 8)
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [
        context.Process(target=_hammer, args=(str(tmp_path / "cache"), urls, seed, failures)) for seed in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert failures.empty()
    assert len(copies(tmp_path / "cache")) == 3


def test_remote_shards_need_no_copy_until_they_are_read(tmp_path: Path, tar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "indexes"))
    (tmp_path / "remote").mkdir()
    for shard in range(3):
        tar(tmp_path / "remote" / f"{shard}.tar", {"k.jpg": b"image %d" % shard, "k.txt": b"y"})
    data = DataConfig(cache_folder=str(tmp_path / "cache"), cache_gigabytes=0.000025)  # room for two of 10 kB
    spec = f"file://{tmp_path}/remote/" + "{0..2}.tar"

    def opened() -> SampleTable:
        return open_sources([spec], data)

    source = opened()
    assert len(copies(tmp_path / "cache")) == 2
    for path in copies(tmp_path / "cache"):
        path.unlink()
    source = opened()  # its indexes are there, so nothing is fetched
    assert not copies(tmp_path / "cache")
    assert source.key(2).endswith("2.tar#k")
    assert [source.image(index) for index in (2, 0, 1, 2)] == [b"image 2", b"image 0", b"image 1", b"image 2"]
    assert len(copies(tmp_path / "cache")) == 2


def test_devices_pipes_and_folders_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to: opening it would wait
    for name in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(OSError, match="not a file: "):
            read_image(name)
    with pytest.raises(OSError, match="null character"):
        read_image("a\0b")


def test_a_file_that_no_image_is_as_large_as_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LARGEST_IMAGE", 1 << 20)
    for name, size in (("fits.jpg", 1 << 20), ("larger.jpg", 1 << 40)):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
    assert len(read_image(str(tmp_path / "fits.jpg"))) == 1 << 20
    with pytest.raises(TercetError, match="larger than 0 GiB, which is no image"):
        read_image(str(tmp_path / "larger.jpg"))
