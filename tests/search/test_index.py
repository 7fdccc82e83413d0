"""An index is opened, read and filtered; what is damaged, gone or hostile is refused with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.search.build import build_index
from tercet.search.index import Index, checked_filter


@pytest.fixture
def index(predictor: Predictor, pictures: Path, tmp_path: Path) -> Index:
    return build_index([str(pictures)], predictor, "m", str(tmp_path / "index"))[0]


def test_open_what_is_no_index(index: Index, pictures: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", pictures):
        with pytest.raises(TercetError, match=f"{path}; make one: tercet index"):
            Index.open(str(path))
    for manifest in (tmp_path / "index/images.lance/_versions").iterdir():
        manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 2])
    with pytest.raises(TercetError, match="damaged"):
        Index.open(str(tmp_path / "index"))


def test_an_image_that_is_gone_or_changed(index: Index, pictures: Path) -> None:
    ids = {Path(entry.uri).name: entry.id for entry in index.newest(9)}
    (pictures / "a.png").write_bytes((pictures / "d.webp").read_bytes())
    (pictures / "b.jpg").unlink()
    with pytest.raises(TercetError, match=r"a\.png.*changed"):
        index.image(ids["a.png"])
    with pytest.raises(TercetError, match=r"b\.jpg"):
        index.image(ids["b.jpg"])
    assert index.thumbnail(ids["b.jpg"])
    for unknown in ("0" * 16, "", "../a.png", "' OR 1=1 --", str(pictures / "a.png")):
        for read in (index.image, index.thumbnail, index.entry):
            with pytest.raises(TercetError, match="no image"):
                read(unknown)


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("width == 64", "a"),
        ("WIDTH >= 84 and Height < 65", "bcd"),
        ("caption is null", "bd"),
        ("caption is not null and not caption like 'it%'", "a"),
        ("caption = 'it''s a \"c\"'", "c"),
        ('caption = "it\'s a ""c"""', "c"),
        ("uri ilike '%.PNG'", "ac"),
        ("width in (64, 84)", "ab"),
        ("width between 80 and 110", "bc"),
        ("(width = 64 or width = 84) and uri like '%.jpg'", "b"),
        ("modified > timestamp '2020-01-01'", "abcd"),
        ("modified < date '2020-01-01'", ""),
        ("size > -1", "abcd"),
    ],
)
def test_filters(index: Index, where: str, names: str) -> None:
    (found,) = index.nearest(torch.ones(1, index.embed_dim), 10, where)
    assert sorted(Path(hit.uri).stem for hit in found) == list(names)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("repeat(caption, 1000000000) = 'a'", "'repeat'"),
        ("regexp_like(caption, '(a+)+$')", "'regexp_like'"),
        ("width = 1; drop table images", "'; drop"),
        ("(select 1) = 1", "'select'"),
        ("thumbnail is not null", "'thumbnail'"),
        ("embedding = 1", "'embedding'"),
        ("widht > 3", "did you mean width"),
        ("width > 3 -- and more", "'-- and"),
        ("width > 3 /* */", "/"),
        ("width > 0x10", "0x10"),
        ("width > 1e99", "1e99"),
        ("caption = 'a", "'a"),
        ("caption = 'a\0b'", "null character"),
        ("`id` = 'a'", "`id`"),
        ("caption || 'a' = 'a'", "|| 'a'"),
        ("  ", "empty"),
        ("(width = 1", "cut short"),
        ("width = 1)", "brackets"),
        ("(" * 20 + "width = 1" + ")" * 20, "brackets"),
        ("width = 1 or " * 200 + "width = 1", "characters"),
    ],
)
def test_filters_that_are_refused(where: str, named: str) -> None:
    with pytest.raises(TercetError) as refused:
        checked_filter(where)
    assert named in str(refused.value)


def test_filters_that_only_the_table_refuses(index: Index) -> None:
    for where in ("width", "width = 'abc'", "and and", "width = = 1", "not", "caption = 3"):
        with pytest.raises(TercetError) as refused:
            index.nearest(torch.ones(1, index.embed_dim), 10, where)
        assert repr(where) in str(refused.value)
