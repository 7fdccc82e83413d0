"""Indexing: what enters the table, what is read again the next time, and what is skipped."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.search.build import IndexReport, build_index, embed_local, lock_index
from tercet.search.index import Index
from tiny_model import SCENES, TEXTS, make_model


def build(predictor: Predictor, path: Path, *specs: Path) -> tuple[Index, tuple[int, ...]]:
    """The index, and how many images were new, changed, unchanged, removed and skipped."""
    index, report = build_index([str(spec) for spec in specs], predictor, "a/model", str(path))
    return index, counts(report)


def counts(report: IndexReport) -> tuple[int, ...]:
    return report.added, report.changed, report.unchanged, report.removed, len(report.skipped)


def by_name(index: Index) -> dict[str, dict]:
    return {Path(row["uri"]).name: row for row in index.table.to_arrow().to_pylist()}


def test_a_folder_becomes_a_table(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    index, counted = build(predictor, tmp_path / "index", pictures, pictures / "a.png")  # one image is named twice
    assert counted == (4, 0, 0, 0, 0) and index.count == 4 and index.model == "a/model"
    rows = by_name(index)
    assert set(rows) == {"a.png", "b.jpg", "c.png", "d.webp"}
    row, path = rows["a.png"], pictures / "a.png"
    assert row["uri"] == index.entry(row["id"]).uri == str(path) and row["caption"] == TEXTS[0]
    assert (row["width"], row["height"], row["size"]) == (64, 64, path.stat().st_size)
    assert int(row["modified"].timestamp() * 1e6) == pytest.approx(path.stat().st_mtime_ns // 1000, abs=1)
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows["c.png"]["caption"] == 'it\'s a "c"' and rows["b.jpg"]["caption"] is None
    feats = predictor.embed_images([row["uri"] for row in rows.values()])
    torch.testing.assert_close(torch.tensor([row["embedding"] for row in rows.values()]), feats)
    assert index.image(row["id"]) == path.read_bytes()
    assert Image.open(io.BytesIO(index.thumbnail(rows["d.webp"]["id"]))).size == (124, 64)


def test_only_new_and_changed_images_are_read(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    ids = {name: row["id"] for name, row in by_name(build(predictor, path, pictures)[0]).items()}
    assert build(predictor, path, pictures)[1] == (0, 0, 4, 0, 0)

    Image.fromarray(SCENES[3].image).save(pictures / "a.png")
    (pictures / "b.jpg").unlink()
    (pictures / "d.txt").write_text("a new caption")
    Image.fromarray(SCENES[1].image).save(pictures / "e.png")
    index, counted = build(predictor, path, pictures)
    assert counted == (1, 2, 1, 1, 0)
    rows = by_name(index)
    assert set(rows) == {"a.png", "c.png", "d.webp", "e.png"} and rows["d.webp"]["caption"] == "a new caption"
    assert all(row["id"] == ids[name] for name, row in rows.items() if name in ids)
    feats = predictor.embed_images(str(pictures / "a.png"))
    torch.testing.assert_close(torch.tensor(rows["a.png"]["embedding"]), feats)


def test_images_from_elsewhere_stay(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    path, others = tmp_path / "index", tmp_path / "others"
    shutil.copytree(pictures, others)
    build(predictor, path, pictures)
    index, counted = build(predictor, path, others)
    assert counted == (4, 0, 0, 0, 0) and index.count == 8
    shutil.rmtree(others / "more")
    (pictures / "a.png").unlink()
    index, counted = build(predictor, path, others)
    assert counted == (0, 0, 3, 1, 0) and index.count == 7
    # An empty folder is more likely a disk that is not mounted than a wish to remove its images.
    shutil.rmtree(others)
    others.mkdir()
    with pytest.raises(TercetError, match=str(others)):
        build(predictor, path, others)
    assert Index.open(str(path)).count == 7


def test_broken_images_are_counted_and_named(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    (pictures / "x.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:300])
    (pictures / "y.png").write_bytes(b"<svg></svg>")
    (pictures / "z.png").symlink_to(pictures / "nowhere.png")
    index, report = build_index([str(pictures)], predictor, "m", str(tmp_path / "index"))
    assert counts(report) == (4, 0, 0, 0, 3) and index.count == 4
    assert all(name in line for name, line in zip(["x.jpg", "y.png", "z.png"], report.skipped, strict=True))
    assert "SVG" in report.skipped[1]


def test_an_interruption_keeps_what_was_embedded(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    def interrupted(images: pa.Table) -> Iterator[pa.Table]:
        yield from embed_local(predictor, images.slice(0, 3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index([str(pictures)], predictor, "m", str(tmp_path / "index"), embed=interrupted)
    assert Index.open(str(tmp_path / "index")).count == 3
    assert build(predictor, tmp_path / "index", pictures)[1] == (1, 0, 3, 0, 0)


def test_one_model_and_one_writer_at_a_time(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    with lock_index(str(path)), pytest.raises(TercetError, match="another process"):
        build(predictor, path, pictures)
    build(predictor, path, pictures)
    for part, same in (("vision_projection", False), ("text_projection", True)):  # texts have no part in an index
        other = Predictor(make_model())
        getattr(other.model, part).weight.data.mul_(2)
        with nullcontext() if same else pytest.raises(TercetError, match="another model, a/model"):
            build(other, path, pictures)
