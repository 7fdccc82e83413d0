"""Indexing: what comes into the table, what is done again the next time, and what is left out."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.search.building import IndexReport, build_index
from tercet.search.index import Index
from tiny_model import SCENES, TEXTS


def build(model: Tercet, path: Path, *specs: object) -> tuple[Index, IndexReport]:
    return build_index([str(spec) for spec in specs], model, "a/model", str(path))


def counts(report: IndexReport) -> tuple[int, int, int, int, int]:
    return report.added, report.changed, report.unchanged, report.removed, len(report.broken)


def by_name(index: Index) -> dict[str, dict]:
    return {Path(row["uri"]).name: row for row in index.table.to_arrow().to_pylist()}


def test_a_folder_becomes_a_table(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    index, report = build(model, tmp_path / "index", pictures)
    assert counts(report) == (4, 0, 0, 0, 0)
    assert index.count == 4 and index.model == "a/model"
    rows = by_name(index)
    assert set(rows) == {"a.png", "b.jpg", "c.png", "d.webp"}
    row = rows["a.png"]
    path = pictures / "a.png"
    assert row["uri"] == str(path) and row["caption"] == TEXTS[0]
    assert (row["width"], row["height"], row["size"]) == (64, 64, path.stat().st_size)
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows["c.png"]["caption"] == 'it\'s a "c"' and rows["b.jpg"]["caption"] is None
    feats = model.embed_images([row["uri"] for row in rows.values()])
    torch.testing.assert_close(torch.tensor([row["embedding"] for row in rows.values()]), feats)
    assert index.image(row["id"]) == path.read_bytes()
    assert index.entry(row["id"]).uri == str(path)
    (tmp_path / "thumbnail.jpg").write_bytes(index.thumbnail(rows["d.webp"]["id"]))
    assert Image.open(tmp_path / "thumbnail.jpg").size == (124, 64)


def test_only_what_is_new_or_changed_is_read_again(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    index, _ = build(model, path, pictures)
    ids = {name: row["id"] for name, row in by_name(index).items()}
    _, report = build(model, path, pictures)
    assert counts(report) == (0, 0, 4, 0, 0)

    Image.fromarray(SCENES.array(3)).save(pictures / "a.png")
    (pictures / "b.jpg").unlink()
    Image.fromarray(SCENES.array(1)).save(pictures / "e.png")
    index, report = build(model, path, pictures)
    assert counts(report) == (1, 1, 2, 1, 0)
    rows = by_name(index)
    assert set(rows) == {"a.png", "c.png", "d.webp", "e.png"}
    assert {name: ids[name] for name in ids if name in rows} == {
        name: row["id"] for name, row in rows.items() if name in ids
    }
    torch.testing.assert_close(
        torch.tensor(rows["a.png"]["embedding"]), model.embed_images(str(pictures / "a.png")).float()
    )


def test_other_places_stay(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    shutil.copytree(pictures, tmp_path / "others")
    build(model, path, pictures)
    index, report = build(model, path, tmp_path / "others")
    assert counts(report) == (4, 0, 0, 0, 0) and index.count == 8
    shutil.rmtree(tmp_path / "others" / "more")
    (pictures / "a.png").unlink()
    index, report = build(model, path, tmp_path / "others")
    assert counts(report) == (0, 0, 3, 1, 0) and index.count == 7
    # A place that holds nothing any more is likelier a disk that is not there than a wish to forget.
    shutil.rmtree(tmp_path / "others")
    (tmp_path / "others").mkdir()
    with pytest.raises(TercetError, match="no image found"):
        build(model, path, tmp_path / "others")
    assert Index.open(str(path)).count == 7


def test_broken_images_are_counted_and_named(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    (pictures / "x.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:300])
    (pictures / "y.png").write_bytes(b"<svg></svg>")
    (pictures / "z.png").symlink_to(pictures / "nowhere.png")
    index, report = build(model, tmp_path / "index", pictures)
    assert counts(report) == (4, 0, 0, 0, 3) and index.count == 4
    assert all(name in line for name, line in zip(["x.jpg", "y.png", "z.png"], report.broken, strict=True))
    assert "SVG" in report.broken[1]


def test_what_was_embedded_before_an_interruption_is_there(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    from tercet.search.building import embed_here

    def interrupted(images: list) -> object:
        for image in images[:3]:
            yield from embed_here(model, [image])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index([str(pictures)], model, "m", str(tmp_path / "index"), embed=interrupted)  # pyright: ignore
    assert Index.open(str(tmp_path / "index")).count == 3
    _, report = build(model, tmp_path / "index", pictures)
    assert counts(report) == (1, 0, 3, 0, 0)


def test_another_model_is_refused(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    from tiny_model import make_model

    build(model, tmp_path / "index", pictures)
    other = make_model()
    other.vision_projection.weight.data.mul_(2)
    with pytest.raises(TercetError, match="made by another model, a/model"):
        build(other, tmp_path / "index", pictures)
    # The text encoder has no part in an index.
    same = make_model()
    same.text_projection.weight.data.mul_(2)
    build(same, tmp_path / "index", pictures)


def test_opening_what_is_no_index(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TercetError, match=r"no index at .*; make one: tercet index"):
        Index.open(str(tmp_path / "none"))
    with pytest.raises(TercetError, match="holds no index"):
        Index.open(str(pictures))
    build(model, tmp_path / "index", pictures)
    manifests = sorted((tmp_path / "index/images.lance/_versions").iterdir())
    for manifest in manifests:
        manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 2])
    with pytest.raises(TercetError, match="damaged"):
        Index.open(str(tmp_path / "index"))


def test_an_image_that_is_gone_or_another(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    index, _ = build(model, tmp_path / "index", pictures)
    ids = {name: row["id"] for name, row in by_name(index).items()}
    (pictures / "a.png").write_bytes((pictures / "d.webp").read_bytes())
    (pictures / "b.jpg").unlink()
    with pytest.raises(TercetError, match="it has changed since it was indexed"):
        index.image(ids["a.png"])
    with pytest.raises(TercetError, match="no file"):
        index.image(ids["b.jpg"])
    assert index.thumbnail(ids["b.jpg"])
    for unknown in ("0" * 16, "", "../a.png", "' OR 1=1 --", str(pictures / "a.png")):
        for read in (index.image, index.thumbnail, index.entry):
            with pytest.raises(TercetError, match="no image"):
                read(unknown)


def test_one_writer_at_a_time(model: Tercet, pictures: Path, tmp_path: Path) -> None:
    from tercet.search.writing import lock_index

    with lock_index(str(tmp_path / "index")), pytest.raises(TercetError, match="another process is writing"):
        build(model, tmp_path / "index", pictures)
    build(model, tmp_path / "index", pictures)


def test_scenes(model: Tercet, tmp_path: Path) -> None:
    index, report = build(model, tmp_path / "index", "scenes:test")
    assert report.added == 500
    row = next(row for row in index.table.to_arrow().to_pylist() if row["uri"] == "scenes:test#7")
    assert np.frombuffer(index.image(row["id"])[:4], np.uint8).tobytes()[1:] == b"PNG"
    assert os.listdir(tmp_path / "index")  # noqa: PTH208
