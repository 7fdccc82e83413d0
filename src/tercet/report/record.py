"""Reading a run folder as it is: finished, killed, or still running; and telling what it lacks."""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tercet.errors import TercetError

Line = dict[str, Any]


@dataclass
class RunRecord:
    """What was found in a run folder.

    Attributes:
        train: the training lines of metrics.jsonl in order of step; steps done again after a resume appear once.
        evaluations: the evaluation lines.
        events: the event lines.
        similarity: captions, thumbnails and cosines of some pairs; empty where there are none.
        heatmaps: captions with their maps.
        facts: run.json, as far as there is one: recipe, pairs, parameters, machine.
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

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of `key`, both float64 [lines]; lines without it, or not finite there, are left out."""
        points = [
            (line["step"], line[key]) for line in self.train if finite(line.get(key)) and finite(line.get("step"))
        ]
        table = np.array(points, np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def evaluation_series(self, data: str, group: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, both float64 [evaluations], of `group.key` on `data`, such as `dual.r_mean`."""
        points = [
            (line["step"], line[group][key])
            for line in self.evaluations
            if str(line.get("data", "evaluation")) == data
            and finite(line.get("step"))
            and isinstance(line.get(group), dict)
            and finite(line[group].get(key))
        ]
        table = np.array(sorted(points), np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    @property
    def title(self) -> str:
        """The name that the config gives the run, or else its folder's."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def skipped(self) -> int:
        """Broken samples left out, summed over the training lines."""
        return int(sum(line["skipped"] for line in self.train if finite(line.get("skipped"))))

    @property
    def seconds(self) -> float | None:
        """Seconds of work; the pause before a resume does not count.  None when fewer than two lines tell a time."""
        lines = [line for line in (*self.train, *self.evaluations, *self.events) if finite(line.get("time"))]
        lines.sort(key=lambda line: line["time"])
        if len(lines) < 2:
            return None
        gaps = [
            after["time"] - before["time"]
            for before, after in itertools.pairwise(lines)
            if "resum" not in str(after.get("message", "")).lower()
        ]
        return float(sum(gaps))


def finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: str | Path) -> RunRecord:
    """Everything a report needs from a run folder.

    Raises:
        TercetError: there is no such folder, or it holds neither config.yaml nor metrics.jsonl.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TercetError(f"no run folder at {folder}")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise TercetError(f"{folder} is no run folder: it holds neither config.yaml nor metrics.jsonl")
    record = RunRecord(folder)
    _read_config(record)
    _read_metrics(record)
    _read_gallery(record)
    _read_pictures(record)
    facts = _read_json(record, "run.json", required=False)
    record.facts = facts if isinstance(facts, dict) else {}
    if "parameters" not in record.facts:
        count = _count_parameters(folder / "model" / "model.safetensors")
        if count is None:
            record.missing.append("No trained model yet (model/model.safetensors).")
        else:
            record.facts["parameters"] = count
    return record


def _read_config(record: RunRecord) -> None:
    path = record.folder / "config.yaml"
    try:
        record.config_text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        record.missing.append("No config.yaml: the settings of this run are unknown.")
        return
    try:
        loaded = yaml.safe_load(record.config_text)
    except Exception as error:  # PyYAML's own, and whatever its constructors raise on odd values
        reason = (str(error) or type(error).__name__).splitlines()[0]
        record.missing.append(f"config.yaml cannot be read as YAML: {reason}.")
        return
    record.config = loaded if isinstance(loaded, dict) else {}


def _read_metrics(record: RunRecord) -> None:
    path = record.folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        record.missing.append("No metrics.jsonl: nothing was trained or measured here yet.")
        return
    broken = 0
    for row in text.splitlines():
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(line, dict):
            _add_line(record, line)
        else:
            broken += 1
    if broken:
        what = "line that is" if broken == 1 else "lines that are"
        record.missing.append(f"metrics.jsonl holds {broken} {what} cut short or no JSON object; left out here.")
    if not record.train:
        record.missing.append("No training step has been logged.")
    if not record.evaluations:
        record.missing.append("No evaluation yet: the run was stopped before one, or names no data to evaluate on.")


def _add_line(record: RunRecord, line: Line) -> None:
    kind = line.get("kind")
    if kind == "train" and finite(line.get("step")):
        while record.train and record.train[-1]["step"] >= line["step"]:
            record.train.pop()  # a resume goes back to its checkpoint and does these steps again
        record.train.append(line)
    elif kind == "evaluate":
        record.evaluations.append(line)
    elif kind == "event":
        record.events.append(line)


def _read_gallery(record: RunRecord) -> None:
    # Only retrieval searches; the evaluations of other tasks leave no gallery.
    searches = record.config.get("task", "pretrain") in ("pretrain", "retrieval")
    loaded = _read_json(record, "gallery.json", required=searches)
    if loaded is None:
        return
    entries = loaded if isinstance(loaded, list) else []
    record.gallery = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("results"), list)]
    if not record.gallery:
        record.missing.append("gallery.json holds no queries.")


def _read_pictures(record: RunRecord) -> None:
    """The matrix and the heatmaps, which runs of earlier versions and of other tasks do not have."""
    matrix = _read_json(record, "similarity.json", required=False)
    record.similarity = matrix if isinstance(matrix, dict) else {}
    maps = _read_json(record, "heatmaps.json", required=False)
    record.heatmaps = [entry for entry in maps if isinstance(entry, dict)] if isinstance(maps, list) else []


def _read_json(record: RunRecord, name: str, *, required: bool) -> Any:
    path = record.folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        if required:
            record.missing.append(f"No {name}.")
    except (ValueError, RecursionError):
        record.missing.append(f"{name} is cut short or no JSON; left out here.")
    return None


def _count_parameters(path: Path) -> int | None:
    """Numbers in a safetensors file, from its header alone; None when there is no whole header."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        return int(sum(math.prod(int(size) for size in shape) for shape in shapes))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, struct.error):
        return None
