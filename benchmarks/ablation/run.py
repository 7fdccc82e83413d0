"""Run a grid of trainings that differ in one thing each, and write one table and one plot of it.

    python benchmarks/ablation/run.py benchmarks/ablation/objectives.yaml --train shards/train-*.tar \\
        --validation shards/val-*.tar --test shards/test-*.tar --output runs/ablation

Every run is a process with one thread, `--jobs` of them at a time.  A grid that was stopped continues where it was,
within a run too.  `--only 'cma*seed0'` performs a part of it; `--table` trains nothing and writes the table and the
plot of the finished runs; `--dry-run` lists the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from grid import Grid, Run, read_grid
from noise import shuffle_captions, unpack
from table import write_results

from tercet.errors import TercetError
from tercet.files import write_atomic

RESULT = "result.json"
# Files that a finished run keeps: kilobytes instead of megabytes.
KEPT = ("config.yaml", "metrics.jsonl", "run.json", RESULT)


@dataclass(frozen=True)
class Sources:
    """Sources of the pairs.

    Attributes:
        train: training pairs; unpacked once where a share of captions is to be shuffled.
        validation: what choices are made by.
        test: what is reported.
    """

    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]

    def flags(self, run: Run, folder: Path) -> list[str]:
        """The data of a run as words of a command line."""
        train = list(self.train)
        if run.noise:
            train = [str(shuffle_captions(unpack(train, folder / "pairs"), run.noise, run.seed))]
        return ["--data.train", *train, "--data.validation", *self.validation, "--data.test", *self.test]


def perform_all(grid: Grid, runs: Sequence[Run], sources: Sources, folder: Path, jobs: int) -> list[str]:
    """Perform all runs, `jobs` at a time; one that fails does not stop the others.

    Returns:
        Messages of the runs that failed.
    """
    failures: list[str] = []
    if any(run.noise for run in runs):
        unpack(sources.train, folder / "pairs")
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(perform, grid, run, sources, folder) for run in runs]:
            try:
                future.result()
            except TercetError as error:
                failures.append(str(error))
    return failures


def perform(grid: Grid, run: Run, sources: Sources, output: Path) -> None:
    """Train and evaluate one run, or continue it, and delete its large files."""
    folder = output / run.name
    if (folder / RESULT).is_file():
        return
    started = time.monotonic()
    train(grid.recipe, [*sources.flags(run, output), *run.command()], folder)
    embeddings = call(folder, "evaluate", str(folder), "--task", "embedding", "--data", *sources.test, "--json")
    splits = last_evaluations(folder / "metrics.jsonl")
    result = {
        "cell": run.cell,
        "noise": run.noise,
        "seed": run.seed,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "validation": splits["validation"],
        "test": splits["test"] | json.loads(embeddings),
    }
    write_atomic(folder / RESULT, json.dumps(result))
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in KEPT:
            entry.unlink()
    print(f"{run.name}: done in {result['minutes']} minutes", flush=True)


def train(recipe: str, flags: Sequence[str], folder: Path) -> None:
    """Train into `folder`, or continue the run in it."""
    if (folder / "config.yaml").is_file():
        call(folder, "train", "--resume", str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        call(folder, "train", recipe, *flags, "--output", str(folder))


def call(folder: Path, *words: str) -> str:
    """Run a command of Tercet with one thread.

    Raises:
        TercetError: it failed; its output is in a log beside the run's folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("a") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "tercet", *words], stdout=subprocess.PIPE, stderr=stream, text=True, env=environment
        )
        stream.write(done.stdout)
    if done.returncode:
        raise TercetError(f"{folder.name} failed (exit {done.returncode}); see {log}")
    return done.stdout


def last_evaluations(metrics: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The last evaluation of each split in a run's metrics."""
    found = {}
    for line in metrics.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "evaluate":
            found[row["data"]] = {key: row[key] for key in ("dual", "reranked") if key in row}
    return found


def main() -> int:
    """Parse, perform the runs, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("grid", type=Path, help="YAML file of the grid")
    parser.add_argument("--train", nargs="+", help="training pairs, as --data.train takes them")
    parser.add_argument("--validation", nargs="+", help="pairs to validate on")
    parser.add_argument("--test", nargs="+", help="pairs to report on")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs, the table and the plot")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="names of the runs to do")
    parser.add_argument("--table", action="store_true", help="write what is finished and train nothing")
    parser.add_argument("--dry-run", action="store_true", help="list the runs")
    options = parser.parse_args()
    if not (options.table or options.dry_run or (options.train and options.validation and options.test)):
        parser.error("runs need --train, --validation and --test; --table and --dry-run do without")
    failures: list[str] = []
    try:
        grid = read_grid(options.grid)
        runs = [run for run in grid.runs() if any(fnmatchcase(run.name, name) for name in options.only)]
        if not runs:
            raise TercetError(f"no run of {options.grid} is named {' or '.join(options.only)}; see --dry-run")
        if options.dry_run:
            for run in runs:
                state = "done" if (options.output / run.name / RESULT).is_file() else "due"
                print(f"{state:<5} {run.name}: {' '.join(run.command())}")
            return 0
        if not options.table:
            sources = Sources(options.train, options.validation, options.test)
            failures += perform_all(grid, runs, sources, options.output, options.jobs)
        results = [json.loads(file.read_text("utf-8")) for file in sorted(options.output.glob(f"*/{RESULT}"))]
        print(write_results(grid, results, options.output))
    except TercetError as error:
        failures.append(str(error))
    for failure in failures:
        print(f"ablation: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
