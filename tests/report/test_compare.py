"""Several runs on one page: what differs is shown, hostile text stays text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.cli import main
from tercet.errors import TercetError
from tercet.report.compare import write_comparison

from .conftest import HOSTILE, Page, make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / HOSTILE.replace("/", " "), 1e-3, 30), make_run(tmp_path / "second", 1e-4, 50)]


def test_comparison(runs: list[Path], tmp_path: Path) -> None:
    html = write_comparison(runs, tmp_path / "page.html").read_text()
    page = Page(html)
    page.assert_offline()
    results, differing = page.text.partition("Losses")[0].partition("Settings that differ")[::2]
    assert "optim.lr 0.001 0.0001" in differing
    assert "beta1" not in differing and "output" not in differing
    assert "3 settings of the config are the same" in differing
    results = results[results.index("Results") :]
    assert "validation data: dual encoder" in results and "validation data: embedding metrics" in results
    assert "<td>33</td><td class=top>53</td>" in html  # the higher recall
    assert "<td>1.7</td><td class=top>1.5</td>" in html  # the lower alignment
    assert "Mean recall, dual encoder, validation" in page.text
    assert html.count("stroke:var(--run-1)") == html.count("stroke:var(--run-2)") > 3


def test_two_runs_are_needed_and_may_share_a_name(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "demo") for name in ("a", "b")]
    for wrong in (runs[:1], [runs[0], runs[0]]):
        with pytest.raises(TercetError):
            write_comparison(wrong, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    html = write_comparison(runs, tmp_path / "page.html").read_text()
    assert "a/demo" in html and "b/demo" in html


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    assert page.is_file() and str(page) in capsys.readouterr().out
    assert main(["report", str(runs[0]), "--output", str(page)]) == 2
    assert "--output" in capsys.readouterr().err
