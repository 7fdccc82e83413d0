"""`tercet index` and `tercet search` as they are typed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tercet.cli import main
from tercet.commands.searching import PICTURE_COLUMNS
from tiny_model import TEXTS


@pytest.fixture
def index(model_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    path = str(tmp_path / "index")
    assert main(["index", str(pictures), "--model", str(model_folder), "--output", path]) == 0
    assert "4 images (4 new, 0 changed, 0 unchanged, 0 removed, 0 skipped)" in capsys.readouterr().out
    return path


def test_index_again(index: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "broken.png").write_bytes(b"")
    assert main(["index", str(pictures), "--output", index, "--json"]) == 0  # the model is the one that made it
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["added"], report["unchanged"]) == (4, 0, 4)
    assert len(report["skipped"]) == 1 and "broken.png" in report["skipped"][0]
    assert main(["index", str(pictures), "--output", index]) == 0
    assert "skipped: " in capsys.readouterr().err


def test_search(index: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", index, *TEXTS[0].split(), "-k", "3", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 3 and all(0 < hit["match"] < 1 for hit in hits)
    assert main(["search", index, TEXTS[0]]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["match", "cosine", "dual", "id", "image", "caption"] and "%" in shown
    assert main(["search", index, "--like", hits[0]["id"], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    words = ["--image", str(pictures / "a.png"), "--without", TEXTS[1], "--where", "width > 64", "--rerank", "0"]
    assert main(["search", index, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 3 and all(hit["match"] is None and hit["width"] > 64 for hit in found)
    assert main(["search", index, "a heart", "--where", "width > 9999"]) == 0
    assert capsys.readouterr().out == "no image found\n"


@pytest.mark.parametrize(
    ("words", "columns", "drawn"), [([], 80, True), (["--no-thumbnails"], 80, False), ([], 0, False)]
)
def test_thumbnails_on_a_terminal(index: str, words: list[str], columns: int, drawn: bool) -> None:
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "40"}
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    shown = on_a_terminal(
        [sys.executable, "-m", "tercet", "search", index, "a heart", *words], plain | terminal, columns
    )
    assert "Traceback" not in shown and shown.count("%") == 4
    rows = [line for line in shown.splitlines() if line.count("▀") == PICTURE_COLUMNS]
    coloured = {colour for row in rows for colour in re.findall(r"38;2;\d+;\d+;\d+", row)}
    if drawn:
        assert len(rows) > 20 and len(coloured) > 50  # four pictures, of many colours
    else:
        assert not rows


def on_a_terminal(command: list[str], environment: dict[str, str], columns: int) -> str:
    """What `command` writes to a terminal that answers no question; 0 columns: one that does not know its size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0))
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        parts = []
        with contextlib.suppress(OSError):  # what reading ends with when the other side has closed
            while part := os.read(ours, 65_536):
                parts.append(part)
        assert process.wait() == 0, b"".join(parts).decode()
    os.close(ours)
    return b"".join(parts).decode()


def test_a_gallery(index: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "c.txt").write_text("<script>alert(1)</script>")
    page = tmp_path / "found.html"
    assert main(["search", index, "<b>heart</b>", "--image", str(pictures / "a.png"), "--html", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert text.count("<figure") == 4 and text.count("data:image/jpeg") == 5
    assert "<b>heart" not in text and "<script" not in text and not re.search("https?:", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to look for"),
        (["a", "heart", "-k", "0"], "k is 0"),
        (["a heart", "--where", "nothing"], "'nothing'"),
        (["--like", "x"], "no image 'x'"),
        (["--image", "nowhere.png"], "no file nowhere.png"),
    ],
)
def test_mistakes(index: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", index, *words]) == 2
    assert message in capsys.readouterr().err


def test_no_index(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(tmp_path / "none"), "a heart"]) == 2
    assert "no index at" in capsys.readouterr().err
    assert main(["index", "--model", str(model_folder), "--output", str(tmp_path / "i")]) == 2
    assert main(["index", str(tmp_path / "none"), "--model", str(model_folder), "--output", str(tmp_path / "i")]) == 2
    assert "no file" in capsys.readouterr().err and not (tmp_path / "i" / "images.lance").exists()


def test_without_the_extra(
    index: str, pictures: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", str(pictures), "--model", str(model_folder), "--output", index]
    monkeypatch.setitem(sys.modules, "ray", None)
    (pictures / "new.png").write_bytes((pictures / "a.png").read_bytes())
    assert main([*words, "--engine", "ray"]) == 2
    assert "pip install 'tercet[ray]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert main(["search", index, "a heart"]) == 2
    assert "pip install 'tercet[search]'" in capsys.readouterr().err
    assert main(words) == 2
    assert "pip install 'tercet[search]'" in capsys.readouterr().err
