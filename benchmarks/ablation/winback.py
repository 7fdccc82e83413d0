"""How much of the loss from noisy captions `tercet data filter` recovers: train, filter with that model, train again.

    python benchmarks/ablation/winback.py --noise 0.4 --train shards/train-*.tar --validation shards/val-*.tar \\
        --test shards/test-*.tar --output runs/winback

For each seed: a share of the captions moves to other images; a model is trained on all pairs; the pairs with the
highest similarity under this model are kept, as many as are right; and a second model is trained on them for as many
steps.  Prints one JSON line: recall of both, and the share of kept pairs that are right.  Finished parts are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from grid import Run
from noise import shuffle_captions, unpack
from run import Sources, call, last_evaluations, train

from tercet.config_io import load_config
from tercet.errors import TercetError

MODEL = "model"


def main() -> int:
    """Parse, perform the runs of every seed, and print the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--noise", type=float, default=0.4, help="share of images whose captions move")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the noisy pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="small-data")
    parser.add_argument("--train", nargs="+", required=True, help="training pairs, as --data.train takes them")
    parser.add_argument("--validation", nargs="+", required=True, help="pairs to validate on")
    parser.add_argument("--test", nargs="+", required=True, help="pairs to report on")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of both trainings")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    try:
        clean = unpack(options.train, options.output / "pairs")
        found = [one_seed(options, clean, seed) for seed in options.seeds]
    except TercetError as error:
        print(f"winback: error: {error}", file=sys.stderr)
        return 1
    means = {key: round(statistics.mean(row[key] for row in found), 2) for key in found[0]}
    print(json.dumps({"name": "winback", "noise": options.noise, "mean": means, "seeds": found}))
    return 0


def one_seed(options: argparse.Namespace, clean: Path, seed: int) -> dict[str, float]:
    """Recall with the noisy pairs and with the kept ones, and the share of kept pairs that are right."""
    noisy = shuffle_captions(clean, options.noise, seed)
    rows = json.loads(clean.read_text("utf-8"))
    noise = round(100 * options.noise)
    first, second = (options.output / f"{name}-noise{noise}-seed{seed}" for name in ("all", "kept"))
    steps = max(1, options.epochs * (len(rows) // batch_size(options)))
    train_once(options, noisy, first, seed, steps)
    kept = options.output / f"{second.name}.jsonl"
    if not kept.is_file():
        share = ["--fraction", str(1 - options.noise), "--by", "similarity"]
        call(first, "data", "filter", str(noisy), "--model", str(first / MODEL), "--output", str(kept), *share)
    train_once(options, kept, second, seed, steps)
    captions = {row["image"]: set(row["caption"]) for row in rows}
    pairs = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    right = [pair["caption"] in captions[Path(pair["image"]).name] for pair in pairs]
    return {
        "seed": seed,
        "all": recall(first),
        "kept": recall(second),
        "right_before": 100 * (1 - options.noise),
        "right_kept": 100 * statistics.mean(right),
    }


def train_once(options: argparse.Namespace, pairs: Path, folder: Path, seed: int, steps: int) -> None:
    """Train on `pairs` for `steps`, or continue that run; do nothing where the model exists."""
    if (folder / MODEL).is_dir():
        return
    # As many passes as the steps may take; the schedule ends with the last step.
    keys = {"train.epochs": 10 * options.epochs, "train.max_steps": steps, "train.seed": seed}
    run = Run(folder.name, 0.0, seed, keys | settings(options))
    sources = Sources([str(pairs)], options.validation, options.test)
    train(options.recipe, [*sources.flags(run, options.output), *run.command()], folder)


def settings(options: argparse.Namespace) -> dict[str, str]:
    """The further keys of both trainings."""
    return dict(setting.split("=", 1) for setting in options.set)


def batch_size(options: argparse.Namespace) -> int:
    """Pairs of a step, as the recipe or the further keys say."""
    return load_config(options.recipe, settings(options)).train.batch_size


def recall(folder: Path) -> float:
    """Mean recall of the dual encoder on the test split."""
    return last_evaluations(folder / "metrics.jsonl")["test"]["dual"]["r_mean"]


if __name__ == "__main__":
    sys.exit(main())
