"""What img2dataset writes is read as it is, in its three layouts; images that it could not fetch are counted."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tercet.config import DataConfig
from tercet.data.loader import TrainLoader, cleaned_captions
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
                members[f"{number:09d}.jpg"] = jpeg(number)
                members[f"{number:09d}.txt"] = f"picture number {number}".encode()
                members[f"{number:09d}.json"] = json.dumps(record(number)).encode()
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
                (folder / f"{number:09d}.jpg").write_bytes(jpeg(number))
                (folder / f"{number:09d}.json").write_text(json.dumps(record(number)))
                (folder / f"{number:09d}.txt").write_text(f"picture number {number}")
        write_metadata(tmp_path, shard)
    check(opened(tmp_path), jpeg)


def test_parquet(tmp_path: Path, jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    for shard in range(2):
        write_metadata(tmp_path, shard, {n: jpeg(n) for n in range(10 * shard, 10 * shard + 10) if n not in FAILED})
    source = opened(tmp_path, image_column="jpg")
    check(source, jpeg)
    assert len(source.rejected) == 2 and "row 4: 'jpg' is empty" in source.rejected[0]


def test_images_that_are_gone_are_skipped_and_counted(photo_folder: Path) -> None:
    rows = [{"image": f"images/{number}.jpg", "caption": f"picture {number}"} for number in range(12)]
    (photo_folder / "pairs.json").write_text(json.dumps(rows))
    source = opened(photo_folder / "pairs.json")
    loader = TrainLoader(source, Tokenizer.train(cleaned_captions(source, 30), 100), DataConfig(workers=1), 16, 4, 0)
    assert sum(len(batch) for batch in loader.batches(0)) == 6
    loader.close()
    assert loader.report.count == 6
    assert "6 samples were skipped because their image is broken:" in loader.report.lines()[0]
    assert sum("No such file or directory" in line for line in loader.report.lines()) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of private pages is Linux's")
def test_workers_do_not_copy_the_captions(tmp_path: Path, tar: Callable[..., Path], jpeg: MakeJpeg) -> None:
    stream, number = io.BytesIO(jpeg(0)), 800
    text = ("a long caption of many words that is kept whole " * 100).encode()
    members: dict[str, bytes] = {}
    for index in range(number):
        members |= {
            f"{index:06d}.jpg": stream.getvalue() + b"%d" % index,
            f"{index:06d}.txt": text + str(index).encode(),
        }
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
