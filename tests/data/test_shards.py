"""Tar shards: whole ones in every tar format, cut ones, and samples that lack a part."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.config import DataConfig
from tercet.data import shards, table
from tercet.data.loader import TrainLoader, cleaned_captions
from tercet.data.order import PairOrder
from tercet.data.parts import RangePart
from tercet.data.readers import open_sources
from tercet.data.shards import index_path
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError

MakeTar = Callable[..., Path]
MakeJpeg = Callable[..., bytes]


def opened(*paths: Path | str, **data: object) -> SampleTable:
    return open_sources([str(path) for path in paths], DataConfig.model_validate(data))


def pairs(source: SampleTable) -> dict[str, list[str]]:
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
        "f.jpg": b"apart",
        "g.jpg": b"from",
        "f.txt": b"its",
        "g.txt": b"text",
    }
    source = opened(tar(tmp_path / "s.tar", members))
    assert pairs(source) == {
        "a": ["one", "two"],
        "b": ["from text  and another"],
        "c": ["the text stands in"],
        "d": ["json before text"],
        "deep/e.v2": ["dots in the key"],
        "f": ["its"],
        "g": ["text"],
    }
    assert [source.image(index) for index in range(7)] == [
        jpeg(1),
        b"png bytes",
        b"webp bytes",
        jpeg(4),
        jpeg(5),
        b"apart",
        b"from",
    ]
    assert not source.rejected


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(tmp_path: Path, tar: MakeTar, kind: int) -> None:
    long = "d" * 60 + "/" + "k" * 90
    members = {f"./{long}.jpg": b"image", f"./{long}.txt": b"caption"}
    if kind != tarfile.USTAR_FORMAT:
        members |= {"naïve" + "é" * 120 + ".jpg": b"2", "naïve" + "é" * 120 + ".txt": b"second"}
    source = opened(tar(tmp_path / "s.tar", members, kind))
    assert list(pairs(source)) == [long, "naïve" + "é" * 120][: len(members) // 2]
    assert source.image(0) == b"image"


def test_rows_of_one_image_are_one_image(tmp_path: Path, tar: MakeTar, jpeg: MakeJpeg) -> None:
    members: dict[str, bytes] = {}
    for number in range(9):
        members |= {f"{number}.jpg": jpeg(number // 3), f"{number}.txt": b"caption %d" % number}
    members |= {"other.jpg": jpeg(1), "other.json": record("elsewhere", split="test")}
    source = opened(f"{tar(tmp_path / 's.tar', members)}#all")
    assert source.caption_counts.tolist() == [3, 3, 3, 1]  # a row of another split stays apart
    assert source.captions(1) == ["caption 3", "caption 4", "caption 5"]
    assert source.key(1).endswith("#3") and source.image(1) == jpeg(1)


@pytest.mark.parametrize("field", ["size", "name"])
def test_forged_headers_neither_loop_nor_fill_the_memory(tmp_path: Path, tar: MakeTar, field: str) -> None:
    """A negative size leads back to what was read; a long name of gigabytes is read whole by `tarfile` alone."""
    path = tar(tmp_path / "s.tar", {"0.jpg": b"x", "0.txt": b"first"})
    with tarfile.open(path, "a") as tape:
        info = tarfile.TarInfo("1.jpg")
        info.pax_headers = {"size": "-1536"} if field == "size" else {}
        tape.addfile(info)
    if field == "name":
        data = bytearray(path.read_bytes())
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
        path.write_bytes(bytes(data[:2048]) + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    source = opened(path)
    assert pairs(source) == {"0": ["first"]}


def test_samples_that_lack_a_part_are_rejected(tmp_path: Path, tar: MakeTar, jpeg: MakeJpeg) -> None:
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
    reasons = {message.removeprefix(f"{path}#").split(":")[0]: message for message in source.rejected}
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
        complete = sum(limit <= end for limit in ends)
        source = opened(path)
        assert [source.captions(index) for index in range(source.image_count)] == [
            [f"caption {number}"] for number in range(complete)
        ]
        assert source.image(complete - 1) == jpeg(complete - 1)
        assert len(source.rejected) == 1
        assert source.rejected[0].startswith(f"{path}: cut short at byte {end}, ")
        assert f"; the {complete} samples before that are used, what followed is lost" in source.rejected[0]
    path.write_bytes(whole[: ends[0] - 10])
    with pytest.raises(
        TercetError, match=r"no image with a caption found; .*1 rejected, the first: .*cut short at byte"
    ):
        opened(path)


def test_a_damaged_header_ends_a_shard(tmp_path: Path, tar: MakeTar) -> None:
    members = {f"{n}.{part}": b"x%d" % n for n in range(3) for part in ("jpg", "txt")}
    path = tar(tmp_path / "s.tar", members)
    data = bytearray(path.read_bytes())
    data[4 * 1024 + 3] ^= 0xFF
    path.write_bytes(data)
    source = opened(path)
    assert list(pairs(source)) == ["0", "1"]
    assert list(source.rejected) == [
        f"{path}: not a tar header at byte 4096, after 1.txt; the 2 samples before that are used, what followed is lost"
    ]


def test_one_bad_shard_among_good_ones(tmp_path: Path, tar: MakeTar) -> None:
    for name in "ab":
        tar(tmp_path / f"{name}.tar", {"k.jpg": name.encode(), "k.txt": name.encode()})
    (tmp_path / "c.tar").write_bytes(b"\1" * 2000)
    source = opened(tmp_path)
    assert [source.image(index) for index in range(source.image_count)] == [b"a", b"b"]
    assert [source.key(index) for index in range(2)] == [f"{tmp_path}/a.tar#k", f"{tmp_path}/b.tar#k"]
    assert "c.tar: not a tar header at byte 0, after its start (invalid header); the 0 samples" in source.rejected[0]


def test_compressed_and_missing_shards(tmp_path: Path, tar: MakeTar) -> None:
    plain = tar(tmp_path / "a.tar", {"k.jpg": b"x", "k.txt": b"y"})
    (tmp_path / "z.tar").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(TercetError, match=r"z\.tar: compressed; unpack it first"):
        opened(tmp_path / "z.tar")
    with pytest.raises(TercetError, match=r"no file .*a-0\.tar; did you mean .*a\.tar"):
        opened(tmp_path / "a-{0..1}.tar")


def contents(source: SampleTable) -> list[tuple[str, list[str], bytes]]:
    return [(source.key(i), source.captions(i), source.image(i)) for i in range(source.image_count)]


def members(numbers: range, size: int = 50) -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for number in numbers:
        record = {"caption": [f"caption {number}", f"other {number}"][: 1 + number % 2]}
        made |= {f"{number:04d}.jpg": bytes([number % 256]) * size, f"{number:04d}.json": json.dumps(record).encode()}
    return made


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes walking a shard an error."""
    return lambda: monkeypatch.setattr(shards, "read_shard", lambda *_: pytest.fail("walked a shard again"))


def test_an_index_is_made_once(tmp_path: Path, tar: MakeTar, no_walk: Callable[[], None]) -> None:
    path = tar(tmp_path / "a.tar", {**members(range(7)), "x.txt": b"no image"})
    first = opened(path)
    assert (tmp_path / "a.tar.index").is_file()
    no_walk()
    second = opened(path)
    assert contents(second) == contents(first)
    assert second.image_count == 7
    assert second.caption_counts.tolist() == [1, 2, 1, 2, 1, 2, 1]
    assert list(second.rejected) == list(first.rejected) == [f"{path}#x: no image; there are .txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "a.tar.index"]


def test_a_moved_shard_keeps_its_index(tmp_path: Path, tar: MakeTar, no_walk: Callable[[], None]) -> None:
    opened(tar(tmp_path / "a.tar", members(range(3)) | {"x.txt": b"no image"}))
    shutil.move(tmp_path, moved := tmp_path.with_name(tmp_path.name + "-moved"))
    no_walk()
    source = opened(moved / "a.tar")
    assert source.key(1) == f"{moved}/a.tar#0001"
    assert source.rejected[0].startswith(f"{moved}/a.tar#x")


def test_a_changed_shard_and_other_settings_rebuild_the_index(tmp_path: Path, tar: MakeTar) -> None:
    path = tar(tmp_path / "a.tar", members(range(3)))
    assert opened(path).image_count == 3
    tar(path, members(range(5)))
    assert opened(path).image_count == 5
    tar(path, {"k.jpg": b"x", "k.json": b'{"text": "other column"}'})
    with pytest.raises(TercetError, match=r"no 'caption'; the keys of its \.json are text"):
        opened(path)
    assert opened(path, caption_column="text").captions(0) == ["other column"]


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "noise", "header"])
def test_a_damaged_index_is_rebuilt(tmp_path: Path, tar: MakeTar, damage: str) -> None:
    path = tar(tmp_path / "a.tar", members(range(4)))
    wanted = contents(opened(path))
    index = tmp_path / "a.tar.index"
    data = index.read_bytes()
    index.write_bytes(
        {
            "empty": b"",
            "cut": data[:-64],
            "longer": data + bytes(64),
            "noise": os.urandom(len(data)),
            "header": data.replace(b'"images": 4', b'"images": 9'),
        }[damage]
    )
    assert contents(opened(path)) == wanted
    assert index.read_bytes() == data


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_no_damaged_byte_of_an_index_ends_in_another_error(
    tmp_path: Path, tar: MakeTar, position: int, value: int
) -> None:
    path = tmp_path / "a.tar"
    index = tmp_path / "a.tar.index"
    if not path.exists():
        tar(path, members(range(4)))
        opened(path)
        shutil.copy(index, tmp_path / "whole")
    data = bytearray((tmp_path / "whole").read_bytes())
    data[position % len(data)] = value
    index.write_bytes(data)
    try:
        source = opened(path)
        for row in range(source.image_count):
            source.captions(row), source.image(row)
    except TercetError as error:
        assert "a.tar" in str(error)


def test_a_read_only_folder_is_left_alone(tmp_path: Path, tar: MakeTar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = tar(tmp_path / "data" / "a.tar", members(range(3)))
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert opened(path).image_count == 3
        assert [file.name for file in path.parent.iterdir()] == ["a.tar"]
        assert index_path(str(path)).is_file() and index_path(str(path)).parent == tmp_path / "cache" / "indexes"
    finally:
        path.parent.chmod(stat.S_IRWXU)


def test_a_shard_cut_short_under_a_run_is_named(tmp_path: Path, tar: MakeTar) -> None:
    path = tar(tmp_path / "a.tar", members(range(6), 3000))
    source = opened(path)
    whole = source.image(0)
    os.truncate(path, 3 * 4608 + 100)
    assert source.image(0) == whole
    with pytest.raises(TercetError, match=r"a\.tar has changed since it was indexed: it was cut short to 13924 bytes"):
        source.image(5)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(TercetError, match=r"no file .*a\.tar"):
        pickle.loads(pickle.dumps(source)).image(0)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shard_replaced_under_a_run_is_named(tmp_path: Path, tar: MakeTar, in_place: bool) -> None:
    path = tar(tmp_path / "a.tar", members(range(6)))
    source = opened(path)
    before = source.image(2)
    other = tar(tmp_path / "b.tar", {"longer-name.jpg": b"y" * 700, **members(range(10, 16))}).read_bytes()
    times = path.stat()
    if in_place:
        path.write_bytes(other)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # its time stays the same too
        with pytest.raises(TercetError, match=r"has changed since it was indexed: byte \d+ holds something else"):
            source.image(2)
    else:
        (tmp_path / "b.tar").replace(path)
        assert source.image(2) == before  # the handle still has the old file
        with pytest.raises(TercetError, match=r"has changed since it was indexed"):
            pickle.loads(pickle.dumps(source)).image(2)


def test_an_index_of_the_same_shard_that_another_run_wrote_too_is_read_on(tmp_path: Path, tar: MakeTar) -> None:
    path = tar(tmp_path / "a.tar", members(range(6)))
    source = opened(path)
    captions, waiting = [source.captions(row) for row in range(6)], pickle.dumps(source)
    Path(f"{path}.index").unlink()
    opened(path)
    again = pickle.loads(waiting)
    assert [again.captions(row) for row in range(6)] == captions
    assert again.image(2) == source.image(2)


def test_an_index_rebuilt_during_a_run_is_noticed(tmp_path: Path, tar: MakeTar) -> None:
    path = tar(tmp_path / "a.tar", members(range(6)))
    old = pickle.dumps(opened(path))
    tar(path, members(range(20, 33)))
    opened(path)
    with pytest.raises(TercetError, match="has changed, as its shard has"):
        pickle.loads(old).captions(0)


def test_a_run_skips_a_shard_that_is_lost_during_it(tmp_path: Path, tar: MakeTar, jpeg: MakeJpeg) -> None:
    for name, start in (("a", 0), ("b", 10)):
        numbers = range(start, start + 10)
        made = [(f"{n}.jpg", jpeg(n)) for n in numbers] + [(f"{n}.txt", b"picture %d" % n) for n in numbers]
        tar(tmp_path / f"{name}.tar", made)
    source = opened(tmp_path)
    tokenizer = Tokenizer.train(cleaned_captions(source, 30), 200)
    loader = TrainLoader(source, tokenizer, DataConfig(workers=2), 16, 5, 0)
    os.truncate(tmp_path / "b.tar", 700)
    keys = [key.rpartition("#")[2] for batch in loader.batches(0) for key in batch.keys]
    loader.close()
    assert sorted(map(int, keys)) == list(range(10))
    assert loader.report.count == 10
    assert all("b.tar has changed since it was indexed" in message for message in loader.report.messages)


def test_splits_and_ids_over_several_shards(tmp_path: Path, tar: MakeTar, no_walk: Callable[[], None]) -> None:
    for shard in range(2):
        made: dict[str, bytes] = {}
        for number in range(4):
            record = {"caption": "c", "split": ["train", "val"][number % 2], "image_id": number // 2}
            made |= {f"{number}.jpg": b"x%d" % number, f"{number}.json": json.dumps(record).encode()}
        tar(tmp_path / f"{shard}.tar", made | {"none.jpg": b"y", "none.txt": b"z"})
    with pytest.raises(TercetError, match=rf"^{tmp_path} holds several splits.*choose one, as in {tmp_path}#"):
        opened(tmp_path)
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    shutil.copy(tmp_path / "0.tar", tmp_path / "outer" / "inner")
    with pytest.raises(TercetError, match=rf"shards lie in {tmp_path}/outer/inner: name that folder"):
        opened(tmp_path / "outer")
    no_walk()
    train = opened(f"{tmp_path}/*.tar#train")
    assert [train.key(index)[-7:] for index in range(4)] == ["0.tar#0", "0.tar#2", "1.tar#0", "1.tar#2"]
    assert train.image_ids.tolist() == [0, 1, 0, 1]
    everything = opened(f"{tmp_path}/*.tar#all")
    assert everything.image_ids.tolist() == [0, 0, 2, 2, 4, 0, 0, 2, 2, 9]
    with pytest.raises(TercetError, match=r"no row of split 'test'; the splits there are .*train \(4\), val \(4\)"):
        opened(f"{tmp_path}/*.tar#test")


def test_a_training_moves_the_disk_once_a_block(tmp_path: Path, tar: MakeTar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RangePart, "block_size", 20)
    for shard in range(8):
        tar(tmp_path / f"{shard}.tar", members(range(100 * shard, 100 * shard + 100)))
    source = opened(tmp_path)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, offset, length, advice: asked.append((offset, length)))
    order = PairOrder(source.caption_counts, 16, 3, block_size=source.block_size)
    reads = 0
    for step in range(order.steps_per_epoch):
        for image in order.step_indices(0, step).images.tolist():
            assert len(source.image(image)) == 50
            reads += 1
    assert reads == 800
    assert source.read_aheads == len(asked) == 40  # every block once: 95 % of the reads find what was read ahead
    # A sample takes four blocks of 512 bytes; the last image of a block of samples ends 1,486 bytes before them.
    assert {length for _, length in asked} == {20 * 2048 - 1486}


def test_many_shards_need_few_handles(tmp_path: Path, tar: MakeTar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "OPEN_FILES", 3)
    for shard in range(12):
        tar(tmp_path / f"{shard:02d}.tar", members(range(2 * shard, 2 * shard + 2)))
    source = opened(tmp_path)
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.is_dir() else 0
    for index in np.random.default_rng(0).permutation(24).tolist():
        assert source.image(index) == bytes([index]) * 50
        assert source.captions(index)[0] == f"caption {index}"
    if before:
        assert len(list(handles.iterdir())) <= before + 3
