"""The command line: finds the command, runs it, and turns a mistake in the input into one line.

Commands are functions in `tercet.commands`, imported when they are called, so that `tercet --help` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import NamedTuple

from tercet.errors import TercetError
from tercet.version import __version__

USER_ERROR = 2
INTERRUPTED = 130
DISK_ERRORS = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ENAMETOOLONG")
)


class Command(NamedTuple):
    """The module of `tercet.commands` that holds a command's function, and what the command does."""

    module: str
    summary: str


# A name of two words is a command of a group; its function is `data_pack`.
COMMANDS = {
    "demo": Command("training", "Train a small model on synthetic scenes, evaluate it and write a report."),
    "train": Command("training", "Train a model by a recipe; every key of a recipe is a flag as well."),
    "evaluate": Command("evaluation", "Measure a model on held-out data, in retrieval or in its task."),
    "score": Command("evaluation", "Score a file of predictions against annotations, without a model."),
    "report": Command("evaluation", "Write a run's report.html again, or compare several runs on one page."),
    "match": Command("prediction", "Show how well texts fit an image."),
    "classify": Command("prediction", "Choose the label that fits an image best."),
    "ask": Command("prediction", "Answer a question about an image."),
    "explain": Command("prediction", "Draw where in an image the model sees each word of a text."),
    "index": Command("searching", "Embed images into an index, or bring one up to date."),
    "search": Command("searching", "Find images of an index by words, by an image, or both."),
    "serve": Command("searching", "Serve an index over HTTP, with a page to search it."),
    "data pack": Command("data", "Write image-text pairs as WebDataset shards."),
    "data inspect": Command("data", "Show counts, broken images, sizes, duplicates and a contact sheet."),
    "data filter": Command("data", "Keep the pairs that a model finds to belong together."),
    "data scenes": Command("data", "Write synthetic scenes for the demo's tasks."),
    "tokenizer": Command("data", "Train a WordPiece tokenizer on captions."),
    "convert": Command("models", "Convert TCL, ALBEF, BERT, DeiT or ViT weights, or write a TCL checkpoint."),
    "export": Command("models", "Write a model as ONNX graphs and torch.export programs."),
    "push": Command("models", "Upload a model to the Hugging Face Hub."),
    "recipes": Command("training", "List the recipes that come with the package."),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 after a user's mistake, 130 when interrupted."""
    try:
        _run(list(sys.argv[1:] if words is None else words))
        return 0
    except TercetError as error:
        print(f"tercet: {_rank()}error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as stop:
        print(f"tercet: {_rank()}{str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; what Python flushes at exit must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full or read-only disk, a name that is too long: what no command has explained better.
        if error.errno not in DISK_ERRORS:
            raise
        file = f"{error.filename}: " if error.filename else ""
        print(f"tercet: {_rank()}error: {file}{error.strerror}", file=sys.stderr)
        return USER_ERROR


def _rank() -> str:
    """Which of several processes speaks; nothing for the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _run(words: list[str]) -> None:
    help_words = ("-h", "--help", "help")
    if not words or words[0] in help_words:
        print(_usage("", COMMANDS))
        return
    if words[0] in ("--version", "-V"):
        print(f"tercet {__version__}")
        return
    name, rest = words[0], words[1:]
    group = [known for known in COMMANDS if known.startswith(f"{name} ")]
    if group:
        if not rest or rest[0] in help_words:
            print(_usage(f"{name} ", group))
            return
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(group or COMMANDS)}"
        raise TercetError(f"no command {name!r}; {hint}")
    from tercet.arguments import call

    call(load_command(name), name, rest)


def load_command(name: str) -> Callable[..., None]:
    """The function of a command."""
    module = import_module(f"tercet.commands.{COMMANDS[name].module}")
    return getattr(module, name.replace(" ", "_"))


def _usage(group: str, names: Iterable[str]) -> str:
    names = list(names)
    width = max(map(len, names))
    return "\n".join(
        [
            f"usage: tercet {group}COMMAND [...]",
            "",
            "Vision-language models by triple contrastive learning.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names),
            "",
            "`tercet COMMAND --help` shows every flag of a command. Start with `tercet demo`.",
        ]
    )
