"""Every downstream task on synthetic scenes, from a pre-trained model and from random weights, side by side, as JSON.

    make demo
    tercet data scenes vqa entailment nlvr grounding
    OMP_NUM_THREADS=1 python benchmarks/tasks.py --init runs/demo/model --output runs/tasks
    python benchmarks/tasks.py --init runs/demo/model --output runs/tasks --tasks vqa --set train.max_steps=200

The two runs of a task are the recipe `demo-TASK`, after those that prepare it (`demo-vqa-first` and
`demo-vqa-referred`; `demo-nlvr-pretrain`, as published, and `demo-nlvr-first`), with the same seed, data, steps and
tokenizer (that of the model, so that both read the same word pieces); one begins with the model's weights and the
other with random ones.  The question answering models are also evaluated on grounding.  Both run at the same time, so
that a busy machine slows them alike.  A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DATA = "runs/demo/data"
TASKS = ("vqa", "entailment", "nlvr", "grounding")
PREPARATIONS = {"vqa": ("vqa-first", "vqa-referred"), "nlvr": ("nlvr-pretrain", "nlvr-first")}
STARTS = ("pre-trained", "random")
METRICS = {
    "vqa": ("accuracy", "all"),
    "entailment": ("entailment", "accuracy"),
    "nlvr": ("nlvr", "accuracy"),
    "grounding": ("pointing", "all"),
}


def commands_of(task: str, start: str, output: Path, init: str, settings: list[str]) -> dict[Path, list[str]]:
    """The folders of one run, each with its command: those that prepare the task, then its own."""
    flags = [part for setting in settings for part in ("--" + setting.split("=", 1)[0], setting.split("=", 1)[1])]
    origin = ["--init", init] if start == "pre-trained" else ["--data.tokenizer", f"{init}/tokenizer.json"]
    commands: dict[Path, list[str]] = {}
    for recipe in (*PREPARATIONS.get(task, ()), task):
        folder = output / f"{recipe}-{start}"
        commands[folder] = ["tercet", "train", f"demo-{recipe}", *origin, "--output", str(folder), *flags]
        origin = ["--init", str(folder / "model")]
    return commands


def perform(commands: dict[Path, list[str]]) -> None:
    """Run the commands one after the other, except those that are done; exits where one fails."""
    for folder, command in commands.items():
        if (folder / "model").is_dir():
            continue
        log = folder.with_name(f"{folder.name}.log")
        with log.open("wb") as stream:
            done = subprocess.run([sys.executable, "-m", *command], stdout=stream, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{folder}: {log.read_text().splitlines()[-1]}")


def run_pair(task: str, output: Path, init: str, settings: list[str]) -> dict[str, dict[str, Any]]:
    """Train and evaluate both runs of a task side by side, and read what they measured."""
    runs = {start: commands_of(task, start, output, init, settings) for start in STARTS}
    with ThreadPoolExecutor(len(STARTS)) as pool:
        list(pool.map(perform, runs.values()))
    return {
        start: {
            "commands": [" ".join(command) for command in commands.values()],
            **measured(task, list(commands)),
            **({"pointing": pointing(list(commands)[-1])} if task == "vqa" else {}),
        }
        for start, commands in runs.items()
    }


def pointing(run: Path) -> dict[str, Any]:
    """Pointing accuracy of a question answering run, by heatmaps of its answers."""
    data = ["--data", f"{DATA}/grounding-test.jsonl", "--data.detections", f"{DATA}/detections.json"]
    command = [sys.executable, "-m", "tercet", "evaluate", str(run), "--task", "grounding", *data]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{run}: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout)


def measured(task: str, runs: list[Path]) -> dict[str, Any]:
    """Steps and minutes of finished runs together, and the test split's numbers of the last."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()] for run in runs]
    trained = [[line for line in log if line["kind"] == "train"] for log in logs]
    found = [line for line in logs[-1] if line["kind"] == "evaluate" and line["data"] == "test"][-1]
    group, name = METRICS[task]
    numbers = {key: value for key, value in found.items() if isinstance(value, dict) and key not in ("size", "list")}
    return {
        "steps": sum(steps[-1]["step"] for steps in trained),
        "minutes": round(sum(steps[-1]["time"] - steps[0]["time"] for steps in trained) / 60, 1),
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
