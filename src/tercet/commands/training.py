"""Commands that train: `demo` and `train`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from tercet.arguments import ConfigFlags, parse, split_flags
from tercet.config import Config
from tercet.errors import TercetError


@dataclass(frozen=True)
class DemoArguments:
    """Train a small model on drawn scenes, evaluate it and write a report into runs/demo (or --output).

    Two runs: `demo-figures` aligns single figures with their captions, and `demo` goes on from it with scenes and all
    five objectives.  --init MODEL takes the place of the first.
    """

    config: ConfigFlags = field(default_factory=Config)


@dataclass(frozen=True)
class TrainArguments:
    """Train a model by a recipe.

    The recipe's keys lie over the defaults, and the flags below over the recipe; the defaults shown are those of RECIPE
    when it is named beside --help.  --model.size puts a preset in place of the widths, depths and heads that the recipe
    wrote; single sizes given as flags beside it still win.  The word none unsets a value.
    """

    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = None
    """name of a recipe (`tercet recipes` lists them), path of a YAML file, or a run folder"""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=["--dry-run"])] = False
    """print the whole config, parameter counts, FLOPs and memory, and do not train"""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """run folder to go on with, exactly where it stopped; takes the place of RECIPE"""
    resume_if_there: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=["--resume-if-there"])] = False
    """go on with the run in --output where there is one, else start it: one command for the first start and for every
    restart by torchrun or a cluster"""
    processes: int = 1
    """start so many processes on this machine, one a device or, on a CPU, one a share of the cores; they share each
    batch, as under torchrun"""
    config: ConfigFlags = field(default_factory=Config)


def demo(arguments: list[str]) -> None:
    """Train a small model on drawn scenes, evaluate it and write a report."""
    from tercet.config_io import load_config

    overrides, rest = split_flags(arguments, DemoArguments)
    config = load_config("demo", overrides)
    parse(DemoArguments, "demo", rest, config)
    if "RANK" in os.environ:
        raise TercetError("the demo is two runs of one process; under torchrun use tercet train demo")
    if config.init is None:
        from tercet.train.session import name_folder

        folder = name_folder(config)
        figures = _learn_figures(config, overrides, folder)
        config = config.model_copy(update={"output": str(folder), "init": str(figures)})
    run = _train_and_report(config)
    print("Now your own pictures: put them in a folder, each with its caption in a .txt of the same name, and run")
    print(f"  tercet train small-data --data.train my_folder/\nThe model just trained is {run / 'model'}.")


def _learn_figures(config: Config, overrides: dict[str, Any], folder: Path) -> Path:
    """Train by `demo-figures` inside the folder of a demo, with word pieces of the demo's own captions.

    Returns:
        The model's folder.
    """
    from tercet.config_io import load_config
    from tercet.tasks.build import open_data
    from tercet.train.loop import train as run_training
    from tercet.train.session import TOKENIZER, find_tokenizer

    own = ("data.train", "data.validation", "data.test")
    parts = ("model", "data", "optim", "train")
    kept = {key: value for key, value in overrides.items() if key.split(".")[0] in parts and key not in own}
    place, words = folder / "figures", folder / TOKENIZER
    source = open_data(config.task, config.data.train, config.data, "train")
    find_tokenizer(config, source, words)[0].save(words)
    first = load_config("demo-figures", {**kept, "data.tokenizer": str(words), "output": str(place)})
    print("first figures, one at a time", file=sys.stderr)
    run_training(first)
    print("now scenes", file=sys.stderr)
    return place / "model"


def train(arguments: list[str]) -> None:
    """Train a model by a recipe; every key of a recipe is a flag as well."""
    from tercet.config_io import load_config

    overrides, rest = split_flags(arguments, TrainArguments)
    named = next((word for word in rest if not word.startswith("-")), None)
    shown = load_config(named, overrides) if named and {"-h", "--help"} & set(rest) else None
    options = parse(TrainArguments, "train", rest, shown)
    if options.recipe and options.resume:
        raise TercetError(f"--resume goes on with the config of {options.resume}; leave {options.recipe!r} out")
    chosen = options.recipe or options.resume
    if chosen is None:
        raise TercetError("name a recipe: tercet train RECIPE; `tercet recipes` lists them")
    config = load_config(chosen, overrides)
    if options.dry_run:
        from tercet.train.plan import describe

        print(describe(config))
        return
    if options.resume_if_there and config.output is None:
        raise TercetError("--resume-if-there looks for the run in --output; name a folder: --output RUN")
    if options.processes != 1:
        _launch(["train", *arguments], options.processes, config)
    else:
        _train_and_report(config, options.resume, overrides if options.resume_if_there else None)


def _launch(words: list[str], processes: int, config: Config) -> None:
    """Run a command as several processes that each leave out `--processes`.

    Raises:
        TercetError: these are started by torchrun already, or there are fewer devices or less than one process.
        SystemExit: a process failed; it has told why.
    """
    import torch

    from tercet.device import wants_cuda
    from tercet.distributed import launch

    if processes < 1:
        raise TercetError(f"--processes {processes} would train nothing; name 1 or more")
    if "RANK" in os.environ:
        raise TercetError("torchrun has started the processes; leave --processes out")
    if wants_cuda(config.train.device) and processes > torch.cuda.device_count():
        raise TercetError(f"--processes {processes} wants as many devices, and there are {torch.cuda.device_count()}")
    status = launch(_without(words, "--processes"), processes)
    if status:
        raise SystemExit(status)


def _without(words: list[str], flag: str) -> list[str]:
    """The words of a command line without a flag and its value."""
    kept = [word for word in words if not word.startswith(f"{flag}=")]
    if flag in kept:
        place = kept.index(flag)
        del kept[place : place + 2]
    return kept


def _train_and_report(config: Config, resume: Path | None = None, found_with: dict[str, Any] | None = None) -> Path:
    """Train, write the report, and say where it is; of several ranks, the first alone writes and speaks.

    Args:
        config: the resolved config.
        resume: run folder to go on in.
        found_with: where the run in `config.output` is gone on with if it is there, the flags that lie over its config.
    """
    from tercet.config_io import load_config
    from tercet.distributed import Ranks, init_distributed
    from tercet.train.loop import train as run_training
    from tercet.train.session import CONFIG

    with init_distributed(config.train.device):
        if found_with is not None and config.output is not None:
            folder = Path(config.output)
            # The first rank looks, before it could have begun the run itself.
            if Ranks().broadcast((folder / CONFIG).is_file()):
                resume, config = folder, load_config(folder, found_with)
        run = run_training(config, resume)
    if os.environ.get("RANK", "0") == "0":
        from tercet.report.page import write_report

        write_report(run)
        print(f"The report is {(run / 'report.html').resolve()}; open it in a browser.")
    return run
