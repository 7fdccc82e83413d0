"""The report: whole, offline, safe against hostile captions, and made of whatever a run folder holds."""

from __future__ import annotations

import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from tercet.data.scenes import draw_scene
from tercet.errors import TercetError
from tercet.report.figures import curve_svg, gallery_figure, smooth
from tercet.report.page import chance_recall, write_report
from tercet.report.record import read_run

HOSTILE = "<script>alert('x')</script> & \"dog\""
RECALLS = ("text_r1", "text_r5", "text_r10", "image_r1", "image_r5", "image_r10", "r_mean")


def thumbnail(seed: int) -> str:
    _, data = cv2.imencode(".jpg", draw_scene(seed).image)
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def train_line(step: int, **more: object) -> dict[str, object]:
    line = {"kind": "train", "step": step, "epoch": step / 50, "time": 1.7e9 + step, "loss": 9 - step / 100, "lr": 1e-4}
    return {**line, "cma": 2.5, "mlm": 3.25, "temperature": 0.07, "grad_norm": 1.5, "pairs_per_second": 50.0, **more}


def gallery() -> list[dict[str, object]]:
    def entry(query: str, rank: int) -> dict[str, object]:
        results = [
            {"key": f"scenes#{i}", "score": 0.9 - i / 10, "right": i + 1 == rank, "thumbnail": thumbnail(i)}
            for i in range(3)
        ]
        return {"query": query, "rank": rank, "results": results}

    return [entry("a red circle", 1), entry(HOSTILE, 7), entry("two blue stars", 2)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, resumed once."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: first run\ntask: pretrain\n# {HOSTILE}\ndata:\n  train: [scenes]\n")
    lines: list[dict[str, object]] = [train_line(step) for step in range(10, 210, 10)]
    lines.append({"kind": "event", "step": 150, "time": 1.7e9 + 9000, "message": f"resumed at step 150 {HOSTILE}"})
    lines += [train_line(step, time=1.7e9 + 9000 + step - 150, skipped=2) for step in range(160, 310, 10)]
    for step in (100, 300):
        recalls = dict.fromkeys(RECALLS, 40.0 + step / 100)
        lines.append(
            {
                "kind": "evaluate",
                "step": step,
                "data": "validation",
                "size": {"images": 100, "texts": 500},
                "dual": recalls,
            }
            | {"reranked": {key: value + 10 for key, value in recalls.items()}}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "gallery.json").write_text(json.dumps(gallery()))
    (folder / "run.json").write_text(json.dumps({"recipe": "demo", "pairs": 4000, "machine": "2 cores"}))
    header = json.dumps({"__metadata__": {}, "a": {"shape": [30, 41]}, "b": {"shape": []}}).encode()
    (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


class Page(HTMLParser):
    """Collects the tags, their attributes and the visible text; notes tags closed out of order."""

    VOID = ("meta", "img", "br", "link", "path", "use")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def test_whole_report(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text())
    for expected in ("first run", "4,000", "1,231", "2 cores", "Cross-modal alignment", "Masked language modelling"):
        assert expected in page.words
    assert "Learning rate" in page.words
    assert "Gradient norm" in page.words
    assert "100 images, 500 captions" in page.words
    assert "53.0" in page.words
    assert "30 broken samples skipped" in page.words
    assert "What this report lacks" not in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 9


def test_nothing_comes_from_outside_and_captions_are_text(run: Path) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith(("data:image/", "#"))
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert page.words.count("<script>alert('x')</script>") == 3  # query, event and config, each as visible text


def test_ids_are_unique_and_found(run: Path) -> None:
    html = write_report(run).read_text()
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


def test_failures_come_first_and_right_images_are_marked_by_more_than_colour(run: Path) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    order = [page.words.index(text) for text in ("at rank 7", "at rank 2", "found first")]
    positions = [html.index(f"<p class=rank>{text}") for text in ("at rank 7", "at rank 2", "found first")]
    assert positions == sorted(positions)
    assert len(order) == 3
    assert page.words.count("✓") == sum(
        tag == "li" and attributes.get("class") == "right" for tag, attributes in page.tags
    )
    assert page.words.count("✓") == 2


def test_resumed_steps_count_once_and_the_pause_not_at_all(run: Path) -> None:
    record = read_run(run)
    steps, _ = record.series("loss")
    assert steps.tolist() == [float(step) for step in range(10, 310, 10)]
    assert record.seconds == pytest.approx((150 - 10) + (300 - 150), abs=11)


def test_killed_run_with_half_a_last_line(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(text[:5]) + '\n{"kind": "train", "step": 60, "lo')
    for name in ("gallery.json", "run.json", "model/model.safetensors"):
        (run / name).unlink()
    page = Page(write_report(run).read_text())
    for sentence in ("1 line that is cut short", "No evaluation yet", "No gallery.json", "No trained model yet"):
        assert sentence in page.words
    assert "Total loss" in page.words


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_one_file_is_enough(run: Path, name: str) -> None:
    for other in ("config.yaml", "metrics.jsonl", "gallery.json", "run.json"):
        if other != name:
            (run / other).unlink()
    assert "What this report lacks" in Page(write_report(run).read_text()).words


def test_damaged_files_are_named(run: Path) -> None:
    (run / "gallery.json").write_text('[{"query": "a do')
    (run / "config.yaml").write_text("name: [unclosed\n<b>")
    (run / "model" / "model.safetensors").write_bytes(b"\x08\x00")
    (run / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"kind": "train"}\n{"kind": "train", "step": "x", "loss": 1}\n'
    )
    page = Page(write_report(run).read_text())
    for sentence in ("gallery.json is cut short", "config.yaml cannot be read", "2 lines that are cut short"):
        assert sentence in page.words
    assert "No training step" in page.words


def test_odd_values_are_left_out(run: Path) -> None:
    odd = [train_line(10, loss=float("nan"), grad_norm=None), train_line(20, loss=float("inf"), time="now")]
    odd += [
        train_line(30, loss=True),
        {"kind": "evaluate", "step": None, "dual": {"text_r1": float("nan")}, "data": "<i>"},
    ]
    odd += [{"kind": "event", "time": 1e300, "message": None}]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in odd))
    entries = [{"query": 3, "rank": "?", "results": [{"thumbnail": "javascript:alert(1)", "right": True}, 4]}]
    (run / "gallery.json").write_text(json.dumps(entries))
    html = write_report(run).read_text()
    page = Page(html)
    assert "javascript:" not in html
    assert "rank unknown" in page.words
    assert "no picture" in page.words
    assert "chance unknown" in page.words
    assert "nan" not in page.words.lower()


def test_losses_of_other_tasks_are_drawn(run: Path) -> None:
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(train_line(step, answer_loss=0.5)) for step in (1, 2, 3)))
    assert "Answer loss" in Page(write_report(run).read_text()).words


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TercetError, match="no run folder at"):
        write_report(tmp_path / "absent")
    with pytest.raises(TercetError, match=r"neither config\.yaml nor metrics\.jsonl"):
        write_report(tmp_path)


def test_chance_recall_equals_random_rankings() -> None:
    rng = np.random.default_rng(0)
    images, own = 20, 3
    wanted = chance_recall(images, images * own)
    assert wanted["image_r1"] == pytest.approx(5.0)
    hits = np.array([np.sort(rng.permutation(images * own)[:own])[0] for _ in range(20000)])
    for k in (1, 5, 10):
        assert wanted[f"text_r{k}"] == pytest.approx(100 * (hits < k).mean(), abs=1.2)
    assert chance_recall(3, 3)["text_r10"] == 100


def test_smoothing_keeps_constants_and_does_not_lag() -> None:
    assert np.allclose(smooth(np.full(200, 3.0)), 3.0)
    line = np.arange(400.0)
    assert np.abs(smooth(line)[100:300] - line[100:300]).max() < 1.0


def test_long_curves_stay_small() -> None:
    rng = np.random.default_rng(0)
    svg = curve_svg(np.arange(100_000.0), rng.random(100_000), "a <b> \" & 'c")
    assert len(svg) < 60_000
    assert Page(svg).tags[0][1]["aria-label"] == "a b   c"


def test_gallery_picture(tmp_path: Path) -> None:
    entries = gallery()
    entries[1]["query"] = "costs $5 and $6, " + "very long words " * 20
    path = gallery_figure(entries, tmp_path / "gallery.png", rows=2)
    picture = cv2.imread(str(path))
    assert picture is not None
    assert picture.shape[0] > 300
    green = (np.abs(picture.astype(int) - (0x5C, 0x80, 0x12)).sum(2) < 30).sum()
    assert green > 500
    broken = [{"query": "q", "rank": None, "results": [{"thumbnail": "data:image/png;base64,AAAA"}]}]
    assert gallery_figure(broken, tmp_path / "broken.png").stat().st_size > 1000
    with pytest.raises(TercetError, match="no queries"):
        gallery_figure([], tmp_path / "none.png")
