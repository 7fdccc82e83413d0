"""What img2dataset writes is read as it is, in its three layouts; images that it could not fetch are counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tercet.config import DataConfig
from tercet.data.loader import TrainLoader
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer

MakeJpeg = Callable[..., bytes]
FAILED = {3, 7}


def record(number: int) -> dict[str, Any]:
    """A row as img2dataset writes it."""
    failed = number in FAILED
    return {
        "url": f"https://example.org/{number}.jpg",
        "key": f"{number:09d}",
        "status": "failed_to_download" if failed else "success",
        "error_message": "HTTP Error 404: Not Found" if failed else None,
        "caption": f"picture number {number}",
        "width": None if failed else 48,
        "height": None if failed else 40,
        "exif": None if failed else "{}",
        "sha256": None if failed else "00",
    }


def sample_files(number: int, jpeg: MakeJpeg) -> dict[str, bytes]:
    contents = {"jpg": jpeg(number), "txt": b"picture number %d" % number, "json": json.dumps(record(number)).encode()}
    return {f"{number:09d}.{kind}": content for kind, content in contents.items()}


def write_metadata(folder: Path, shard: int, images: dict[int, bytes] | None = None) -> None:
    """00000.parquet, with the images in it in that layout, and 00000_stats.json."""
    import pyarrow
    import pyarrow.parquet

    numbers = range(10 * shard, 10 * shard + 10)
    rows = [record(number) for number in numbers]
    if images is not None:
        rows = [{**row, "jpg": images.get(number)} for number, row in zip(numbers, rows, strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 10, "failed_to_download": 2}))


def opened(folder: Path, **data: object) -> SampleTable:
    return open_sources([str(folder)], DataConfig.model_validate(data), "train")


def check(source: SampleTable, jpeg: MakeJpeg, shards: int = 2) -> None:
    wanted = [number for number in range(10 * shards) if number not in FAILED]
    assert [source.captions(index) for index in range(source.image_count)] == [[f"picture number {n}"] for n in wanted]
    assert [source.image(index) for index in range(source.image_count)] == [jpeg(number) for number in wanted]


def test_webdataset(tmp_path: Path, tar: Callable[..., Path], jpeg: MakeJpeg) -> None:
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(10 * shard, 10 * shard + 10):
            if number not in FAILED:
                members |= sample_files(number, jpeg)
        tar(tmp_path / f"{shard:05d}.tar", members)
        write_metadata(tmp_path, shard)
    check(opened(tmp_path), jpeg)
    check(opened(tmp_path), jpeg)  # by the indexes


def test_files(tmp_path: Path, jpeg: MakeJpeg) -> None:
    for shard in range(2):
        folder = tmp_path / f"{shard:05d}"
        folder.mkdir()
        for number in range(10 * shard, 10 * shard + 10):
            if number not in FAILED:
                for name, content in sample_files(number, jpeg).items():
                    (folder / name).write_bytes(content)
        write_metadata(tmp_path, shard)
    check(opened(tmp_path), jpeg)


def test_parquet(tmp_path: Path, jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    for shard in range(2):
        write_metadata(tmp_path, shard, {n: jpeg(n) for n in range(10 * shard, 10 * shard + 10) if n not in FAILED})
    source = opened(tmp_path, image_column="jpg")
    check(source, jpeg)
    assert len(source.rejected) == 2 and "row 4: 'jpg' is empty" in source.rejected[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of private pages is Linux's")
def test_workers_do_not_copy_the_captions(tmp_path: Path, tar: Callable[..., Path], jpeg: MakeJpeg) -> None:
    image, number = jpeg(0), 800
    text = ("a long caption of many words that is kept whole " * 100).encode()
    members: dict[str, bytes] = {}
    for index in range(number):
        members |= {f"{index:06d}.jpg": image + b"%d" % index, f"{index:06d}.txt": text + str(index).encode()}
    source = opened(tar(tmp_path / "a.tar", members))
    tokenizer = Tokenizer.train(iter(["a long caption of many words"]), 100)
    loader = TrainLoader(source, tokenizer, DataConfig(workers=1, augment="none"), 16, 50, 0)
    batches = loader.batches(0)
    for _ in range(5):
        next(batches)
    worker = max(psutil.Process().children(), key=lambda child: child.memory_full_info().uss)
    before = worker.memory_full_info().uss
    for _ in batches:
        pass
    growth = worker.memory_full_info().uss - before
    loader.close()
    assert growth < 0.5 * number * len(text)  # a list of captions would be copied whole, page by page
