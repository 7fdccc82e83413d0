"""Tables: which specifications name what, and how several become one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tercet.config import DataConfig
from tercet.data.readers import expand_braces, open_sources
from tercet.data.rows import Rejected
from tercet.data.table import SampleTable, concatenate
from tercet.data.workers import _Calls
from tercet.errors import TercetError

DATA = DataConfig()


def write_list(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def all_pairs(source: SampleTable) -> list[tuple[str, list[str]]]:
    return [(source.key(index), source.captions(index)) for index in range(source.image_count)]


def test_braces() -> None:
    assert expand_braces("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand_braces("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert expand_braces("plain.json") == ["plain.json"]
    with pytest.raises(TercetError, match=r"the range \{5\.\.2\} is empty"):
        expand_braces("a-{5..2}.tar")


def test_several_specifications_are_one_source(photo_folder: Path, jpeg: Callable[..., bytes]) -> None:
    first = write_list(
        photo_folder / "a.json", [{"image": f"images/{n}.jpg", "caption": [f"a {n}", "b"]} for n in (0, 1)]
    )
    second = write_list(photo_folder / "b.json", [{"image": "images/5.jpg", "caption": "five"}, {"image": "x.jpg"}])
    source = open_sources([first, second], DATA)
    assert source.image_count == 3
    assert source.caption_counts.tolist() == [2, 2, 1]
    assert [source.image(index) for index in range(3)] == [jpeg(0), jpeg(1), jpeg(5)]
    assert all_pairs(source)[2] == ("images/5.jpg", ["five"])
    assert source.image_ids.tolist() == [0, 1, 2]
    assert len(source.rejected) == 1
    assert "b.json row 2: no 'caption'" in source.rejected[0]


def test_a_glob_opens_its_files_in_order(photo_folder: Path) -> None:
    for name in ("b", "a", "c"):
        write_list(photo_folder / f"{name}.json", [{"image": "images/0.jpg", "caption": f"of {name}"}])
    source = open_sources([str(photo_folder / "[ab].json")], DATA)
    assert [captions for _, captions in all_pairs(source)] == [["of a"], ["of b"]]
    with pytest.raises(TercetError, match=r"no file matches .*z\*\.json"):
        open_sources([str(photo_folder / "z*.json")], DATA)


def test_split_suffix(photo_folder: Path) -> None:
    splits = ["train", "val", "test", "restval"]
    rows = [{"image": f"images/{n}.jpg", "caption": f"c {n}", "split": split} for n, split in enumerate(splits)]
    file = write_list(photo_folder / "all.json", rows)

    def keys(spec: str) -> list[str]:
        return [key for key, _ in all_pairs(open_sources([spec], DATA))]

    assert keys(f"{file}#test") == ["images/2.jpg"]
    assert keys(f"{file}#validation") == ["images/1.jpg"]
    assert keys(f"{file}#train+restval") == ["images/0.jpg", "images/3.jpg"]
    assert len(keys(f"{file}#all")) == 4
    with pytest.raises(TercetError, match=r"no row of split 'tset'; the splits there are train \(1\), val \(1\)"):
        keys(f"{file}#tset")
    with pytest.raises(TercetError, match=r"holds several splits.*choose one, as in .*all.json#train"):
        keys(file)


def test_a_file_may_have_a_hash_in_its_name(photo_folder: Path) -> None:
    file = write_list(photo_folder / "c#1.json", [{"image": "images/0.jpg", "caption": "one"}])
    assert open_sources([file], DATA).image_count == 1


def test_missing_files_are_named_with_the_nearest(photo_folder: Path) -> None:
    write_list(photo_folder / "captions.json", [])
    with pytest.raises(TercetError, match=r"no file .*caption\.json; did you mean .*captions\.json\?"):
        open_sources([str(photo_folder / "caption.json")], DATA)
    with pytest.raises(TercetError, match=r"there is no folder .*nowhere"):
        open_sources([str(photo_folder / "nowhere" / "x.json")], DATA)
    with pytest.raises(TercetError, match="no data given"):
        open_sources([], DATA)
    (photo_folder / "notes.docx").write_bytes(b"x")
    with pytest.raises(TercetError, match=r"notes\.docx: not a kind of file that is known; known are \.arrow"):
        open_sources([str(photo_folder / "notes.docx")], DATA)


def test_sources_pickle(photo_folder: Path, tar: Callable[..., Path], jpeg: Callable[..., bytes]) -> None:
    file = write_list(photo_folder / "a.json", [{"image": "images/0.jpg", "caption": "zero"}])
    shard = tar(photo_folder / "s.tar", {"k.jpg": jpeg(9), "k.txt": b"nine"})
    source = open_sources([file, str(shard)], DATA)
    assert source.image(1) == jpeg(9)  # opens the shard
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.image(index) for index in range(2)] == [source.image(index) for index in range(2)]
    assert all_pairs(copy) == all_pairs(source)


def test_large_sets_pickle_small_and_spawned_workers_map_the_columns(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"x")
    rows = 20_000
    lines = [json.dumps({"image": f"{n}.jpg", "caption": f"caption number {n}"}) for n in range(rows)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = open_sources([str(tmp_path / "a.jsonl")], DATA)
    assert len(pickle.dumps(source)) < rows * 100
    assert source.captions(rows - 1) == [f"caption number {rows - 1}"]
    calls = _Calls(source.captions)  # its file lasts as long as it does
    sent = pickle.dumps(calls)
    assert len(sent) < 5000
    assert pickle.loads(sent)[4321] == ["caption number 4321"]


def test_joined_tables_keep_ids_apart_and_ask_for_blocks(tmp_path: Path, tar: Callable[..., Path]) -> None:
    def shard(name: str) -> SampleTable:
        members: dict[str, bytes] = {}
        for n in range(2):
            members |= {f"{n}.jpg": b"image %d" % n, f"{n}.json": b'{"caption": "c", "image_id": "same"}'}
        return open_sources([str(tar(tmp_path / name, members))], DATA)

    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "0.jpg").write_bytes(b"x")
    (tmp_path / "f" / "0.txt").write_text("x")
    joined = concatenate([shard("a.tar"), shard("b.tar"), open_sources([str(tmp_path / "f")], DATA)])
    assert joined.image_ids.tolist() == [0, 0, 2, 2, 4]
    assert joined.block_size > 1
    assert joined.parts[2].block_size == 1
    assert joined.find(4) == (2, 0)


def test_rejected_rows_count_all_and_keep_the_first() -> None:
    rejected, more = Rejected(), Rejected()
    for number in range(1500):
        rejected.add(f"row {number}")
    more.add("first")
    more.extend(rejected)
    assert len(more) == 1501
    assert len(list(more)) == 1000
    assert more.lines(2) == ["first", "row 0", "and 1499 more"]


def test_noto_emoji_shards(data_dir: Path) -> None:
    folder = data_dir / "noto_emoji" / "shards"
    source = open_sources([str(folder / "noto_emoji-{val,test}-000000.tar") + "#all"], DATA)
    assert source.image_count == 367 + 294
    assert not source.rejected
    assert source.image(0).startswith(b"\x89PNG")
    with pytest.raises(TercetError, match="holds several splits"):
        open_sources([str(folder)], DATA)


def test_flickr8k_shards(data_dir: Path) -> None:
    source = open_sources(
        [str(data_dir / "flickr8k" / "shards" / "flickr8k-train-{000000..000005}.tar")], DATA, "train"
    )
    assert source.image_count == 5999
    assert np.array_equal(source.caption_counts, np.full(5999, 5))
    assert not source.rejected
    rows = {
        row["image"].split("/")[1][:-4]: row for row in json.loads((data_dir / "flickr8k/flickr8k.json").read_text())
    }
    for index in (0, 1234, 5998):
        row = rows[source.key(index).rpartition("#")[2]]
        assert source.captions(index) == row["caption"]
        assert source.image(index).startswith(b"\xff\xd8")
        assert source.image(index).endswith(b"\xff\xd9")
