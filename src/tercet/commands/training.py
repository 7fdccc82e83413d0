"""Commands that train: `demo`, `train` and `recipes`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tercet.arguments import ConfigKeys
from tercet.commands.terminal import print_table
from tercet.config import Config
from tercet.config_io import load_config, recipe_meaning, recipe_names
from tercet.errors import TercetError


def demo(*, scenes: int | None = None, **overrides: ConfigKeys) -> None:
    """Train a small model on synthetic scenes, evaluate it and write a report into runs/demo (or --output).

    The scenes are written into the run's data/ as tar shards.  Two runs train on them: `demo-shapes` aligns single
    shapes with their captions, and `demo` goes on from it with scenes and all five objectives.  --init MODEL takes the
    place of the first.

    Args:
        scenes: write at most so many scenes of each kind, for a quick trial.
    """
    from tercet.data.scene_files import write_demo
    from tercet.train.setup import name_folder

    config = load_config("demo", overrides)
    if "RANK" in os.environ:
        raise TercetError("the demo is two runs of one process; under torchrun use tercet train demo")
    folder = name_folder(config)
    print(f"writing scenes into {folder / 'data'}", file=sys.stderr)
    write_demo(folder / "data", scenes)
    overrides = _demo_sources(folder / "data") | overrides | {"output": str(folder)}
    config = load_config("demo", overrides)
    if config.init is None:
        config = load_config("demo", overrides | {"init": str(_train_on_shapes(config, overrides, folder))})
    run = _train_and_report(config)
    print("Now your own images: put them in a folder, each with its caption in a .txt of the same name, and run")
    print(f"  tercet train small-data --data.train my_folder/\nThe model just trained is {run / 'model'}.")


def _demo_sources(data: Path) -> dict[str, Any]:
    """The keys of the demo's config that name its data, for scenes written into `data`."""
    tasks = ("vqa", "entailment", "nlvr", "grounding")
    return {
        "data.train": [f"{data}/train-*.tar"],
        "data.validation": [f"{data}/validation-*.tar"],
        "data.test": [f"{data}/test-*.tar"],
        "data.tokenizer_texts": [f"{task}={data}/{task}-validation.jsonl" for task in tasks],
    }


def _train_on_shapes(config: Config, overrides: dict[str, Any], folder: Path) -> Path:
    """Train by `demo-shapes` inside the folder of a demo, with a tokenizer of the demo's own captions.

    Returns:
        The model's folder.
    """
    from tercet.tasks.task import open_data
    from tercet.train.loop import train as run_training
    from tercet.train.setup import TOKENIZER, find_tokenizer

    own = ("data.train", "data.validation", "data.test", "data.tokenizer_texts")
    kept = {
        key: value
        for key, value in overrides.items()
        if key.split(".")[0] in ("model", "data", "optim", "train") and key not in own
    }
    output, tokenizer = folder / "shapes", folder / TOKENIZER
    source = open_data(config.task, config.data.train, config.data, "train")
    find_tokenizer(config, source, tokenizer)[0].save(tokenizer)
    shapes = {"data.train": [f"{folder}/data/shapes-*.tar"], "data.tokenizer": str(tokenizer), "output": str(output)}
    print("first single shapes", file=sys.stderr)
    run_training(load_config("demo-shapes", kept | shapes))
    print("now scenes", file=sys.stderr)
    return output / "model"


def train(
    recipe: str | None = None,
    *,
    dry_run: bool = False,
    resume: Path | None = None,
    resume_if_there: bool = False,
    processes: int = 1,
    **overrides: ConfigKeys,
) -> None:
    """Train a model by a recipe.

    The recipe's keys override the defaults, and the flags below override the recipe; with a RECIPE beside --help, the
    defaults shown are the recipe's.  --model.size replaces the widths, depths and heads that the recipe wrote; single
    sizes given as flags beside it still win.  The word none unsets a value.

    Args:
        recipe: name of a recipe (`tercet recipes` lists them), path of a YAML file, or a run folder.
        dry_run: print the whole config, parameter counts, FLOPs and memory, and do not train.
        resume: run folder to continue exactly where it stopped; takes the place of RECIPE.
        resume_if_there: continue the run in --output where there is one, else start it: one command for the first start
            and for every restart by torchrun or a cluster.
        processes: start so many processes on this machine, one for each device or, on a CPU, one for each share of the
            cores; they share each batch, as under torchrun.
    """
    if recipe and resume:
        raise TercetError(f"--resume uses the config of {resume}; remove {recipe!r}")
    chosen = recipe or resume
    if chosen is None:
        raise TercetError("name a recipe: tercet train RECIPE; `tercet recipes` lists them")
    config = load_config(chosen, overrides)
    if dry_run:
        from tercet.train.dry_run import describe

        print(describe(config))
        return
    if resume_if_there and config.output is None:
        raise TercetError("--resume-if-there looks for the run in --output; name a folder: --output RUN")
    if processes != 1:
        named = [str(recipe)] if recipe else ["--resume", str(resume)]
        again = ["--resume-if-there"] if resume_if_there else []
        _launch(["train", *named, *again, *_as_flags(overrides)], processes, config)
    else:
        _train_and_report(config, resume, overrides if resume_if_there else None)


def _as_flags(overrides: dict[str, Any]) -> list[str]:
    words = []
    for key, value in overrides.items():
        words += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def _launch(words: list[str], processes: int, config: Config) -> None:
    """Run `tercet WORDS` as several processes.

    Raises:
        TercetError: torchrun has started these already, or there are fewer devices or less than one process.
        SystemExit: a process failed, and has said why.
    """
    import torch

    from tercet.device import wants_cuda
    from tercet.distributed import launch

    if processes < 1:
        raise TercetError(f"--processes {processes} would train nothing; give 1 or more")
    if "RANK" in os.environ:
        raise TercetError("torchrun has started the processes; remove --processes")
    if wants_cuda(config.train.device) and processes > torch.cuda.device_count():
        raise TercetError(f"--processes {processes} needs as many devices, and there are {torch.cuda.device_count()}")
    status = launch(words, processes)
    if status:
        raise SystemExit(status)


def _train_and_report(config: Config, resume: Path | None = None, overrides: dict[str, Any] | None = None) -> Path:
    """Train and write the report; of several ranks, the first alone writes and prints.

    Args:
        config: the resolved config.
        resume: run folder to continue.
        overrides: continue the run in `config.output` if it is there, with these flags over its config.
    """
    from tercet.distributed import Ranks, init_distributed
    from tercet.train.loop import train as run_training
    from tercet.train.setup import CONFIG

    with init_distributed(config.train.device):
        if overrides is not None and config.output is not None:
            folder = Path(config.output)
            # The first rank looks, before it could have begun the run itself.
            if Ranks().broadcast((folder / CONFIG).is_file()):
                resume, config = folder, load_config(folder, overrides)
        run = run_training(config, resume)
    if os.environ.get("RANK", "0") == "0":
        from tercet.report.page import write_report

        write_report(run)
        print(f"The report is {(run / 'report.html').resolve()}; open it in a browser.")
    return run


def recipes() -> None:
    """List the recipes that come with the package."""
    print_table(["recipe", "what it does"], [[name, recipe_meaning(name)] for name in recipe_names()])
