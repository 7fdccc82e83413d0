"""Tables and progress on the terminal: drawn where somebody looks at them, plain text elsewhere."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

RECALL_COLUMNS = {
    "text_r1": "text R@1",
    "text_r5": "R@5",
    "text_r10": "R@10",
    "image_r1": "image R@1",
    "image_r5": "R@5",
    "image_r10": "R@10",
    "r_mean": "mean",
}
RECALL_ROWS = {"dual": "dual encoder", "reranked": "re-ranked"}
PROGRESS_SECONDS = 10.0


def print_metrics(metrics: dict[str, Any]) -> None:
    """Recall as one table with a row for each way of ranking; any other metrics group by group."""
    if not metrics.keys() & RECALL_ROWS.keys():
        for group, numbers in metrics.items():
            _print_group(group, numbers)
        return
    rows = [
        [title, *(f"{metrics[row][column]:.2f}" for column in RECALL_COLUMNS)]
        for row, title in RECALL_ROWS.items()
        if metrics.get(row)
    ]
    print_table(["", *RECALL_COLUMNS.values()], rows)


def _print_group(group: str, numbers: dict[str, float]) -> None:
    """One number a row; those named `LABEL_as_PREDICTED` as the confusion matrix that they are."""
    cells = [name.split("_as_") for name in numbers]
    if all(len(cell) == 2 for cell in cells):
        labels, predicted = (list(dict.fromkeys(cell[side] for cell in cells)) for side in (0, 1))
        rows = [[label, *(f"{numbers[f'{label}_as_{name}']:.0f}" for name in predicted)] for label in labels]
        print_table([f"{group}: label, then predicted", *predicted], rows)
        return
    print_table([group, ""], [[name, f"{value:.2f}"] for name, value in numbers.items()])


def print_table(header: list[str], rows: list[list[str]], pictures: Sequence[RenderableType] = ()) -> None:
    """A table; `pictures`, none or one for each row, are drawn before it on a terminal."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # As plain text: a label or caption may hold square brackets, which Rich would read as a style.
        console, table = Console(), Table(show_lines=bool(pictures))
        if pictures:
            table.add_column(min_width=max(console.measure(picture).minimum for picture in pictures))
        for title in header:
            table.add_column(Text(title), overflow="fold")  # an id or a path that is cut off is of no use
        for number, row in enumerate(rows):
            table.add_row(*pictures[number : number + 1], *map(Text, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def can_draw_pictures() -> bool:
    """Whether there is a terminal that has colours enough for a picture, knows its size and can be asked about it."""
    from rich.console import Console

    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return all(os.get_terminal_size(sys.stdout.fileno())) and Console().color_system in ("256", "truecolor", "windows")


def print_problems(label: str, problems: Collection[str], shown: int = 10) -> None:
    """Print the first of what was skipped or rejected, and how many more there are."""
    for problem in itertools.islice(problems, shown):
        print(f"{label}: {problem}", file=sys.stderr)
    if len(problems) > shown:
        print(f"{label}: {len(problems) - shown:,} more", file=sys.stderr)


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Something to call with how many are done and how many there are; else prints now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    printed = started = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if done and now - printed > PROGRESS_SECONDS:
            printed = now
            print(f"{what}: {done:,} of {total:,} {unit}, {done / (now - started):.1f} a second", file=sys.stderr)

    yield show
