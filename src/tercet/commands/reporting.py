"""Commands that draw runs: `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tercet.arguments import parse
from tercet.errors import TercetError

COMPARISON = Path("comparison.html")


@dataclass(frozen=True)
class ReportArguments:
    """Write a run's report.html anew, or compare several runs on one page."""

    runs: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folders; of several, one page lays them beside one another"""
    to: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """the page of several runs; default: comparison.html in the current folder"""


def report(arguments: list[str]) -> None:
    """Write a run's report.html anew, or compare several runs on one page."""
    options = parse(ReportArguments, "report", arguments)
    if not options.runs:
        raise TercetError("name a run: tercet report RUN [RUN ...]")
    for run in options.runs:
        if not run.is_dir():
            raise TercetError(f"no run folder {run}; check the path")
    if len(options.runs) == 1:
        if options.to is not None:
            raise TercetError("--to names the page of several runs; that of one is RUN/report.html")
        from tercet.report.page import write_report

        print(f"The report is {write_report(options.runs[0])}.")
        return
    from tercet.report.compare import write_comparison

    print(f"The comparison is {write_comparison(options.runs, options.to or COMPARISON)}.")
