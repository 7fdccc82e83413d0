"""Run folders as training leaves them, with captions that try to be more than text, and what reads a page."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

HOSTILE = "<script>alert('x')</script> & \"dog\""
THUMBNAIL = "data:image/jpeg;base64," + base64.b64encode(cv2.imencode(".jpg", np.zeros((8, 8, 3)))[1]).decode()


def train_line(step: int, **more: Any) -> dict[str, Any]:
    losses = {"loss": 9 - step / 100, "cma": 2.5, "mlm": 3.25, "answer_loss": 0.5}
    clock = {"step": step, "epoch": step / 50, "time": 1.7e9 + step}
    return {"kind": "train", **clock, **losses, "lr": 1e-4, "grad_norm": 1.5, **more}


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


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
        recalls = {f"{side}_r{k}": recall + step / 100 for side in ("text", "image") for k in (1, 5, 10)}
        line = {"kind": "evaluate", "step": step, "data": "validation", "size": {"images": 100, "texts": 500}}
        line["dual"] = {**recalls, "r_mean": recall + step / 100}
        line["reranked"] = {key: value + 10 for key, value in recalls.items()}
        lines.append({**line, "embeddings": {"alignment": 2 - recall / 100}})
    write_lines(folder, lines)
    results = [{"key": "a", "score": 0.9, "thumbnail": THUMBNAIL}, {"key": "b", "right": True, "thumbnail": THUMBNAIL}]
    queries = {"a dog": 1, HOSTILE: 7, "b": 2}
    gallery = [{"query": query, "rank": rank, "results": results} for query, rank in queries.items()]
    matrix = {"captions": [HOSTILE, "b"], "thumbnails": [THUMBNAIL] * 2, "cosines": [[0.9, 0.1], [0.8, 0.7]]}
    maps = [{"query": HOSTILE, "thumbnail": THUMBNAIL, "overlay": "http://evil/x", "words": [{"word": HOSTILE}]}]
    facts = {"recipe": "demo", "pairs": 4000, "parameters": 1231, "machine": "2 cores"}
    for name, content in {"gallery": gallery, "similarity": matrix, "heatmaps": maps, "run": facts}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first run")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its visible text; tags must close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def assert_offline(self) -> None:
        """Nothing comes from outside, and nothing runs."""
        assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in self.tags}
        for name, value in (item for _, attributes in self.tags for item in attributes.items()):
            assert not name.startswith("on")
            assert name not in ("src", "href") or (value or "").startswith("data:image/")
        assert not re.search(r"https?://|url\(|@import|javascript:", self.html)
