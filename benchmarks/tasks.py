"""Every downstream task on drawn scenes, from a pre-trained model and from random weights, side by side, as JSON.

    make demo
    OMP_NUM_THREADS=1 python benchmarks/tasks.py --init runs/demo/model --output runs/tasks
    python benchmarks/tasks.py --init runs/demo/model --output runs/tasks --tasks vqa --set data.scenes=2000

The two runs of a task are the recipe `demo-TASK` with the same seed, data, steps and tokenizer (that of the model, so
that both read the same word pieces); one begins with the model's weights and the other with random ones.  They run at
the same time, so that a busy machine slows both alike.  A run that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TASKS = ("vqa", "entailment", "nlvr", "grounding")
STARTS = ("pre-trained", "random")
MEASURES = {
    "vqa": ("accuracy", "all"),
    "entailment": ("entailment", "accuracy"),
    "nlvr": ("nlvr", "accuracy"),
    "grounding": ("pointing", "all"),
}


def command_of(task: str, start: str, folder: Path, init: str, settings: list[str]) -> list[str]:
    """The command of one run."""
    origin = ["--init", init] if start == "pre-trained" else ["--data.tokenizer", f"{init}/tokenizer.json"]
    flags = [part for setting in settings for part in ("--" + setting.split("=", 1)[0], setting.split("=", 1)[1])]
    return ["tercet", "train", f"demo-{task}", *origin, "--output", str(folder), *flags]


def run_pair(task: str, output: Path, init: str, settings: list[str]) -> dict[str, dict[str, Any]]:
    """Train and evaluate both runs of a task side by side, and read what they measured."""
    commands = {start: command_of(task, start, output / f"{task}-{start}", init, settings) for start in STARTS}
    running: list[tuple[Path, subprocess.Popen[bytes]]] = []
    for start, command in commands.items():
        folder = output / f"{task}-{start}"
        if not (folder / "model").is_dir():
            with (output / f"{task}-{start}.log").open("wb") as log:
                process = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT)
            running.append((folder, process))
    for folder, process in running:
        if process.wait():
            sys.exit(f"{folder}: {Path(f'{folder}.log').read_text().splitlines()[-1]}")
    return {
        start: {"command": " ".join(command), **measured(task, output / f"{task}-{start}")}
        for start, command in commands.items()
    }


def measured(task: str, run: Path) -> dict[str, Any]:
    """Steps, minutes and the test split's numbers of a finished run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    found = [line for line in lines if line["kind"] == "evaluate" and line["data"] == "test"][-1]
    group, name = MEASURES[task]
    numbers = {key: value for key, value in found.items() if isinstance(value, dict) and key not in ("size", "list")}
    return {
        "steps": steps[-1]["step"],
        "minutes": round((steps[-1]["time"] - steps[0]["time"]) / 60, 1),
        "score": found[group][name],
        "numbers": numbers,
        "size": found["size"],
    }


def main() -> None:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="model folder to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config keys of every run")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.time()
    results = {task: run_pair(task, arguments.output, arguments.init, arguments.set) for task in arguments.tasks}
    gains = {task: pair["pre-trained"]["score"] - pair["random"]["score"] for task, pair in results.items()}
    print(json.dumps({"init": arguments.init, "tasks": results, "gain": gains, "seconds": time.time() - started}))


if __name__ == "__main__":
    main()
