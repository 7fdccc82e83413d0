"""Start-up times: `tercet --help`, `import tercet`, and loading a base model's folder, as one JSON line.

    python benchmarks/startup.py            # medians of 10, each in a process of its own; a base model of 0.84 GB
    python benchmarks/startup.py --quick    # a small model

`ours` is the time to load the folder, `plain` the time to read its bytes, and `ratio` the second over the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from machine import processor_name
from step import QUICK_MODEL
from tercet.config import ModelConfig
from tercet.data.tokenizer import Tokenizer
from tercet.model.hub import load_model, save_model
from tercet.model.tercet import Tercet


def median_of(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a run, the median of several."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def time_process(code: list[str], repeats: int) -> float:
    """Seconds of a whole process of Python with these arguments."""
    return median_of(lambda: subprocess.run([sys.executable, *code], check=True, stdout=subprocess.DEVNULL), repeats)


def write_folder(folder: Path, quick: bool) -> int:
    """A model's folder of random weights; its bytes."""
    tokenizer = Tokenizer.train(["a red circle left of a blue square"] * 4, 80)
    sizes = QUICK_MODEL if quick else {}
    config = ModelConfig.model_validate(sizes)
    special = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "cls", "sep", "mask")}
    text = config.text.model_copy(update={**special, "vocabulary_size": tokenizer.vocabulary_size})
    model = Tercet(config.model_copy(update={"text": text}))
    model.tokenizer = tokenizer
    save_model(model, folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def read_bytes(folder: Path) -> None:
    """Every byte of a folder into memory."""
    for file in folder.iterdir():
        file.read_bytes()


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Time all of it."""
    repeats = arguments.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        size = write_folder(folder, arguments.quick)
        read_bytes(folder)
        load_model(folder)
        load, read = [], []
        for _ in range(repeats):
            load.append(median_of(lambda: load_model(folder), 1))
            read.append(median_of(lambda: read_bytes(folder), 1))
    loaded, bytes_read = statistics.median(load), statistics.median(read)
    nothing = time_process(["-c", "pass"], repeats)
    return {
        "name": "startup",
        "ours": round(loaded, 4),
        "plain": round(bytes_read, 4),
        "ratio": round(bytes_read / loaded, 3),
        "unit": "seconds to load a model's folder, and to read its bytes",
        "size": "small" if arguments.quick else "base",
        "folder_mb": round(size / 1e6, 1),
        "help_seconds": round(time_process(["-m", "tercet", "--help"], repeats), 3),
        "import_seconds": round(time_process(["-c", "import tercet"], repeats) - nothing, 3),
        "python_alone_seconds": round(nothing, 3),
        "repeats": repeats,
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, under 50 s on 2 cores")
    parser.add_argument("--repeats", type=int, default=10, help="times each")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
