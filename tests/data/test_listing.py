"""Images alone, from every source: each is listed with its location, and read from there."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tercet.data.listing import ListedImage, find_images, lies_under, read_image
from tercet.data.rows import Rejected
from tercet.errors import TercetError


def png(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), colour, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def listed(*specs: object) -> tuple[list[ListedImage], Rejected]:
    problems = Rejected()
    return list(find_images([str(spec) for spec in specs], problems)), problems


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", ".hidden.png", "sub/c.webp", ".git/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "b.txt").write_text("\n  a caption \nanother\n")
    images, problems = listed(tmp_path)
    assert [image.uri for image in images] == [str(tmp_path / name) for name in ("a.JPG", "b.png", "sub/c.webp")]
    assert [image.caption for image in images] == [None, "a caption", None] and not len(problems)
    state = (tmp_path / "b.png").stat()
    assert (images[1].size, images[1].modified) == (state.st_size, state.st_mtime_ns // 1000)
    assert read_image(images[1].uri) == png(1)


def test_shards(tmp_path: Path, tar: Callable[..., Path]) -> None:
    members = {"x/1.png": png(1), "x/1.json": json.dumps({"caption": ["one", "ein"]}).encode(), "2.jpg": png(2)}
    tar(tmp_path / "s-0.tar", members | {"2.txt": b"two\n", "3.json": b"{}"})
    tar(tmp_path / "s-1.tar", {"4.png": png(4), "4.json": b"{broken"})
    for spec in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{0..1}.tar"):
        images, _ = listed(spec)
        assert [image.uri.rpartition("/")[2] for image in images] == ["1", "s-0.tar#2", "s-1.tar#4"]
        assert [image.caption for image in images] == ["one", "two", None]
        assert [read_image(image.uri, image.size, image.offset) for image in images] == [png(1), png(2), png(4)]
    with pytest.raises(TercetError, match="takes shards and tables whole, not split 'test'"):
        listed(f"{tmp_path}#test")
    whole = (tmp_path / "s-0.tar").read_bytes()
    (tmp_path / "s-0.tar").write_bytes(whole[: 512 + 512])
    images, problems = listed(tmp_path / "s-0.tar")
    assert len(images) == 1 and len(problems) == 1 and "cut short" in problems[0]
    (tmp_path / "s-1.tar").write_bytes(b"")
    with pytest.raises(TercetError, match="shorter than when it was indexed"):
        read_image(f"{tmp_path}/s-1.tar#4", 50, 512)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_tables(suffix: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "1.png").write_bytes(png(1))
    images: list = [png(1), None, png(3)]
    if form == "struct":
        images = [{"bytes": data, "path": None} for data in images]
    elif form == "path":
        images = ["1.png", None, "1.png"]
    table = pa.table({"image": images, "caption": ["one", "none", None]})
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    found, problems = listed(path)
    assert "row 2" in problems[0]
    if form == "path":  # two rows of one file
        assert [(image.caption, read_image(image.uri)) for image in found] == [("one", png(1))]
    else:
        assert [image.caption for image in found] == ["one", None]
        assert [read_image(image.uri, image.size, image.offset) for image in found] == [png(1), png(3)]
        assert [image.uri for image in found] == [f"{path}#0", f"{path}#2"]


def test_a_table_without_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    pyarrow.parquet.write_table(pa.table({"image": [png(1), png(2)]}), tmp_path / "t.parquet")
    found, _ = listed(tmp_path / "t.parquet")
    assert [read_image(image.uri, image.size, image.offset) for image in found] == [png(1), png(2)]
    pyarrow.parquet.write_table(pa.table({"picture": [png(1)]}), tmp_path / "t.parquet")
    with pytest.raises(TercetError, match="no column 'image'"):
        listed(tmp_path / "t.parquet")


def test_annotations_urls_and_single_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(png(1))
    rows = [{"image": "images/1.png", "caption": ["one", "ein"]}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    url = f"file://{tmp_path}/images/1.png"
    images, _ = listed(tmp_path / "pairs.json", url, tmp_path / "images/1.png")
    assert [image.uri for image in images] == [str(tmp_path / "images/1.png"), url, str(tmp_path / "images/1.png")]
    assert [image.caption for image in images] == ["one", None, None]
    assert all(read_image(image.uri) == png(1) for image in images)


@pytest.mark.parametrize(
    ("spec", "message"), [("none", "no file none"), ("empty", "no image found"), ("n*.tar", "no file matches")]
)
def test_nothing_there(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TercetError, match=message.replace("*", r"\*")):
        listed(spec)


def test_what_lies_under_a_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    cases = {
        "folder": (["folder/a.png", "folder/b/c.tar#4"], ["folder2/a.png", "a.png"]),
        "s.tar": (["s.tar#x/1"], ["s.tar2#1", "t.tar#1"]),
        "s-{0..2}.tar": (["s-1.tar#4"], ["s-3.tar#4"]),
        "d/*.tar": (["d/x.tar#1"], ["d/e/x.tar#1", "x.tar#1"]),
        "d/**/*.png": (["d/e/f/x.png"], ["e/x.png"]),
        "x[0-9].png": (["x3.png"], ["xa.png"]),
    }
    for spec, (inside, outside) in cases.items():
        pattern = lies_under(spec)
        assert all(pattern.fullmatch(str(tmp_path / name)) for name in inside), spec
        assert not any(pattern.fullmatch(str(tmp_path / name)) for name in outside), spec
    assert lies_under("s3://b/x.tar").fullmatch("s3://b/x.tar#key")
