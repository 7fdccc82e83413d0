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
from collections.abc import Callable
from pathlib import Path

import pytest

from tercet.cli import main
from tercet.commands.searching import PICTURE_COLUMNS
from tiny_model import TEXTS

Run = Callable[..., str]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(capsys: Captured) -> Run:
    """Runs a command that succeeds; gives what it prints."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def index(model_folder: Path, pictures: Path, tmp_path: Path, run: Run) -> Path:
    printed = run("index", pictures, "--model", model_folder, "--output", tmp_path / "index")
    assert "4 images (4 new, 0 changed, 0 unchanged, 0 removed, 0 skipped)" in printed
    return tmp_path / "index"


def test_index_again(index: Path, pictures: Path, run: Run, capsys: Captured) -> None:
    (pictures / "broken.png").write_bytes(b"")
    report = json.loads(run("index", pictures, "--output", index, "--json"))  # the model is the one that made it
    assert (report["images"], report["added"], report["unchanged"]) == (4, 0, 4)
    assert len(report["skipped"]) == 1 and "broken.png" in report["skipped"][0]
    assert main(["index", str(pictures), "--output", str(index)]) == 0
    assert "skipped: " in capsys.readouterr().err


def test_search(index: Path, pictures: Path, run: Run) -> None:
    hits = json.loads(run("search", index, *TEXTS[0].split(), "-k", "3", "--json"))
    assert len(hits) == 3 and all(0 < hit["match"] < 1 for hit in hits)
    shown = run("search", index, TEXTS[0])
    assert shown.splitlines()[0].split() == ["match", "cosine", "dual", "id", "image", "caption"] and "%" in shown
    assert len(json.loads(run("search", index, "--like", hits[0]["id"], "--json"))) == 3
    words = ["--image", pictures / "a.png", "--without", TEXTS[1], "--where", "width > 64", "--rerank", "0"]
    found = json.loads(run("search", index, *words, "--json"))
    assert len(found) == 3 and all(hit["match"] is None and hit["width"] > 64 for hit in found)
    assert run("search", index, "a heart", "--where", "width > 9999") == "no image found\n"


@pytest.mark.parametrize(
    ("words", "columns", "shows"), [([], 80, True), (["--no-thumbnails"], 80, False), ([], 0, False)]
)
def test_thumbnails_on_a_terminal(index: Path, words: list[str], columns: int, shows: bool) -> None:
    command = [sys.executable, "-m", "tercet", "search", str(index), "a heart", *words]
    shown = on_a_terminal(command, columns)
    assert "Traceback" not in shown and shown.count("%") == 4
    rows = [line for line in shown.splitlines() if line.count("▀") == PICTURE_COLUMNS]
    colours = {colour for row in rows for colour in re.findall(r"38;2;\d+;\d+;\d+", row)}
    assert (len(rows) > 20 and len(colours) > 50) if shows else not rows  # four pictures, of many colours


def on_a_terminal(command: list[str], columns: int) -> str:
    """What `command` writes to a terminal that answers no question; 0 columns: one that does not know its size."""
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "40"}
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | terminal
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


def test_a_gallery(index: Path, pictures: Path, tmp_path: Path, run: Run) -> None:
    page = tmp_path / "found.html"
    printed = run("search", index, "<b>heart</b>", "--image", pictures / "a.png", "--html", page)
    assert printed.strip() == str(page)
    text = page.read_text()
    assert text.count("<figure") == 4 and text.count("data:image/jpeg") == 5
    assert "<b>heart" not in text and "<script" not in text and not re.search("https?:", text)


def test_mistakes(index: Path, tmp_path: Path, model_folder: Path, capsys: Captured) -> None:
    none, options = str(tmp_path / "none"), ["--model", str(model_folder), "--output", str(tmp_path / "i")]
    for words, message in (
        (["search", str(index)], "nothing to look for"),
        (["search", str(index), "a", "heart", "-k", "0"], "k is 0"),
        (["search", str(index), "a heart", "--where", "nothing"], "'nothing'"),
        (["search", str(index), "--like", "x"], "no image 'x'"),
        (["search", str(index), "--image", "nowhere.png"], "no file nowhere.png"),
        (["search", none, "a heart"], "no index at"),
        (["index", *options], "IMAGE"),
        (["index", none, *options], "no file"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "i" / "images.lance").exists()


def test_without_the_extra(index: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    again = ["index", str(pictures), "--output", str(index)]
    (pictures / "new.png").write_bytes((pictures / "a.png").read_bytes())
    for module, extra, commands in (
        ("ray", "ray", [[*again, "--engine", "ray"]]),
        ("lancedb", "search", [["search", str(index), "a heart"], again]),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        for words in commands:
            assert main(words) == 2
            assert f"pip install 'tercet[{extra}]'" in capsys.readouterr().err
