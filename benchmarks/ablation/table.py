"""The results of a grid: means with standard errors, the paired difference to the baseline, and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from grid import Grid

from tercet.files import write_atomic

# Two-sided 95 % points of Student's t, by degrees of freedom; beyond the table the normal value.
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

METRICS = {
    "text→image R@10": ("dual", "image_r10"),
    "image→text R@10": ("dual", "text_r10"),
    "mean recall": ("dual", "r_mean"),
    "re-ranked mean recall": ("reranked", "r_mean"),
    "alignment": ("embeddings", "alignment"),
    "image uniformity": ("embeddings", "image_uniformity"),
    "text uniformity": ("embeddings", "text_uniformity"),
    "neighbourhood kept": ("neighbourhood", "kept"),
}
COMPARED = ("dual", "r_mean")


def write_results(grid: Grid, results: Sequence[dict[str, Any]], folder: Path) -> str:
    """Write `table.md` and `plot.png` into `folder`.

    Returns:
        The table.
    """
    table = "\n\n".join(one_table(grid, results, noise) for noise in grid.noise)
    write_atomic(folder / "table.md", table + "\n")
    draw(grid, results, folder / "plot.png")
    return table


def one_table(grid: Grid, results: Sequence[dict[str, Any]], noise: float) -> str:
    """A Markdown table, a row a cell, of the runs with one share of noise."""
    header = ["cell", "seeds", *METRICS, f"mean recall − {grid.baseline}", "minutes"]
    lines = [f"Shuffled captions: {noise:.0%}", "", row(header), row(["---"] * len(header))]
    for cell in grid.cells:
        runs = [result for result in results if result["cell"] == cell and result["noise"] == noise]
        if not runs:
            lines.append(row([cell, "0", *["not run"] * (len(header) - 2)]))
            continue
        measured = [mean_and_error(values(runs, *metric)) for metric in METRICS.values()]
        minutes = f"{statistics.mean(run['minutes'] for run in runs):.1f}"
        lines.append(row([cell, str(len(runs)), *measured, difference(grid, results, cell, noise), minutes]))
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def values(runs: Sequence[dict[str, Any]], group: str, name: str) -> list[float]:
    """A metric on the test split of every run that has it."""
    return [run["test"][group][name] for run in runs if run["test"].get(group)]


def mean_and_error(numbers: Sequence[float]) -> str:
    """`mean ± standard error`; of one number the number alone."""
    if not numbers:
        return "—"
    if len(numbers) == 1:
        return f"{numbers[0]:.2f}"
    return f"{statistics.mean(numbers):.2f} ± {statistics.stdev(numbers) / math.sqrt(len(numbers)):.2f}"


def difference(grid: Grid, results: Sequence[dict[str, Any]], cell: str, noise: float) -> str:
    """Mean difference to the baseline over the seeds that both have, with its 95 % interval by a paired t test."""
    if cell == grid.baseline:
        return "0"

    def by_seed(name: str) -> dict[int, float]:
        runs = [result for result in results if result["cell"] == name and result["noise"] == noise]
        return {run["seed"]: run["test"][COMPARED[0]][COMPARED[1]] for run in runs}

    own, base = by_seed(cell), by_seed(grid.baseline)
    gaps = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    if not gaps:
        return "—"
    if len(gaps) == 1:
        return f"{gaps[0]:+.2f}"
    half = T_95.get(len(gaps) - 1, 1.96) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{statistics.mean(gaps):+.2f} ± {half:.2f}"


def draw(grid: Grid, results: Sequence[dict[str, Any]], file: Path) -> None:
    """Mean recall of each cell with its standard error: against the noise, or as bars where there is one share."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    measured = [cell for cell in grid.cells if any(result["cell"] == cell for result in results)]
    for index, cell in enumerate(measured):
        points = []
        for noise in grid.noise:
            runs = [result for result in results if result["cell"] == cell and result["noise"] == noise]
            numbers = values(runs, *COMPARED)
            if numbers:
                error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
                points.append((100 * noise, statistics.mean(numbers), error))
        if not points:
            continue
        shares, means, errors = zip(*points, strict=True)
        if len(grid.noise) > 1:
            axes.errorbar(shares, means, errors, marker="o", capsize=3, label=cell)
        else:
            axes.barh(index, means[0], xerr=errors[0], capsize=3, label=cell)
    if len(grid.noise) > 1:
        axes.set(xlabel="captions shuffled between images (%)", ylabel="mean recall on the test split (%)")
        axes.legend()
    else:
        axes.set(xlabel="mean recall on the test split (%)", yticks=range(len(measured)))
        axes.set_yticklabels(measured)
        axes.invert_yaxis()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
