"""The ablation harness on scenes: it runs missing cells, continues after a stop, and compares with the baseline."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scene_files import png_of, scene_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "ablation"))

from grid import read_grid
from noise import shuffle_captions
from table import difference, mean_and_error

from tercet.config_io import load_config
from tercet.data.scenes import split_scenes
from tercet.errors import TercetError
from tiny_run import TINY_MODEL

ABLATION = Path(__file__).resolve().parents[2] / "benchmarks" / "ablation"
TINY = TINY_MODEL | {"data.tokenizer_texts": [], "data.workers": 0, "data.tokenizer_size": 150}
TINY |= {"train.max_steps": 2, "train.batch_size": 8, "evaluate.limit": 16}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("file", sorted(ABLATION.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_cell_of_the_shipped_grids_is_a_valid_config(file: Path) -> None:
    grid = read_grid(file)
    runs = list(grid.runs())
    assert len({one.name for one in runs}) == len(runs) == len(grid.cells) * len(grid.noise) * len(grid.seeds)
    for one in runs:
        load_config(grid.recipe, one.flags)


def test_a_grid_without_its_baseline_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("{recipe: demo, baseline: b, cells: {a: {}}}")
    with pytest.raises(TercetError, match="baseline 'b' is none of the cells a"):
        read_grid(file)


def test_shuffled_captions_belong_to_other_images(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([{"image": f"{index}.jpg", "caption": [str(index)]} for index in range(50)]))
    noisy = shuffle_captions(file, 0.4, seed=3)
    rows = json.loads(noisy.read_text())
    assert sorted(row["caption"][0] for row in rows) == sorted(map(str, range(50)))
    assert sum(row["image"] != f"{row['caption'][0]}.jpg" for row in rows) == 20
    assert shuffle_captions(file, 0.4, seed=3) == noisy
    assert shuffle_captions(file, 0.4, seed=4).read_text() != noisy.read_text()
    assert shuffle_captions(file, 0.0, seed=3) == file


def test_means_and_paired_differences() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == f"2.00 ± {1 / math.sqrt(3):.2f}"
    assert mean_and_error([]) == "—"
    grid = read_grid(ABLATION / "objectives.yaml")
    results = [
        {"cell": cell, "noise": 0.0, "seed": seed, "test": {"dual": {"r_mean": base + gain}}}
        for seed, base in enumerate((10.0, 20.0, 30.0))
        for cell, gain in (("cma", 0.0), ("cma+imc", 1.0 + 0.1 * seed))
    ]
    assert difference(grid, results, "cma+imc", 0.0) == f"+1.10 ± {4.303 * 0.1 / math.sqrt(3):.2f}"
    assert difference(grid, results, "cma+lmi", 0.0) == "—"


def test_a_grid_runs_and_continues(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    cells = {"both": {"objectives.itm": 0, "objectives.mlm": 0}, "cma": {"objectives.imc": 0, "objectives.lmi": 0}}
    content = {"recipe": "demo", "overrides": TINY, "cells": cells, "baseline": "cma", "seeds": [0], "noise": [0.5]}
    grid.write_text(yaml.safe_dump(content))
    folder = tmp_path / "runs"
    splits = {f"--{split}": scene_file(split, 16) for split in ("train", "validation", "test")}
    data = [*itertools.chain(*splits.items()), "--output", str(folder)]
    command = [sys.executable, str(ABLATION / "run.py"), str(grid), *data, "--jobs", "2"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    results = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/result.json")}
    assert set(results) == {f"{cell}-noise50-seed0" for cell in cells}
    for result in results.values():
        assert 0 <= result["test"]["dual"]["r_mean"] <= 100
        assert {"embeddings", "neighbourhood"} <= result["test"].keys()
    assert not list(folder.glob("*/checkpoints"))
    kept = {file.name for file in (folder / "both-noise50-seed0").iterdir()}
    assert kept == {"config.yaml", "metrics.jsonl", "run.json", "result.json"}
    assert "Shuffled captions: 50%" in (folder / "table.md").read_text()
    assert (folder / "plot.png").stat().st_size > 1000

    (folder / "plot.png").unlink()
    table = (folder / "table.md").read_text()
    table_only = run(*command, "--table")
    assert table_only.returncode == 0 and "done in" not in table_only.stdout
    assert (folder / "table.md").read_text() == table and (folder / "plot.png").is_file()

    (folder / "both-noise50-seed0" / "result.json").unlink()
    (folder / "both-noise50-seed0" / "config.yaml").unlink()
    other = run(*command, "--only", "cma-*")
    assert other.returncode == 0 and "done in" not in other.stdout
    wrong = run(*command, "--only", "imc-*")
    assert wrong.returncode == 1 and "is named imc-*; see --dry-run" in wrong.stderr
    again = run(*command)
    assert again.stdout.count("done in") == 1
    remade = json.loads((folder / "both-noise50-seed0" / "result.json").read_text())
    assert remade["test"] == results["both-noise50-seed0"]["test"]


def test_filtering_after_noise_keeps_as_many_pairs_as_are_right_and_trains_on_them(tmp_path: Path) -> None:
    scenes = list(split_scenes("validation", 20))
    for index in range(20):
        (tmp_path / f"{index}.png").write_bytes(png_of(scenes[index]))
    rows = [{"image": f"{index}.png", "caption": scenes[index].captions[0]} for index in range(20)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    folder, data = tmp_path / "runs", str(tmp_path / "own.json")
    sources = ["--train", data, "--validation", data, "--test", data, "--output", str(folder)]
    settings = {**TINY, "train.max_steps": None, "data.tokenizer_texts": None}
    keys = [f"{key}={value}" for key, value in settings.items() if value is not None]
    command = [sys.executable, str(ABLATION / "winback.py"), *sources, "--seeds", "0", "--noise", "0.5", "--set", *keys]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len((folder / "kept-noise50-seed0.jsonl").read_text().splitlines()) == 10
    (row,) = report["seeds"]
    assert row["right_before"] == 50
    assert 0 < row["right_kept"] < 100
    assert 0 <= row["all"] <= 100
    again = run(*command)
    assert again.stdout == done.stdout
