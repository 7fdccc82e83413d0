"""How well `tercet data filter` finds wrong captions: scenes with a share of their captions exchanged, as JSON.

python benchmarks/filtering.py runs/demo/model           # 1,000 held-out scenes, 40 % wrong
python benchmarks/filtering.py runs/demo/model --quick   # 200
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from tercet import load
from tercet.config import Config, DataConfig
from tercet.data.readers import open_sources
from tercet.data.scene_files import write_pairs
from tercet.data.table import SampleTable
from tercet.tasks.filtering import Score, filter_pairs


class Exchanged(SampleTable):
    """A table in which some rows have exchanged their captions, each taking that of another."""

    def __init__(self, source: SampleTable, rows: np.ndarray) -> None:
        super().__init__(source.parts)
        self.caption_counts = np.ones(source.image_count, np.int64)
        self._owner = np.arange(source.image_count)
        self._owner[rows] = np.roll(rows, 1)

    def captions(self, index: int) -> list[str]:
        """One caption, its own or another's."""
        return super().captions(int(self._owner[index]))[:1]


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """The chance that a right pair has a higher score than a wrong one; a tie counts half."""
    order = np.argsort(scores, kind="stable")
    _, group, counts = np.unique(scores[order], return_inverse=True, return_counts=True)
    ranks = np.empty(len(scores))
    ranks[order] = (np.cumsum(counts) - (counts - 1) / 2)[group]
    positives = right.sum()
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * (len(right) - positives)))


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Exchange, score, compare."""
    files = tempfile.TemporaryDirectory()
    for split in ("validation", "test"):
        write_pairs(Path(files.name), split, 100 if arguments.quick else 500)
    scenes = open_sources([files.name], DataConfig())
    rng = np.random.default_rng(0)
    wrong = rng.permutation(scenes.image_count)[: round(arguments.wrong * scenes.image_count)]
    right = np.ones(scenes.image_count, bool)
    right[wrong] = False
    model = load(arguments.model).model
    config = Config.model_validate({"data": {"workers": 0}})
    result: dict[str, object] = {"name": "filtering", "pairs": len(right), "wrong_share": arguments.wrong}
    kinds: tuple[Score, ...] = ("match", "similarity")
    with files:
        for by in kinds:
            output, identity = Path(files.name) / "kept.jsonl", {"model": "x"}
            source = Exchanged(scenes, wrong)
            report = filter_pairs(model, source, config, output, identity, by, fraction=1 - arguments.wrong)
            kept = report.scores >= report.threshold
            result[by] = {
                "auc": round(area_under_curve(report.scores, right), 4),
                "threshold": round(report.threshold, 4),
                "kept": int(kept.sum()),
                "precision": round(float(right[kept].mean()), 4),
                "recall": round(float(kept[right].mean()), 4),
            }
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="model folder, such as runs/demo/model")
    parser.add_argument("--quick", action="store_true", help="200 scenes")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of the captions that are exchanged")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
