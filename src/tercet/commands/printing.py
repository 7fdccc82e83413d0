"""Tables of numbers on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = {
    "text_r1": "text R@1",
    "text_r5": "R@5",
    "text_r10": "R@10",
    "image_r1": "image R@1",
    "image_r5": "R@5",
    "image_r10": "R@10",
    "r_mean": "mean",
}
ROWS = {"dual": "dual encoder", "reranked": "re-ranked"}


def print_metrics(metrics: dict[str, Any]) -> None:
    """Recall as one table, a row a way of ranking; any other metrics group by group."""
    if not metrics.keys() & ROWS.keys():
        for group, numbers in metrics.items():
            _print_group(group, numbers)
        return
    rows = [
        [meaning, *(f"{metrics[row][column]:.2f}" for column in COLUMNS)]
        for row, meaning in ROWS.items()
        if metrics.get(row)
    ]
    print_table(["", *COLUMNS.values()], rows)


def _print_group(group: str, numbers: dict[str, float]) -> None:
    """Numbers one below another; those named `RIGHT_as_CHOSEN` as the matrix that they are."""
    cells = [name.split("_as_") for name in numbers]
    if all(len(cell) == 2 for cell in cells):
        chosen = list(dict.fromkeys(cell[1] for cell in cells))
        rights = dict.fromkeys(cell[0] for cell in cells)
        rows = [[right, *(f"{numbers[f'{right}_as_{name}']:.0f}" for name in chosen)] for right in rights]
        print_table([f"{group}: right, then chosen", *chosen], rows)
        return
    print_table([group, ""], [[name, f"{value:.2f}"] for name, value in numbers.items()])


def print_table(header: list[str], rows: list[list[str]], pictures: Sequence[RenderableType] = ()) -> None:
    """A drawn table on a terminal, aligned plain text elsewhere.

    Args:
        header: a title for each column.
        rows: cells as they are to be read.
        pictures: none, or one for each row, drawn before it; on a terminal alone.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # As plain text: a label or caption of the user's may hold square brackets, which Rich would read as a style.
        console, table = Console(), Table(show_lines=bool(pictures))
        if pictures:
            table.add_column(min_width=max(console.measure(picture).minimum for picture in pictures))
        for title in header:
            table.add_column(Text(title), overflow="fold")  # an id or a path that is cut off is of no use
        for number, row in enumerate(rows):
            table.add_row(*pictures[number : number + 1], *map(Text, row))
        console.print(table)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def shows_pictures() -> bool:
    """Whether there is a terminal that has colours enough for a picture, knows its size and can be asked about it."""
    from rich.console import Console

    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return all(os.get_terminal_size(sys.stdout.fileno())) and Console().color_system in ("256", "truecolor", "windows")
