"""Commands for programs without Tercet: `export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tercet.arguments import parse


@dataclass(frozen=True)
class ExportArguments:
    """Write the image encoder, text encoder, image memory and fusion encoder of a model as graphs of their own.

    Their batch and length are free.  Every graph is run on random inputs of many sizes, and DIR is written only when
    they give what the model gives, to 1e-4.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """model folder, run folder, or hub id"""
    to: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder to write; one of an earlier export is replaced"""
    format: Literal["all", "onnx", "program"] = "all"
    """onnx: NAME.onnx for onnxruntime; program: NAME.pt2 for torch.export.load"""
    checks: Annotated[int, tyro.conf.arg(metavar="N")] = 10
    """random inputs that every graph is tried on; 0: none"""


def export(arguments: list[str]) -> None:
    """Write a model as ONNX graphs and torch.export programs, checked against it."""
    options = parse(ExportArguments, "export", arguments)

    from tercet import load
    from tercet.export.write import FORMATS, export_model

    formats = FORMATS if options.format == "all" else (options.format,)
    report = export_model(load(options.model), options.to, formats, options.checks)
    print(f"{', '.join(report.files)} are in {report.folder}.")
    for kind, difference in report.differences.items():
        print(f"{kind}: {difference:.1e} from the model at most, over {report.checks} random inputs.")
