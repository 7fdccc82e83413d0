"""Commands that give a model to others: `export` and `push`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tercet.arguments import parse

FOLDER_MARKS = ("./", "../", "/", "~")


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


@dataclass(frozen=True)
class PushArguments:
    """Upload a model to the Hugging Face Hub, with its card; the repository is made where there is none.

    Log in first with `hf auth login`, or set HF_TOKEN.  A TO that begins with ./, / or ~ is a folder of this machine,
    which the model is written into instead.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """model folder or run folder"""
    to: Annotated[str, tyro.conf.arg(metavar="ORGANISATION/NAME")]
    """repository on the hub, or ./FOLDER"""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """make a new repository private"""
    message: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """commit message"""


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


def push(arguments: list[str]) -> None:
    """Upload a model to the Hugging Face Hub, with its card."""
    options = parse(PushArguments, "push", arguments)

    from tercet import load

    # A path, so that a folder that is not there is not looked for on the hub.
    model = load(Path(options.model))
    if options.to.startswith(FOLDER_MARKS):
        print(f"The model is in {model.save(Path(options.to).expanduser())}.")
        return
    print(model.push_to_hub(options.to, private=options.private or None, message=options.message))
