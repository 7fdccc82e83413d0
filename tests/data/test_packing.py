"""Packing: what goes in comes out, whole shards or none, on after a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scene_files import scene_file
from tercet.cli import main
from tercet.config import DataConfig
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable

MakeJpeg = Callable[..., bytes]


def opened(path: Path | str) -> SampleTable:
    return open_sources([str(path)], DataConfig(), "train")


@pytest.fixture
def annotations(photo_folder: Path) -> Path:
    """Six photographs, the last one cut short, and one that is not there."""
    last = photo_folder / "images" / "5.jpg"
    last.write_bytes(last.read_bytes()[:-40])
    rows = [
        {"image": f"images/{n}.jpg", "caption": [f"é {n}", f"second {n}"][: 1 + n % 2], "image_id": n // 2}
        for n in range(7)
    ]
    (photo_folder / "pairs.json").write_text(json.dumps(rows), "utf-8")
    return photo_folder / "pairs.json"


def test_what_goes_in_comes_out(
    annotations: Path, tmp_path: Path, jpeg: MakeJpeg, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "pack", str(annotations), "--output", str(tmp_path / "out"), "--shard-size", "2", "--json"]
    assert main([*arguments, "--data.workers", "2"]) == 0
    written = capsys.readouterr()
    report = json.loads(written.out)
    assert (report["images"], report["pairs"], report["skipped"], report["shards"]) == (5, 7, 2, 4)
    assert "5.jpg: the image cannot be decoded" in written.err and "No such file or directory" in written.err
    source = opened(tmp_path / "out")
    assert [source.image(index) for index in range(5)] == [jpeg(number) for number in range(5)]
    assert [source.captions(index) for index in range(5)] == [[f"é {n}", f"second {n}"][: 1 + n % 2] for n in range(5)]
    assert source.image_ids.tolist() == [0, 0, 2, 2, 4]
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    assert main([*arguments[:4], str(tmp_path / "again"), *arguments[5:], "--data.workers", "0"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.tar")} == first


def test_resized_and_encoded_again(annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for encoding, kind in (("webp", "WEBP"), ("keep", "JPEG"), ("png", "PNG")):
        out = tmp_path / encoding
        flags = ["--resize", "20", "--encoding", encoding, "--quality", "80", "--data.workers", "0"]
        assert main(["data", "pack", str(annotations), "--output", str(out), *flags]) == 0
        source = opened(out)
        image = Image.open(io.BytesIO(source.image(0)))
        assert (image.format, image.size) == (kind, (24, 20))
    capsys.readouterr()


def test_formats_that_shards_do_not_hold_become_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.bmp")
    (tmp_path / "in" / "a.txt").write_text("noise")
    assert main(["data", "pack", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--data.workers", "0"]) == 0
    found = Image.open(io.BytesIO(opened(tmp_path / "out").image(0)))
    assert found.format == "PNG" and (np.asarray(found) == pixels).all()
    capsys.readouterr()


def test_it_goes_on_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["data", "pack", scene_file("test", 500), "--output", str(out)]
    arguments += ["--shard-size", "40", "--data.workers", "0"]
    process = subprocess.Popen([sys.executable, "-m", "tercet", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(out.glob("*_stats.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}
    assert 2 <= len(done) < 13
    (out / ".pairs-000009.tar.dead").write_bytes(b"left by the killed one")
    next(iter(done)).with_name("pairs-000000.tar").write_bytes(b"damaged since")
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["shards"], report["skipped"]) == (500, 13, 0)
    kept = [path for path, written in done.items() if path.stat().st_mtime_ns == written]
    assert len(kept) == len(done) - 1  # all but the damaged one
    assert not [path.name for path in out.iterdir() if path.name.startswith(".pairs-0")]
    assert opened(out).image_count == 500


def test_refusals(annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "pack", str(annotations), "--output", str(tmp_path / "out"), "--data.workers", "0"]
    assert main(arguments) == 0
    assert main([*arguments, "--quality", "50"]) == 2
    assert "holds a packing with another quality; choose another folder or --name" in capsys.readouterr().err
    assert main([*arguments, "--resize", "0"]) == 2
    assert main(["data", "pack", "--output", "x"]) == 2
    assert "SOURCE" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["data", "pack", str(annotations), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_two_do_not_write_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tercet.files import only_writer

    with only_writer(tmp_path, "pairs-"):
        assert main(["data", "pack", scene_file("test", 500), "--output", str(tmp_path), "--data.workers", "0"]) == 2
    assert "another process is writing into" in capsys.readouterr().err


def test_only_the_pairs_that_a_filter_kept(
    annotations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = annotations.parent
    rows = [{"image": f"{folder}/images/{n}.jpg", "caption": f"second {n}", "match": 1.0} for n in (1, 3)]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = ["--keep", str(tmp_path / "kept.jsonl"), "--data.workers", "0"]
    assert main(["data", "pack", str(annotations), "--output", str(out), *flags]) == 0
    source = opened(out)
    assert [source.captions(index) for index in range(source.image_count)] == [["second 1"], ["second 3"]]
    (tmp_path / "kept.jsonl").write_text("nonsense\n")
    assert main(["data", "pack", str(annotations), "--output", str(out), *flags]) == 2
    assert "kept.jsonl: not JSON lines" in capsys.readouterr().err
