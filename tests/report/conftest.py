"""Run folders as training leaves them, with captions that try to be more than text."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

HOSTILE = "<script>alert('x')</script> & \"dog\""
RECALLS = ("text_r1", "text_r5", "text_r10", "image_r1", "image_r5", "image_r10", "r_mean")


def thumbnail(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return "data:image/jpeg;base64," + base64.b64encode(cv2.imencode(".jpg", pixels)[1].tobytes()).decode()


def train_line(step: int, **more: Any) -> dict[str, Any]:
    line = {"kind": "train", "step": step, "epoch": step / 50, "time": 1.7e9 + step, "loss": 9 - step / 100, "lr": 1e-4}
    return {**line, "cma": 2.5, "mlm": 3.25, "temperature": 0.07, "grad_norm": 1.5, "pairs_per_second": 50.0, **more}


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def gallery_entry(query: str, rank: int) -> dict[str, Any]:
    results = [
        {"key": f"image{i}", "score": 0.9 - i / 10, "right": i + 1 == rank, "thumbnail": thumbnail(i)} for i in range(3)
    ]
    return {"query": query, "rank": rank, "results": results}


def make_run(folder: Path, rate: float = 1e-4, recall: float = 40.0) -> Path:
    """A finished run, resumed once: 300 steps, of which 160 to 200 were done twice."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"")
    config = f"name: {folder.name}\ntask: pretrain\noutput: {folder}\n# {HOSTILE}\noptim: {{lr: {rate}, beta1: 0.9}}\n"
    (folder / "config.yaml").write_text(f"{config}data: {{train: [shards/]}}\n")
    lines = [train_line(step) for step in range(10, 210, 10)]
    lines.append({"kind": "event", "step": 150, "time": 1.7e9 + 9000, "message": f"resumed at step 150 {HOSTILE}"})
    lines += [train_line(step, time=1.7e9 + 9000 + step - 150, skipped=2) for step in range(160, 310, 10)]
    for step in (100, 300):
        recalls = dict.fromkeys(RECALLS, recall + step / 100)
        groups = {
            "dual": recalls,
            "reranked": {key: value + 10 for key, value in recalls.items()},
            "space": {"alignment": 2 - recall / 100},
        }
        size = {"images": 100, "texts": 500}
        lines.append({"kind": "evaluate", "step": step, "data": "validation", "size": size, **groups})
    write_lines(folder, lines)
    entries = [gallery_entry("a red circle", 1), gallery_entry(HOSTILE, 7), gallery_entry("two blue stars", 2)]
    matrix = {
        "captions": [HOSTILE, "b"],
        "thumbnails": [thumbnail(1), thumbnail(2)],
        "cosines": [[0.9, 0.1], [0.8, 0.7]],
    }
    maps = [{"query": HOSTILE, "thumbnail": thumbnail(1), "overlay": "http://evil/x", "words": [{"word": HOSTILE}]}]
    facts = {"recipe": "demo", "pairs": 4000, "parameters": 1231, "machine": "2 cores"}
    files = {"gallery.json": entries, "similarity.json": matrix, "heatmaps.json": maps, "run.json": facts}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first run")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its visible text; checks that tags close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
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
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def assert_offline(self) -> None:
        """Nothing comes from outside, and nothing runs."""
        assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in self.tags}
        for _, attributes in self.tags:
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert name not in ("src", "href") or (value or "").startswith("data:image/")
