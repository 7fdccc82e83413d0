"""Every command of the documentation is one that exists: parsed here, and those marked as runnable run."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from scene_files import png_of
from tercet.arguments import CommandParser
from tercet.cli import COMMANDS, load_command, main
from tercet.config_io import dump_config, load_config
from tercet.model.hub import save_model
from tiny_model import SCENES, make_model

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- run(?:: (\w+))? -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
EXTRAS = {"search": "lancedb", "export": "onnxruntime"}  # packages of extras that runnable blocks need


class Block(NamedTuple):
    """A block of code on a page, whether it is marked as runnable, and the extra that it needs."""

    page: str
    number: int
    runs: str | None
    extra: str | None
    language: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}#{self.number}"

    def commands(self) -> Iterator[list[str]]:
        """The words of each `tercet` command, with variables of the block put in and without what sets a variable."""
        variables: dict[str, str] = {}
        for line in self.body.replace("\\\n", " ").splitlines():
            assignment = re.fullmatch(r"(\w+)=(\"?)(.*)\2", line.strip())
            if assignment and not line.startswith("OMP_"):
                variables[assignment[1]] = assignment[3]
            for name, value in sorted(variables.items(), key=lambda item: -len(item[0])):
                line = line.replace(f"${name}", value)
            # Of the variables of earlier blocks, those that hold a folder stand for one; the others hold flags.
            words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"\$\w+", word)]
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in ("nice", "-n", "10")):
                words = words[1:]
            if words[:1] == ["torchrun"] and "tercet" in words:
                words = words[words.index("tercet") :]
            if words[:1] == ["tercet"]:
                yield words[1:]


BLOCKS = [
    Block(page.name, number, *match.groups())
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text("utf-8")), 1)
]
SHELL = [block for block in BLOCKS if block.language == "sh" and list(block.commands())]


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_understood(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: retrieval-coco\n")
    for words in block.commands():
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
        assert name is not None, f"{block}: no command {words[0]!r}"
        parser = CommandParser(load_command(name), name)
        given = parser.read(words[len(name.split()) :])
        if given.get("recipe"):  # the config is valid, whether or not the model that it starts from is there
            load_config(given["recipe"], {key: value for key, value in given.items() if key in parser.keys})


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages mention: a demo run, images with captions, a photo."""
    for index, scene in enumerate(SCENES * 6):
        part = tmp_path / ("my_folder" if index % 4 else "held_out")
        part.mkdir(exist_ok=True)
        (part / f"{index}.png").write_bytes(png_of(scene))
        (part / f"{index}.txt").write_text("\n".join(scene.captions))
    (tmp_path / "photo.jpg").write_bytes(png_of(SCENES[0]))
    run = tmp_path / "runs" / "demo"
    save_model(make_model(), run / "model")
    (run / "config.yaml").write_text(dump_config(load_config("demo")))
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL if block.runs}))
def test_marked_commands_of_a_page_run_in_order(page: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page != "start.md":  # which trains it
        shutil.copytree("runs/demo", "runs/mine")
    for block in (block for block in SHELL if block.runs and block.page == page):
        if block.extra and importlib.util.find_spec(EXTRAS[block.extra]) is None:
            continue
        for words in block.commands():
            short = ["--train.max_steps", "2", "--data.workers", "0"] if words[0] == "train" else []
            assert main([*words, *short]) == 0, f"{block}: {capsys.readouterr().err}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_is_valid(block: Block) -> None:
    ast.parse(block.body)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target and not target.startswith("reference/"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_site

    build(load_site(str(REPOSITORY / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    built = (tmp_path / "site" / "reference" / "config.html").read_text("utf-8")
    assert "objectives.queue_size" in built and "features kept from earlier batches" in built
    assert "tercet convert" in (tmp_path / "site" / "reference" / "cli.html").read_text("utf-8")
    pages = [page.read_text("utf-8") for page in (tmp_path / "site").rglob("*.html")]
    assert not [page for page in pages if re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', page)]
