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
from tercet.errors import TercetError
from tercet.search.index import Index
from tercet.search.searcher import Query, Searcher
from tiny_model import SCENES

PICTURES, KILLS = 3000, 20
# The command itself, committing often, and telling after each commit how many rows are there.
INDEX = """
import sys
from tercet.search import building, writing
building.COMMIT_IMAGES = 32
commit = writing.TableWriter.commit
def told(self):
    commit(self)
    print(self.index.table.count_rows(), flush=True)
writing.TableWriter.commit = told
print("ready", flush=True)
from tercet.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_random_moments(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    data = [SCENES.image(number) for number in range(4)]
    for number in range(PICTURES):
        (folder / f"{number:05d}.png").write_bytes(data[number % 4])
    path = tmp_path / "index"
    command = [sys.executable, "-c", INDEX, "index", str(folder), "--model", str(model_folder), "--to", str(path)]
    model = tercet.load(model_folder)
    rng = random.Random(0)
    committed = kills = 0
    ids: set[str] = set()
    while kills < KILLS:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # From before the first commit to the middle of some later one; in most turns after one, so that it goes on.
        if kills % 5:
            line = process.stdout.readline()
            committed = max(committed, int(line)) if line.strip().isdigit() else committed
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        rest, errors = process.communicate()
        counts = [int(line) for line in rest.split() if line.isdigit()]
        committed = max([committed, *counts])
        assert "Traceback" not in errors, errors
        kills += 1
        try:
            index = Index.open(str(path))
        except TercetError:
            assert committed == 0
            continue
        table = index.table.to_arrow()
        found = table["id"].to_pylist()
        assert len(found) == len(set(found)) == index.count >= committed
        assert ids <= set(found)
        ids = set(found)
        if ids:
            assert len(Searcher(index, model).search(Query(text="a red circle", k=5))) == min(5, len(ids))
            assert index.thumbnail(found[0])
        if len(ids) == PICTURES:
            shutil.rmtree(path)
            committed, ids = 0, set()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{PICTURES:,} images" in done.stdout and Index.open(str(path)).count == PICTURES
