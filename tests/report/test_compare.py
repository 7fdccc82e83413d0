"""Runs beside one another, and the pictures of one: what differs is shown, hostile text stays text."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import cv2
import pytest

from tercet.cli import main
from tercet.data.scenes import draw_scene
from tercet.errors import TercetError
from tercet.report.compare import write_comparison
from tercet.report.page import write_report
from tercet.report.record import read_run

HOSTILE = "<script>alert(1)</script>"


def picture(seed: int) -> str:
    _, data = cv2.imencode(".jpg", draw_scene(seed).image)
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def make_run(folder: Path, rate: float, recall: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {HOSTILE}\noutput: {folder}\noptim: {{lr: {rate}, beta1: 0.9}}\n")
    lines: list[dict] = [{"kind": "train", "step": s, "loss": 9 - s / 9, "lr": rate, "time": s} for s in range(1, 40)]
    for step in (20, 39):
        groups = {"dual": {"r_mean": recall + step}, "space": {"alignment": 2 - recall / 100}}
        lines.append({"kind": "evaluate", "step": step, "data": "test", "size": {"images": 9, "texts": 9}, **groups})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    matrix = {"captions": [HOSTILE, "b"], "thumbnails": [picture(1), picture(2)], "cosines": [[0.9, 0.1], [0.8, 0.7]]}
    (folder / "similarity.json").write_text(json.dumps(matrix))
    maps = [{"query": HOSTILE, "thumbnail": picture(1), "overlay": "http://evil/x.png", "words": [{"word": HOSTILE}]}]
    (folder / "heatmaps.json").write_text(json.dumps(maps))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "first", 1e-3, 30), make_run(tmp_path / "second", 1e-4, 50)]


def test_comparison(runs: list[Path], tmp_path: Path) -> None:
    html = write_comparison(runs, tmp_path / "page.html").read_text()
    differing = html[html.index("Settings that differ") : html.index("Losses")]
    assert "optim.lr" in differing and "0.001" in differing and "0.0001" in differing
    assert "optim.beta1" not in differing and "output" not in differing
    assert "2 settings of the config are the same" in html
    assert "<td class=top>89</td>" in html  # the higher recall
    assert "<td>1.7</td><td class=top>1.5</td>" in html  # the lower alignment
    assert html.count("var(--run-1)") > 3 and html.count("var(--run-2)") > 3
    assert "Mean recall, dual encoder, test" in html and "test data: dual encoder" in html and ">mean</th>" in html
    assert "<script" not in html and "http://" not in html


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "demo", 1e-3, 30) for name in ("a", "b")]
    html = write_comparison(runs, tmp_path / "page.html").read_text()
    assert "a/demo" in html and "b/demo" in html


def test_refusals(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TercetError, match="two runs at least"):
        write_comparison(runs[:1], tmp_path / "page.html")
    with pytest.raises(TercetError, match="a run stands twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "page.html")


def test_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    assert page.is_file() and str(page) in capsys.readouterr().out
    assert main(["report", str(runs[0]), "--output", str(page)]) == 2
    assert "RUN/report.html" in capsys.readouterr().err


def test_matrix_heatmaps_and_time_on_the_report(runs: list[Path]) -> None:
    html = write_report(runs[0]).read_text()
    assert "1 of 2 captions are nearest to their own image" in html
    assert html.count('class="own') == 2
    assert "Where it looks" in html and "no picture" in html
    assert "Alignment (0 is best, 2 chance), test" in html
    assert "<script" not in html and "evil" not in html


@pytest.mark.parametrize("name", ["similarity.json", "heatmaps.json"])
@pytest.mark.parametrize("content", ["{", "3", '{"captions": [1], "cosines": [[]]}', "[3]"])
def test_damaged_pictures_are_left_out(runs: list[Path], name: str, content: str) -> None:
    (runs[0] / name).write_text(content)
    assert read_run(runs[0]).train
    assert write_report(runs[0]).is_file()
