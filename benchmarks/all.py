"""Every benchmark of this folder, one after another: one JSON file, one table, one plot of cost against size.

    python benchmarks/all.py --quick --output bench        # small models, some minutes
    python benchmarks/all.py --output bench                # base size

Writes `benchmarks.json`, `benchmarks.md` and `benchmarks.png`.  The plot shows what a step costs by batch and by
caption length, and a re-ranked pair by image size and by candidates (k).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
NAMES = ("step", "rerank", "encode", "pipeline", "startup", "memory")


@dataclass(frozen=True)
class Sweep:
    """A benchmark over one size.

    Attributes:
        name: the benchmark.
        option: what changes.
        values: of the option.
        label: of the axis.
        rest: other options.
    """

    name: str
    option: str
    values: tuple[int, ...]
    label: str
    rest: tuple[str, ...] = field(default=())


STEP = ("--steps", "1", "--warm-up", "1")
SWEEPS = (
    Sweep("step", "--batch", (1, 2, 4, 8), "pairs a step", STEP),
    Sweep("step", "--caption-tokens", (8, 16, 24, 32), "word pieces of a caption", STEP),
    Sweep("rerank", "--image-size", (224, 288, 384, 480), "image size, px", ("--rounds", "1")),
    Sweep("rerank", "--captions", (16, 32, 64, 128), "candidates of an image (k)", ("--rounds", "1")),
)


def run(name: str, options: list[str]) -> dict[str, Any] | None:
    """The JSON line of a benchmark; None, with a line on stderr, where it failed or does not exist."""
    script = HERE / f"{name}.py"
    if not script.is_file():
        print(f"{script.name} does not exist; skipped", file=sys.stderr)
        return None
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{script.name} {' '.join(options)} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


def run_sweep(sweep: Sweep, quick: list[str]) -> dict[str, Any]:
    """Results by the size that changes, without failed runs."""
    results = {str(value): run(sweep.name, [*quick, *sweep.rest, sweep.option, str(value)]) for value in sweep.values}
    kept = {value: result for value, result in results.items() if result is not None}
    return {"name": sweep.name, "option": sweep.option, "label": sweep.label, "results": kept}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| benchmark | ours | plain | ratio | unit |", "|---|---|---|---|---|"]
    for result in results:
        cells = [str(result.get(key)) for key in ("name", "ours", "plain", "ratio", "unit")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def draw(sweeps: list[dict[str, Any]], file: Path) -> None:
    """Cost against size, one panel a sweep."""
    figure, axes = pyplot.subplots(1, len(sweeps), figsize=(4 * len(sweeps), 3.4), layout="constrained", squeeze=False)
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        sizes = [int(value) for value in sweep["results"]]
        for kind, style in (("plain", "o--"), ("ours", "o-")):
            costs = [result[kind] for result in sweep["results"].values()]
            if costs and None not in costs:
                axis.plot(sizes, costs, style, label=kind)
        axis.set(title=sweep["name"], xlabel=sweep["label"], ylabel="seconds a pair", xticks=sizes)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if sizes:
            axis.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run, write, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder to write to")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these benchmarks alone")
    parser.add_argument("--no-sweeps", dest="sweeps", action="store_false", help="without the plot")
    arguments = parser.parse_args()
    quick = ["--quick"] if arguments.quick else []
    results = [result for name in arguments.only if (result := run(name, quick)) is not None]
    chosen = [sweep for sweep in SWEEPS if arguments.sweeps and sweep.name in arguments.only]
    sweeps = [run_sweep(sweep, quick) for sweep in chosen]
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = json.dumps({"benchmarks": results, "sweeps": sweeps}, indent=2) + "\n"
    (arguments.output / "benchmarks.json").write_text(written, "utf-8")
    (arguments.output / "benchmarks.md").write_text(table(results), "utf-8")
    if sweeps:
        draw(sweeps, arguments.output / "benchmarks.png")
    print(table(results), end="")
    if len(results) < len(arguments.only):
        sys.exit(f"{len(arguments.only) - len(results)} of {len(arguments.only)} benchmarks gave no result")


if __name__ == "__main__":
    main()
