"""Writing a model's graphs as a folder, and holding them against the model.

```
folder/
  vision.onnx  text.onnx  memory.onnx  fusion.onnx     for ONNX runtimes
  vision.pt2   text.pt2   memory.pt2   fusion.pt2      for torch.export.load
  tokenizer.json
  export.json        inputs and outputs with their axes, and what comes before them: pixels and words
```
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from tercet.config import DataConfig
from tercet.errors import TercetError
from tercet.export.check import OnnxRunner, ProgramRunner, check_graphs
from tercet.export.graphs import Graph, graphs_of
from tercet.files import atomic_folder
from tercet.model.hub import TOKENIZER
from tercet.model.tercet import Tercet
from tercet.version import __version__

Format = Literal["onnx", "program"]
FORMATS: tuple[Format, ...] = ("onnx", "program")
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "program": ".pt2"}
FACTS = "export.json"
FORMAT_VERSION = 1
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: where.
        files: names of the graphs' files.
        differences: for each format the largest difference from the model, over all inputs and outputs that were
            tried; empty when none were.
        checks: random inputs that each format was tried on.
    """

    folder: Path
    files: list[str]
    differences: dict[Format, float]
    checks: int


def export_model(
    model: Tercet, folder: str | Path, formats: Sequence[Format] = FORMATS, checks: int = 10, seed: int = 0
) -> ExportReport:
    """Write the graphs of `model`; nothing is left in `folder` when they do not agree with it.

    Args:
        model: on a CPU; exported as it is in evaluation mode, in float32.
        folder: a new folder, an empty one, or one of an earlier export, which is replaced.
        formats: `onnx` needs the extra `export`, `program` only torch.
        checks: random inputs, of as many sizes, that every format is tried on.
        seed: what the random inputs follow from.

    Raises:
        TercetError: a library is missing, `folder` holds other files, the disk is full, or a graph gives something else
            than the model.
    """
    folder = Path(folder).expanduser().absolute()
    _refuse_foreign_folder(folder)
    if "onnx" in formats:
        require_onnx()
    training = model.training
    model.eval()
    differences: dict[Format, float] = {}
    try:
        graphs = graphs_of(model)
        with atomic_folder(folder) as partial, _quiet():
            files = _write_graphs(graphs, partial, formats)
            (partial / FACTS).write_text(json.dumps(_facts(model, graphs, files), indent=2) + "\n", "utf-8")
            if model.tokenizer is not None:
                model.tokenizer.save(partial)
            for kind in formats if checks else ():
                runner = OnnxRunner(partial) if kind == "onnx" else ProgramRunner(partial)
                differences[kind] = check_graphs(model, runner, checks, seed)
                if not differences[kind] <= TOLERANCE:
                    raise TercetError(
                        f"the {kind} graphs give other numbers than the model, by {differences[kind]:.1e} at most; "
                        f"{folder} was not written. Please report this with the model's config.json"
                    )
    finally:
        model.train(training)
    return ExportReport(folder, files, differences, checks)


def require_onnx() -> None:
    """Refuse to go on without what ONNX graphs need.

    Raises:
        TercetError: a library is missing.
    """
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxruntime  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise TercetError(
            f"ONNX graphs need {error.name}; pip install 'tercet[export]', or give --format program"
        ) from error


def _write_graphs(graphs: Sequence[Graph], folder: Path, formats: Sequence[Format]) -> list[str]:
    files: list[str] = []
    for graph in graphs:
        shapes = _dynamic_shapes(graph)
        with torch.no_grad():
            program = torch.export.export(graph.module, (), kwargs=graph.inputs, dynamic_shapes=shapes)
        for kind in formats:
            file = graph.name + SUFFIX[kind]
            if kind == "onnx":
                _write_onnx(program, graph, shapes, folder / file)
            else:
                torch.export.save(program, folder / file)
            files.append(file)
    return files


def _write_onnx(program: ExportedProgram, graph: Graph, shapes: Mapping[str, Any], file: Path) -> None:
    written = torch.onnx.export(
        program,
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        dynamic_shapes=dict(shapes),
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    written.save(file)


def _dynamic_shapes(graph: Graph) -> dict[str, dict[int, Dim]]:
    names = dict.fromkeys(axis for axes in graph.dynamic.values() for axis in axes.values())
    dims = {name: Dim(name, min=1, max=graph.limits.get(name)) for name in names}
    return {name: {index: dims[axis] for index, axis in axes.items()} for name, axes in graph.dynamic.items()}


def _facts(model: Tercet, graphs: Sequence[Graph], files: Sequence[str]) -> dict[str, Any]:
    data, config = DataConfig(), model.config
    return {
        "library": "tercet",
        "library_version": __version__,
        "format_version": FORMAT_VERSION,
        "files": list(files),
        "graphs": {
            graph.name: {
                "inputs": {name: _describe(value, graph.dynamic[name]) for name, value in graph.inputs.items()},
                "outputs": list(graph.outputs),
            }
            for graph in graphs
        },
        "image": {"size": config.vision.image_size, "colours": "RGB", "resampling": "bicubic", "dtype": "uint8"},
        "text": {
            "lower_case": True,
            "to_space": "-/",
            "to_nothing": ",.'!?\"()*#:;~",
            "max_words": data.max_words,
            "max_tokens": min(data.max_tokens, config.text.max_positions),
            "pad_id": config.text.pad_id,
        },
        "temperature": model.temperature.item(),
        "model": config.model_dump(mode="json"),
    }


def _describe(value: Tensor, dynamic: Mapping[int, str]) -> dict[str, Any]:
    shape = [dynamic.get(axis, length) for axis, length in enumerate(value.shape)]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words on libraries that are not there and on itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"# The axis name: ")
            yield
    finally:
        logger.setLevel(level)


def _refuse_foreign_folder(folder: Path) -> None:
    """Replacing a folder deletes what is in it, so only exports and empty folders are replaced."""
    if folder.is_dir():
        known = {FACTS, TOKENIZER}
        foreign = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.name not in known and entry.suffix not in (*SUFFIX.values(), ".data")
        )
        if foreign:
            raise TercetError(
                f"{folder} holds other files ({foreign[0]}); choose a new folder, the export would replace it"
            )
    elif folder.exists():
        raise TercetError(f"{folder} is a file; choose a new folder for the export")
