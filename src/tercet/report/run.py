"""What a run folder holds: of a finished run, of one that was killed, or of one that still goes on."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from tercet.errors import TercetError

Line = dict[str, Any]


@dataclass
class Run:
    """The contents of a run folder.

    Attributes:
        train: training lines of metrics.jsonl by step; steps that were repeated after a resume appear once.
        evaluations: evaluation lines.
        events: event lines.
        gallery: queries with the images that were retrieved.
        similarity: captions, thumbnails and cosines of some pairs.
        heatmaps: captions with their heatmaps.
        facts: run.json: recipe, pairs, parameters, machine.
        missing: sentences that say what the folder lacks.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    train: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    gallery: list[Line] = field(default_factory=list)
    similarity: dict[str, Any] = field(default_factory=dict)
    heatmaps: list[Line] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a logged number, float64 `[lines]` each, of the lines where it is finite."""
        return _arrays([(line["step"], line[key]) for line in self.train if is_finite(line.get(key))])

    def evaluation_curve(self, data: str, group: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric such as `dual.r_mean` on `data`, float64 `[evaluations]` each."""
        lines = [line for line in self.evaluations if data_of(line) == data and is_finite(line.get("step"))]
        lines = [line for line in lines if isinstance(line.get(group), dict) and is_finite(line[group].get(key))]
        return _arrays(sorted((line["step"], line[group][key]) for line in lines))

    @property
    def title(self) -> str:
        """The name that the config gives the run, or else its folder's."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def last_evaluations(self) -> dict[str, Line]:
        """The last evaluation on each data."""
        return {data_of(line): line for line in self.evaluations}

    @property
    def skipped(self) -> int:
        """Broken samples that were skipped, summed over the training lines."""
        return int(sum(line["skipped"] for line in self.train if is_finite(line.get("skipped"))))

    @property
    def seconds(self) -> float | None:
        """Seconds of work, without the pauses before a resume; None when fewer than two lines have a time."""
        lines = [line for line in (*self.train, *self.evaluations, *self.events) if is_finite(line.get("time"))]
        lines.sort(key=lambda line: line["time"])
        if len(lines) < 2:
            return None
        gaps = [
            after["time"] - before["time"]
            for before, after in itertools.pairwise(lines)
            if "resum" not in str(after.get("message", "")).lower()
        ]
        return float(sum(gaps))


def is_finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def data_of(line: Line) -> str:
    """Which data an evaluation line is about: validation or test."""
    return str(line.get("data", "evaluation"))


def read_run(folder: str | Path) -> Run:
    """Read a run folder; what is absent or damaged is named in `missing`.

    Raises:
        TercetError: there is no such folder, or it holds neither config.yaml nor metrics.jsonl.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TercetError(f"no run folder at {folder}")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise TercetError(f"{folder} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    run = Run(folder)
    _read_config(run)
    _read_metrics(run)
    # Only retrieval leaves examples.
    retrieves = run.config.get("task", "pretrain") in ("pretrain", "retrieval")
    gallery = _read_json(run, "gallery.json", list, required=retrieves)
    run.gallery = [entry for entry in gallery if isinstance(entry, dict) and isinstance(entry.get("results"), list)]
    run.similarity = _read_json(run, "similarity.json", dict)
    run.heatmaps = [entry for entry in _read_json(run, "heatmaps.json", list) if isinstance(entry, dict)]
    run.facts = _read_json(run, "run.json", dict)
    if not (folder / "model" / "model.safetensors").is_file():
        run.missing.append("No trained model yet (model/model.safetensors).")
    return run


def _read_config(run: Run) -> None:
    try:
        run.config_text = (run.folder / "config.yaml").read_text("utf-8", errors="replace")
        config = yaml.safe_load(run.config_text)
        run.config = config if isinstance(config, dict) else {}
    except OSError:
        run.missing.append("No config.yaml: the settings of this run are unknown.")
    except Exception as error:  # PyYAML's own, and whatever its constructors raise on odd values
        reason = (str(error) or type(error).__name__).splitlines()[0]
        run.missing.append(f"config.yaml cannot be read as YAML: {reason}.")


def _read_metrics(run: Run) -> None:
    try:
        rows = (run.folder / "metrics.jsonl").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        run.missing.append("No metrics.jsonl: nothing was trained or measured here yet.")
        return
    broken = 0
    for row in filter(str.strip, rows):
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            _add_line(run, line)
        else:
            broken += 1
    if broken:
        run.missing.append(f"metrics.jsonl: lines that are not JSON objects, or cut off, were skipped ({broken}).")
    if not run.train:
        run.missing.append("No training step has been logged.")
    if not run.evaluations:
        run.missing.append("No evaluation yet: the run was stopped before one, or its config names no data for it.")


def _add_line(run: Run, line: Line) -> None:
    kind = line.get("kind")
    if kind == "train" and is_finite(line.get("step")):
        while run.train and run.train[-1]["step"] >= line["step"]:
            run.train.pop()  # a resume goes back to its checkpoint and repeats these steps
        run.train.append(line)
    elif kind == "evaluate":
        run.evaluations.append(line)
    elif kind == "event":
        run.events.append(line)


def _read_json(run: Run, name: str, kind: type, *, required: bool = False) -> Any:
    """The content of a file, or an empty `kind`."""
    try:
        content = json.loads((run.folder / name).read_text("utf-8", errors="replace"))
    except OSError:
        if required:
            run.missing.append(f"No {name}.")
        return kind()
    except (ValueError, RecursionError):
        run.missing.append(f"{name} is cut off or not JSON; skipped.")
        return kind()
    return content if isinstance(content, kind) else kind()


def _arrays(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(points, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
