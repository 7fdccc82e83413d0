"""The command line: one function a command, which parses, calls and prints.

Heavy imports (torch, tyro, pydantic) stand inside the functions, so that `tercet --help` answers at once.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.errors import TercetError
from tercet.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from tercet.config import Config
    from tercet.model.tercet import Tercet

MISTAKE = 2
INTERRUPTED = 130
DEMO_MODEL = "runs/demo/model"

COLUMNS = {
    "text_r1": "text R@1",
    "text_r5": "R@5",
    "text_r10": "R@10",
    "image_r1": "image R@1",
    "image_r5": "R@5",
    "image_r10": "R@10",
    "r_mean": "mean",
}
ROWS = {"dual": "dual encoder", "reranked": "re-ranked"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 after a mistake in the input, 130 when interrupted."""
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except TercetError as error:
        print(f"tercet: error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt as stop:
        print(f"tercet: {str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; what Python flushes at exit must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def demo(arguments: list[str]) -> None:
    """Train a small model on drawn scenes, evaluate it and write a report."""
    from tercet import arguments as parsing
    from tercet.config_io import load_config

    overrides, rest = parsing.split_flags(arguments, parsing.DemoArguments)
    config = load_config("demo", overrides)
    parsing.parse(parsing.DemoArguments, "demo", rest, config)
    run = _train_and_report(config)
    print("Now your own pictures: put them in a folder, each with its caption in a .txt of the same name, and run")
    print(f"  tercet train small-data --data.train my_folder/\nThe model just trained is {run / 'model'}.")


def train(arguments: list[str]) -> None:
    """Train a model by a recipe; every key of a recipe is a flag as well."""
    from tercet import arguments as parsing
    from tercet.config_io import load_config

    overrides, rest = parsing.split_flags(arguments, parsing.TrainArguments)
    named = next((word for word in rest if not word.startswith("-")), None)
    shown = load_config(named, overrides) if named and {"-h", "--help"} & set(rest) else None
    options = parsing.parse(parsing.TrainArguments, "train", rest, shown)
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
    _train_and_report(config, options.resume)


def evaluate(arguments: list[str]) -> None:
    """Measure a model on held-out data, in retrieval or in the task that it was fine-tuned for."""
    from tercet import arguments as parsing

    overrides, rest = parsing.split_flags(arguments, parsing.EvaluateArguments)
    options = parsing.parse(parsing.EvaluateArguments, "evaluate", rest)
    folder, config = _model_and_config(options.model, overrides)

    from tercet import load
    from tercet.files import write_atomic
    from tercet.tasks.build import evaluate_task, open_data
    from tercet.train.parallel import place

    task = options.task or config.task
    model = load(folder).to(place(config.train).device)
    result = evaluate_task(task, model, open_data(task, options.data, config.data, "test"), config)
    for problem in result.problems[:5]:
        print(f"left out: {problem}", file=sys.stderr)
    if len(result.problems) > 5:
        print(f"left out: {len(result.problems) - 5} more", file=sys.stderr)
    if options.predictions is not None:
        write_atomic(options.predictions, json.dumps(result.predictions()) + "\n")
    if options.json:
        print(json.dumps(result.metrics()))
    else:
        _print_metrics(result.metrics())


def match(arguments: list[str]) -> None:
    """Tell how well texts fit an image."""
    from tercet import arguments as parsing

    options = parsing.parse(parsing.MatchArguments, "match", arguments)
    if not options.texts:
        raise TercetError('give a text: tercet match IMAGE "a dog in the snow"')
    model = _load_chosen(options.model)
    # Lists in, so that the results are lists as well.
    chances = model.match([options.image], options.texts)
    cosines = model.similarity([options.image], options.texts)
    rows = list(zip(options.texts, _numbers(chances), _numbers(cosines), strict=True))
    if options.json:
        print(json.dumps([{"text": text, "match": chance, "cosine": cosine} for text, chance, cosine in rows]))
        return
    _print_table(
        ["text", "match", "cosine"], [[text, f"{100 * chance:.1f} %", f"{cosine:.3f}"] for text, chance, cosine in rows]
    )


def classify(arguments: list[str]) -> None:
    """Choose the label that fits an image best."""
    from tercet import arguments as parsing

    options = parsing.parse(parsing.ClassifyArguments, "classify", arguments)
    chances = _load_chosen(options.model).classify(options.image, options.labels, options.templates or None)
    assert isinstance(chances, dict)
    if options.json:
        print(json.dumps(chances))
    else:
        _print_table(["label", "probability"], [[label, f"{100 * value:.1f} %"] for label, value in chances.items()])


def ask(arguments: list[str]) -> None:
    """Answer a question about an image."""
    from tercet import arguments as parsing

    options = parsing.parse(parsing.AskArguments, "ask", arguments)
    found = _load_chosen(options.model).answer(options.image, options.question, options.answers or None)
    assert not isinstance(found, list)
    if options.json:
        others = [{"answer": text, "score": score} for text, score in found.others]
        print(json.dumps({"answer": found.text, "score": found.score, "others": others}))
        return
    rows = [(found.text, found.score), *found.others]
    _print_table(["answer", "score"], [[text, f"{100 * score:.1f} %"] for text, score in rows])


def score(arguments: list[str]) -> None:
    """Score a file of predictions against annotations, without a model."""
    from tercet import arguments as parsing
    from tercet.config_io import default_config

    overrides, rest = parsing.split_flags(arguments, parsing.ScoreArguments)
    options = parsing.parse(parsing.ScoreArguments, "score", rest)

    from tercet.tasks.score import score_predictions

    metrics = score_predictions(options.task, options.predictions, options.gold, default_config(overrides).data)
    if options.json:
        print(json.dumps(metrics))
    else:
        _print_metrics(metrics)


def convert(arguments: list[str]) -> None:
    """Turn a checkpoint of others (TCL, ALBEF, BERT, DeiT, ViT) into a model folder."""
    from tercet import arguments as parsing

    options = parsing.parse(parsing.ConvertArguments, "convert", arguments)

    from tercet.model.convert import convert as convert_weights

    result = convert_weights(
        options.file,
        options.to,
        base=options.base,
        tokenizer=options.tokenizer,
        image_size=options.image_size,
        vision_heads=options.vision_heads,
        text_heads=options.text_heads,
    )
    print(result.summary())
    print(f"The model is {options.to}.")


def tokenizer(arguments: list[str]) -> None:
    """Train a word-piece tokenizer on captions."""
    from tercet import arguments as parsing

    overrides, rest = parsing.split_flags(arguments, parsing.TokenizerArguments)
    options = parsing.parse(parsing.TokenizerArguments, "tokenizer", rest)
    if not options.captions:
        raise TercetError("name the sources of captions: tercet tokenizer CAPTIONS... --to DIR")

    from tercet.config_io import default_config
    from tercet.data.loader import cleaned_captions
    from tercet.data.sources import open_sources
    from tercet.data.texts import Tokenizer

    data = default_config(overrides).data
    captions = cleaned_captions(open_sources(options.captions, data, "train"), data.max_words)
    trained = Tokenizer.train(captions, options.size)
    trained.save(options.to)
    print(f"{trained.vocabulary_size} word pieces are in {options.to}; use them with --data.tokenizer {options.to}")


def recipes(arguments: list[str]) -> None:
    """List the recipes that come with the package."""
    from tercet import arguments as parsing
    from tercet.config_io import recipe_meaning, recipe_names

    parsing.parse(parsing.NoArguments, "recipes", arguments)
    _print_table(["recipe", "what it does"], [[name, recipe_meaning(name)] for name in recipe_names()])


def report(arguments: list[str]) -> None:
    """Write a run's report.html anew."""
    from tercet import arguments as parsing

    options = parsing.parse(parsing.ReportArguments, "report", arguments)
    if not options.run.is_dir():
        raise TercetError(f"no run folder {options.run}; check the path")
    from tercet.report.page import write_report

    write_report(options.run)
    print(f"The report is {options.run / 'report.html'}.")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    command.__name__: command
    for command in (demo, train, evaluate, match, classify, ask, score, convert, tokenizer, recipes, report)
}


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"tercet {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise TercetError(f"no command {name!r}; {hint}")
    COMMANDS[name](rest)
    return 0


def _usage() -> str:
    lines = [
        "usage: tercet COMMAND [...]",
        "",
        "Vision-language models by triple contrastive learning.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += ["", "`tercet COMMAND --help` shows every flag of a command; `tercet demo` is the place to start."]
    return "\n".join(lines)


def _train_and_report(config: Config, resume: Path | None = None) -> Path:
    """Train, write the report, and say where it is; of several ranks, the first alone writes and speaks."""
    from tercet.train.loop import train as run_training

    run = run_training(config, resume)
    if os.environ.get("RANK", "0") == "0":
        from tercet.report.page import write_report

        write_report(run)
        print(f"The report is {(run / 'report.html').resolve()}; open it in a browser.")
    return run


def _load_chosen(model: str | None) -> Tercet:
    """The model that --model names, or else the demo's, on the best device."""
    if model is None:
        if not Path(DEMO_MODEL).is_dir():
            raise TercetError(f"name a model with --model; the default, {DEMO_MODEL}, is what `make demo` trains")
        model = DEMO_MODEL

    from tercet import load
    from tercet.config import TrainConfig
    from tercet.train.parallel import place

    return load(model).to(place(TrainConfig()).device)


def _numbers(values: Tensor | float) -> list[float]:
    """Results of one image with several texts."""
    assert not isinstance(values, int | float)
    return values.flatten().tolist()


def _model_and_config(model: str, overrides: dict[str, Any]) -> tuple[str, Config]:
    """Where the model lies, and the config of its run when it lies in one: a run folder may be named for its model."""
    from tercet.config_io import default_config, load_config

    folder = Path(model)
    if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
        return str(folder / "model"), load_config(folder, overrides)
    if folder.name == "model" and (folder.parent / "config.yaml").is_file():
        return model, load_config(folder.parent, overrides)
    return model, default_config(overrides)


def _print_metrics(metrics: dict[str, Any]) -> None:
    if not metrics.keys() & ROWS.keys():
        for group, numbers in metrics.items():
            _print_group(group, numbers)
        return
    rows = [
        [meaning, *(f"{metrics[row][column]:.2f}" for column in COLUMNS)]
        for row, meaning in ROWS.items()
        if metrics.get(row)
    ]
    _print_table(["", *COLUMNS.values()], rows)


def _print_group(group: str, numbers: dict[str, float]) -> None:
    """Numbers one below another; those named `RIGHT_as_CHOSEN` as the matrix that they are."""
    cells = [name.split("_as_") for name in numbers]
    if all(len(cell) == 2 for cell in cells):
        chosen = list(dict.fromkeys(cell[1] for cell in cells))
        rights = dict.fromkeys(cell[0] for cell in cells)
        rows = [[right, *(f"{numbers[f'{right}_as_{name}']:.0f}" for name in chosen)] for right in rights]
        _print_table([f"{group}: right, then chosen", *chosen], rows)
        return
    _print_table([group, ""], [[name, f"{value:.2f}"] for name, value in numbers.items()])


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """A drawn table on a terminal, aligned plain text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
