"""Parquet and Arrow tables: every layout of the image column, read in place or from a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tercet.config import DataConfig
from tercet.data.arrow_files import read_arrow
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable
from tercet.errors import TercetError

pyarrow = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")

IMAGES = [b"first", None, b"third image", b"", b"e"] * 150
KEPT = [image for image in IMAGES if image]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path: Path | str, **data: object) -> SampleTable:
    return open_sources([str(path)], DataConfig.model_validate(data), "train")


def write_stream(table: object, path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as stream, pyarrow.ipc.new_stream(stream, table.schema) as writer:  # type: ignore[attr-defined]
        writer.write_table(table, max_chunksize=50)


WRITERS: dict[str, tuple[str, bool, Callable[[object, Path], object]]] = {
    "parquet": (".parquet", True, lambda table, path: parquet.write_table(table, path, row_group_size=100)),
    "feather": (
        ".feather",
        False,
        lambda table, path: feather.write_feather(table, path, "uncompressed", chunksize=77),
    ),
    "compressed feather": (".feather", True, lambda table, path: feather.write_feather(table, path, "lz4")),
    "stream": (".arrow", False, write_stream),
}
LAYOUTS = {
    "bytes": lambda: pyarrow.array(IMAGES, pyarrow.binary()),
    "large bytes": lambda: pyarrow.array(IMAGES, pyarrow.large_binary()),
    "struct": lambda: pyarrow.array([{"bytes": image, "path": "unused"} for image in IMAGES]),
    "null structs": lambda: pyarrow.array([{"bytes": image, "path": "x"} if image else None for image in IMAGES]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_images_in_the_table(tmp_path: Path, cache: Path, writer: str, layout: str) -> None:
    suffix, copied, write = WRITERS[writer]
    captions = [[f"caption {row}", "again"] for row in range(len(IMAGES))]
    table = pyarrow.table({"image": LAYOUTS[layout](), "caption": captions, "extra": [0] * len(IMAGES)})
    path = tmp_path / f"t{suffix}"
    write(table, path)
    for _ in range(2):  # the second time from the copy
        source = opened(path)
        assert [source.image(index) for index in range(source.image_count)] == KEPT
        assert source.captions(1) == ["caption 2", "again"]
        assert source.key(1) == f"{path}#2"
        assert len(source.rejected) == len(IMAGES) - len(KEPT)
        assert source.rejected[0] == f"{path} row 2: 'image' is empty"
        assert cache.exists() == copied


def test_images_by_path(photo_folder: Path) -> None:
    names = ["images/0.jpg", "images/1.jpg", "images/0.jpg", None]
    captions = ["a", "b", "c", "d"]
    parquet.write_table(pyarrow.table({"image": names, "caption": captions}), photo_folder / "t.parquet")
    structs = [None if name is None else {"bytes": None, "path": name} for name in names]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(structs, kind), "caption": captions})
    feather.write_feather(table, photo_folder / "t.feather")
    for file in ("t.parquet", "t.feather"):
        source = opened(photo_folder / file)
        assert [source.captions(index) for index in range(source.image_count)] == [["a", "c"], ["b"]]
        assert source.image(1) == (photo_folder / "images/1.jpg").read_bytes()
        assert list(source.rejected) == [f"{photo_folder / file} row 4: 'image' is empty"]


def test_splits_and_bad_captions(tmp_path: Path) -> None:
    columns = {"image": [b"0", b"1", b"2"], "caption": ["a", None, "c"], "split": ["train", "train", "test"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    source = opened(f"{tmp_path}/t.parquet#train")
    assert [source.image(index) for index in range(source.image_count)] == [b"0"]
    assert list(source.rejected) == [f"{tmp_path}/t.parquet row 2: no caption"]


def test_a_folder_of_tables(tmp_path: Path) -> None:
    for name in "ba":
        table = pyarrow.table({"picture": [name.encode()], "text": [f"of {name}"]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    source = opened(tmp_path, image_column="picture", caption_column="text")
    assert [source.captions(index) for index in range(2)] == [["of a"], ["of b"]]
    assert [source.image(index) for index in range(2)] == [b"a", b"b"]
    with pytest.raises(
        TercetError, match=r"no column 'image'; set data\.image_column to one of those there: picture, text"
    ):
        opened(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"image": [1, 2], "caption": ["a", "b"]}), path)
    with pytest.raises(TercetError, match="column 'image' is int64; images must be bytes, a path"):
        opened(path)
    parquet.write_table(pyarrow.table({"image": [b"%d" % n for n in range(99)], "caption": ["a"] * 99}), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TercetError, match=r"cannot read .*t\.parquet: .*it may be cut short"):
        opened(path)
    (tmp_path / "t.arrow").write_bytes(b"nonsense, not arrow at all")
    with pytest.raises(TercetError, match=r"cannot read .*t\.arrow"):
        opened(tmp_path / "t.arrow")


@pytest.mark.parametrize("by_id", [False, True])
def test_rows_of_one_image_are_one_image(tmp_path: Path, by_id: bool) -> None:
    numbers = [0, 1, 0, 1, 2] if by_id else [0, 0, 1, 1, 2]
    columns = {"image": [b"image %d" % n for n in numbers], "caption": list("abcde"), "image_id": numbers}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    source = opened(tmp_path / "t.parquet")
    wanted = [["a", "c"], ["b", "d"], ["e"]] if by_id else [["a", "b"], ["c", "d"], ["e"]]
    assert [source.captions(index) for index in range(3)] == wanted
    assert [source.image(index) for index in range(3)] == [b"image 0", b"image 1", b"image 2"]


class FakeDataset:
    """What is read of a `datasets.Dataset`."""

    split, _fingerprint = "train", "0123"

    def __init__(self, table: Any) -> None:
        self.table = table
        self.features = SimpleNamespace(arrow_schema=table.schema)

    def select_columns(self, names: list[str]) -> FakeDataset:
        return FakeDataset(self.table.select(names))

    def with_format(self, kind: str) -> FakeDataset:
        assert kind == "arrow"
        return self

    def iter(self, size: int) -> Iterator[Any]:
        return (self.table.slice(start, size) for start in range(0, len(self.table), size))


def test_a_dataset_given_in_python(cache: Path) -> None:
    table = pyarrow.table({"image": LAYOUTS["struct"](), "caption": [f"caption {n}" for n in range(len(IMAGES))]})
    source = read_arrow(FakeDataset(table), None, DataConfig())
    assert [source.image(index) for index in range(source.image_count)] == KEPT
    assert source.key(1) == "dataset train#2"
    assert cache.exists()


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table({"image": [b"x"], "caption": ["a"]}), tmp_path / "t.parquet")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "file"))
    with pytest.raises(TercetError, match="set TERCET_CACHE to a folder with room"):
        opened(tmp_path / "t.parquet")
