"""A filter compares columns with values, and does nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.search.building import build_index
from tercet.search.filters import checked_filter
from tercet.search.index import Index


@pytest.fixture
def index(model: Tercet, pictures: Path, tmp_path: Path) -> Index:
    return build_index([str(pictures)], model, "m", str(tmp_path / "index"))[0]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("width = 64", {"a.png"}),
        ("width == 64", {"a.png"}),
        ("WIDTH >= 84 and Height < 65", {"b.jpg", "c.png", "d.webp"}),
        ("caption is null", {"b.jpg", "d.webp"}),
        ("caption is not null and not caption like 'it%'", {"a.png"}),
        ("caption = 'it''s a \"c\"'", {"c.png"}),
        ('caption = "it\'s a ""c"""', {"c.png"}),
        ("uri ilike '%.PNG'", {"a.png", "c.png"}),
        ("width in (64, 84)", {"a.png", "b.jpg"}),
        ("width between 80 and 110", {"b.jpg", "c.png"}),
        ("(width = 64 or width = 84) and uri like '%.jpg'", {"b.jpg"}),
        ("modified > timestamp '2020-01-01'", {"a.png", "b.jpg", "c.png", "d.webp"}),
        ("modified < date '2020-01-01'", set()),
        ("size > -1", {"a.png", "b.jpg", "c.png", "d.webp"}),
    ],
)
def test_what_filters_choose(index: Index, where: str, names: set[str]) -> None:
    found = index.nearest([1.0] * index.embed_dim, 10, where)  # pyright: ignore[reportArgumentType]
    assert {Path(one.entry.uri).name for one in found} == names


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("repeat(caption, 1000000000) = 'a'", "knows no 'repeat'"),
        ("regexp_like(caption, '(a+)+$')", "knows no 'regexp_like'"),
        ("width = 1; drop table images", "cannot be read at '; drop"),
        ("(select 1) = 1", "knows no 'select'"),
        ("thumbnail is not null", "knows no 'thumbnail'"),
        ("embedding = 1", "knows no 'embedding'"),
        ("widht > 3", "did you mean width"),
        ("width > 3 -- and more", "cannot be read at '-- and"),
        ("width > 3 /* */", "cannot be read"),
        ("width > 0x10", "cannot be read"),
        ("width > 1e99", "cannot be read"),
        ("caption = 'a", "cannot be read"),
        ("caption = 'a\0b'", "null character"),
        ("`id` = 'a'", "cannot be read"),
        ("caption || 'a' = 'a'", "cannot be read"),
        ("", "empty"),
        ("  ", "empty"),
        ("(width = 1", "cut short"),
        ("width = 1)", "brackets do not fit"),
        ("(" * 20 + "width = 1" + ")" * 20, "brackets"),
        ("width = 1 or " * 200 + "width = 1", "characters"),
    ],
)
def test_what_filters_may_not_hold(where: str, message: str) -> None:
    with pytest.raises(TercetError, match=message):
        checked_filter(where)


@pytest.mark.parametrize(
    "where", ["width", "width = 'abc'", "and and", "width = = 1", "null null", "not", "caption = 3"]
)
def test_what_only_the_table_refuses(index: Index, where: str) -> None:
    with pytest.raises(TercetError, match="cannot search by the filter"):
        index.nearest([1.0] * index.embed_dim, 10, where)  # pyright: ignore[reportArgumentType]
