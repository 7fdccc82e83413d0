"""The pages of a run and of a search: whole, offline, safe against hostile captions, made of whatever there is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tercet.errors import TercetError
from tercet.report.page import SearchResult, chance_recall, write_report, write_search_page
from tercet.report.run import read_run

from .conftest import HOSTILE, Page, train_line, write_lines


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text())


def test_whole_report(run: Path) -> None:
    page = report(run)
    facts = ("first run", "demo", "shards/", "4,000", "1,231", "2 cores", "100 images, 500 captions", "53.0")
    charts = ("Cross-modal alignment", "Masked language modelling", "Learning rate", "Gradient norm", "Answer loss")
    over_time = ("Mean recall, dual encoder, validation", "Alignment (0 is best, 2 chance), validation")
    headings = ("Retrieval", "Metrics", "Retrieval examples", "Similarities", "Attention heatmaps", "Losses", "Events")
    for expected in (*facts, *charts, *over_time, *headings, "embedding metrics", "30 broken samples skipped"):
        assert expected in page.text, expected
    assert "missing" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 8
    assert "1 of 2 captions are nearest to their own image" in page.text
    assert sum("own" in (attributes.get("class") or "").split() for _, attributes in page.tags) == 2
    page.assert_offline()
    assert page.text.count(HOSTILE) == 6  # query, event, config, a row of the matrix, a heatmap and its word
    # Failures come first, and right images are marked by more than colour.
    found = ("right image at rank 7", "right image at rank 2", "right image first")
    positions = [page.html.index(f"<p class=rank>{text}<") for text in found]
    assert positions == sorted(positions)
    assert page.text.count("✓") == sum(attributes.get("class") == "right" for _, attributes in page.tags) == 3


def test_resumed_steps_count_once_and_the_pause_not_at_all(run: Path) -> None:
    record = read_run(run)
    assert record.curve("loss")[0].tolist() == [float(step) for step in range(10, 310, 10)]
    assert record.seconds == pytest.approx((150 - 10) + (300 - 150), abs=11)


def test_a_killed_run_and_damaged_metrics(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:5]) + '\n{"kind": "train", "step": 60, "lo')
    for name in ("gallery.json", "run.json", "model/model.safetensors"):
        (run / name).unlink()
    for expected in ("(1)", "No evaluation yet", "No gallery.json", "No trained model yet", "Total loss"):
        assert expected in report(run).text
    rows = [b"\xff\xfe", b"[1]", b'{"kind": "train"}', b'{"kind": "train", "step": "x", "loss": 1}']
    (run / "metrics.jsonl").write_bytes(b"\n".join(rows))
    assert "(2)" in report(run).text and "No training step" in report(run).text


@pytest.mark.parametrize("name", ["config.yaml", "gallery.json", "similarity.json", "heatmaps.json", "run.json"])
@pytest.mark.parametrize("content", ["{", "3", '{"captions": [1], "cosines": [[]]}', "[3]", "a: [b\n<i>", "[" * 10**5])
def test_a_damaged_file_is_skipped(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    assert "Total loss" in report(run).text


def test_odd_values_are_skipped(run: Path) -> None:
    lines = [train_line(10, loss=float("nan"), grad_norm=None), train_line(20, loss=float("inf"), time="now")]
    lines += [train_line(30, loss=True), {"kind": "event", "time": 1e300, "message": None}]
    lines += [{"kind": "evaluate", "step": None, "dual": {"text_r1": float("nan")}, "data": "<i>"}]
    write_lines(run, lines)
    entries = [{"query": 3, "rank": "?", "results": [{"thumbnail": "javascript:alert(1)", "right": True}, 4]}]
    (run / "gallery.json").write_text(json.dumps(entries))
    page = report(run)
    page.assert_offline()
    assert "nan" not in page.text.lower()
    for expected in ("rank unknown", "no picture", "chance unknown"):
        assert expected in page.text


def test_a_run_folder_holds_a_config_or_metrics(run: Path) -> None:
    with pytest.raises(TercetError, match="absent"):
        write_report(run / "absent")
    for path in run.glob("*.json*"):
        path.unlink()
    assert "No metrics.jsonl" in report(run).text
    (run / "config.yaml").unlink()
    with pytest.raises(TercetError, match=r"neither config\.yaml nor metrics\.jsonl"):
        write_report(run)


def test_chance_recall_equals_random_rankings() -> None:
    rng = np.random.default_rng(0)
    images, own = 20, 3
    expected = chance_recall(images, images * own)
    assert expected["image_r1"] == pytest.approx(5.0)
    ranks = np.array([np.sort(rng.permutation(images * own)[:own])[0] for _ in range(20000)])
    for k in (1, 5, 10):
        assert expected[f"text_r{k}"] == pytest.approx(100 * (ranks < k).mean(), abs=1.2)
    assert chance_recall(3, 3)["text_r10"] == 100


def test_a_page_of_search_results(tmp_path: Path) -> None:
    reranked = SearchResult("id<1>", "a/<b>.png", HOSTILE, 0.25, 0.75, 2, b"\xff\xd8")
    dual = SearchResult("id2", "c.png", None, 0.5, None, 1, b"")
    path = write_search_page([reranked, dual], {"words": HOSTILE, "index": "<i>"}, tmp_path / "found.html", b"\xff\xd8")
    page = Page(path.read_text())
    page.assert_offline()
    shown = (HOSTILE, "id<1>", "a/<b>.png", "75.0 %", "cosine 0.250, rank 2", "0.500", "no picture", "2 images")
    assert [text for text in shown if text not in page.text] == []
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert "No image found" in write_search_page([], {"words": "x"}, tmp_path / "none.html").read_text()
