"""Tar shards: whole ones in every dialect, cut ones, and samples that lack a part."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tercet.config import DataConfig
from tercet.data.shards import CutShortError, walk
from tercet.data.sources import Source, image_ids, open_sources
from tercet.errors import TercetError

MakeTar = Callable[..., Path]
MakeJpeg = Callable[..., bytes]


def opened(path: Path | str, **data: object) -> Source:
    return open_sources([str(path)], DataConfig.model_validate(data), "train")


def pairs(source: Source) -> dict[str, list[str]]:
    return {source.key(index).rpartition("#")[2]: source.captions(index) for index in range(source.image_count)}


def record(caption: object, **more: object) -> bytes:
    return json.dumps({"caption": caption, **more}).encode()


def test_layouts_of_a_sample(tmp_path: Path, tar: MakeTar, jpeg: MakeJpeg) -> None:
    members = {
        "a.jpg": jpeg(1),
        "a.json": record(["one", "two"]),
        "b.txt": b"from text\n\nand another\n",
        "b.PNG": b"png bytes",
        "c.webp": b"webp bytes",
        "c.json": record(None),
        "c.txt": b"the text stands in",
        "d.jpeg": jpeg(4),
        "d.json": record("json before text"),
        "d.txt": b"unused",
        "deep/e.v2.jpg": jpeg(5),
        "deep/e.v2.txt": b"dots in the key",
        "._a.jpg": b"what a Mac leaves behind",
    }
    source = opened(tar(tmp_path / "s.tar", members))
    assert pairs(source) == {
        "a": ["one", "two"],
        "b": ["from text", "and another"],
        "c": ["the text stands in"],
        "d": ["json before text"],
        "deep/e.v2": ["dots in the key"],
    }
    assert [source.image(index) for index in range(5)] == [jpeg(1), b"png bytes", b"webp bytes", jpeg(4), jpeg(5)]
    assert not source.problems


def test_parts_need_not_be_neighbours(tmp_path: Path, tar: MakeTar) -> None:
    members = {f"{n}.{part}": f"{part} {n}".encode() for part in ("jpg", "txt") for n in range(3)}
    source = opened(tar(tmp_path / "s.tar", members))
    assert pairs(source) == {"0": ["txt 0"], "1": ["txt 1"], "2": ["txt 2"]}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_dialects_and_long_names(tmp_path: Path, tar: MakeTar, kind: int) -> None:
    long = "d" * 60 + "/" + "k" * 90
    members = {f"./{long}.jpg": b"image", f"./{long}.txt": b"caption"}
    if kind != tarfile.USTAR_FORMAT:
        members |= {"naïve" + "é" * 120 + ".jpg": b"2", "naïve" + "é" * 120 + ".txt": b"second"}
    source = opened(tar(tmp_path / "s.tar", members, kind))
    assert list(pairs(source)) == [long, "naïve" + "é" * 120][: len(members) // 2]
    assert source.image(0) == b"image"


def test_walk_agrees_with_tarfile(data_dir: Path) -> None:
    path = data_dir / "flickr8k" / "shards" / "flickr8k-val-000000.tar"
    with tarfile.open(path) as whole:
        wanted = [(member.name, member.offset_data, member.size) for member in whole.getmembers()]
    handle = os.open(path, os.O_RDONLY)
    found = [(member.name, member.offset, member.size) for member in walk(handle)]
    os.close(handle)
    assert found == wanted


def test_samples_that_lack_a_part_are_refused(tmp_path: Path, tar: MakeTar, jpeg: MakeJpeg) -> None:
    members = [
        ("good.jpg", jpeg(0)),
        ("good.txt", b"good"),
        ("alone.jpg", jpeg(1)),
        ("text.txt", b"no image"),
        ("broken.jpg", jpeg(2)),
        ("broken.json", b'{"caption": "cut'),
        ("list.jpg", jpeg(3)),
        ("list.json", b"[1]"),
        ("other.jpg", jpeg(4)),
        ("other.json", b'{"text": "x"}'),
        ("empty.jpg", jpeg(5)),
        ("empty.txt", b"  \n"),
        ("latin.jpg", jpeg(6)),
        ("latin.txt", b"caf\xe9"),
        ("good.jpg", jpeg(7)),
        ("number.jpg", jpeg(8)),
        ("number.json", record(3)),
    ]
    path = tar(tmp_path / "s.tar", members)
    source = opened(path)
    assert pairs(source) == {"good": ["good"]}
    assert source.image(0) == jpeg(0)
    reasons = {message.removeprefix(f"{path}#").split(":")[0]: message for message in source.problems}
    assert list(reasons) == [
        "good",
        "alone",
        "text",
        "broken.json",
        "list.json",
        "other",
        "empty",
        "latin.txt",
        "number",
    ]
    assert "a second .jpg of the same key; the first is used" in reasons["good"]
    assert "no image; there are .txt" in reasons["text"]
    assert "not JSON" in reasons["broken.json"]
    assert "no 'caption'; the keys of its .json are text" in reasons["other"]
    assert "not text" in reasons["number"]


def test_split_and_image_id(tmp_path: Path, tar: MakeTar) -> None:
    members: dict[str, bytes] = {}
    for number, split in enumerate(["train", "test", "train"]):
        members |= {f"{number}.jpg": b"x", f"{number}.json": record("c", split=split, image_id=7)}
    path = tar(tmp_path / "s.tar", members)
    source = opened(f"{path}#train")
    assert list(pairs(source)) == ["0", "2"]
    assert image_ids(source).tolist() == [0, 0]
    with pytest.raises(TercetError, match="holds several splits"):
        opened(path)


def test_a_cut_shard_gives_what_is_before_the_cut(tmp_path: Path, tar: MakeTar, jpeg: MakeJpeg) -> None:
    members: dict[str, bytes] = {}
    for number in range(6):
        members |= {f"{number}.jpg": jpeg(number), f"{number}.json": record(f"caption {number}")}
    whole = tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tape:
        infos = tape.getmembers()
    ends = [infos[index].offset_data + infos[index].size for index in range(1, 12, 2)]
    path = tmp_path / "cut.tar"
    for end in range(ends[0], ends[-1] + 512, 331):
        path.write_bytes(whole[:end])
        complete = sum(place <= end for place in ends)
        source = opened(path)
        assert [source.captions(index) for index in range(source.image_count)] == [
            [f"caption {number}"] for number in range(complete)
        ]
        assert source.image(complete - 1) == jpeg(complete - 1)
        assert len(source.problems) == 1
        assert source.problems[0].startswith(f"{path}: cut short at byte {end}, ")
        assert f"; the {complete} samples before that are used, what followed is lost" in source.problems[0]
    path.write_bytes(whole[: ends[0] - 10])
    with pytest.raises(
        TercetError, match=r"no image with a caption found; .*1 refused, the first: .*cut short at byte"
    ):
        opened(path)


def test_a_damaged_header_ends_a_shard(tmp_path: Path, tar: MakeTar) -> None:
    members = {f"{n}.{part}": b"x" for n in range(3) for part in ("jpg", "txt")}
    path = tar(tmp_path / "s.tar", members)
    data = bytearray(path.read_bytes())
    data[4 * 1024 + 3] ^= 0xFF
    path.write_bytes(data)
    source = opened(path)
    assert list(pairs(source)) == ["0", "1"]
    assert list(source.problems) == [
        f"{path}: not a tar header at byte 4096, after 1.txt; the 2 samples before that are used, what followed is lost"
    ]


def test_one_bad_shard_among_good_ones(tmp_path: Path, tar: MakeTar) -> None:
    for name in "ab":
        tar(tmp_path / f"{name}.tar", {"k.jpg": name.encode(), "k.txt": name.encode()})
    (tmp_path / "c.tar").write_bytes(b"\1" * 2000)
    source = opened(tmp_path)
    assert [source.image(index) for index in range(source.image_count)] == [b"a", b"b"]
    assert [source.key(index) for index in range(2)] == [f"{tmp_path}/a.tar#k", f"{tmp_path}/b.tar#k"]
    assert "c.tar: not a tar header at byte 0, after its start; the 0 samples" in source.problems[0]


def test_compressed_and_missing_shards(tmp_path: Path, tar: MakeTar) -> None:
    plain = tar(tmp_path / "a.tar", {"k.jpg": b"x", "k.txt": b"y"})
    (tmp_path / "z.tar").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(TercetError, match=r"z\.tar: compressed; unpack it first"):
        opened(tmp_path / "z.tar")
    with pytest.raises(TercetError, match=r"no file .*a-0\.tar; did you mean .*a\.tar"):
        opened(tmp_path / "a-{0..1}.tar")


def test_walk_rejects_a_damaged_extended_header(tmp_path: Path, tar: MakeTar) -> None:
    path = tar(tmp_path / "a.tar", {"é" * 120 + ".jpg": b"x"}, tarfile.PAX_FORMAT)
    data = bytearray(path.read_bytes())
    data[512:515] = b"zzz"
    path.write_bytes(data)
    handle = os.open(path, os.O_RDONLY)
    with pytest.raises(CutShortError, match="damaged extended header"):
        list(walk(handle))
    os.close(handle)
