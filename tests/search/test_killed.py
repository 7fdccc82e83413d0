"""Killing `tercet index` at any moment: the table opens, search answers, and what was committed stays."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tercet
from scene_files import png_of
from tercet.errors import TercetError
from tercet.search.index import Index
from tercet.search.search import Query, Searcher
from tiny_model import SCENES

PICTURES, KILLS = 3000, 20
# The command itself, which commits often and prints after each commit how many rows there are.
INDEX = """
import sys
from tercet.search import build
build.COMMIT_IMAGES = 32
commit = build.commit
def reported(index, *arguments):
    commit(index, *arguments)
    print(index.table.count_rows(), flush=True)
build.commit = reported
print("ready", flush=True)
from tercet.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_random_moments(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    data = [png_of(SCENES[number]) for number in range(4)]
    for number in range(PICTURES):
        (folder / f"{number:05d}.png").write_bytes(data[number % 4])
    path = tmp_path / "index"
    command = [sys.executable, "-c", INDEX, "index", str(folder), "--model", str(model_folder), "--output", str(path)]
    predictor = tercet.load(model_folder)
    rng = random.Random(0)
    committed = 0
    ids: set[str] = set()
    for kill in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # From before the first commit to the middle of some later one; mostly after one, so that the next goes on.
        if kill % 5:
            line = process.stdout.readline()
            committed = max(committed, int(line)) if line.strip().isdigit() else committed
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        rest, errors = process.communicate()
        committed = max([committed, *(int(line) for line in rest.split() if line.isdigit())])
        assert "Traceback" not in errors, errors
        try:
            index = Index.open(str(path))
        except TercetError:
            assert committed == 0
            continue
        found = index.table.to_arrow()["id"].to_pylist()
        assert len(found) == len(set(found)) == index.count >= committed
        assert ids <= set(found)
        ids = set(found)
        if ids:
            assert len(Searcher(index, predictor).search(Query(text="a red circle", k=5))) == min(5, len(ids))
            assert index.thumbnail(found[0])
        if len(ids) == PICTURES:
            shutil.rmtree(path)
            committed, ids = 0, set()
    subprocess.run(command, capture_output=True, text=True, check=True)
    assert Index.open(str(path)).count == PICTURES
