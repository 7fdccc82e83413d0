"""Commands that draw a run: `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tercet.arguments import parse
from tercet.errors import TercetError


@dataclass(frozen=True)
class ReportArguments:
    """Write a run's report.html anew."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder"""


def report(arguments: list[str]) -> None:
    """Write a run's report.html anew."""
    options = parse(ReportArguments, "report", arguments)
    if not options.run.is_dir():
        raise TercetError(f"no run folder {options.run}; check the path")
    from tercet.report.page import write_report

    write_report(options.run)
    print(f"The report is {options.run / 'report.html'}.")
