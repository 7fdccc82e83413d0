"""The command line: finds the command, runs it, and turns a mistake in the input into one line.

What a command takes and does is in `tercet.commands`, imported when it is called.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Sequence

from tercet.commands import COMMANDS
from tercet.errors import TercetError
from tercet.version import __version__

MISTAKE = 2
INTERRUPTED = 130
DISK_ERRORS = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ENAMETOOLONG")
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 after a mistake in the input, 130 when interrupted."""
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except TercetError as error:
        print(f"tercet: {_rank()}error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt as stop:
        print(f"tercet: {_rank()}{str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; what Python flushes at exit must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full or read-only disk, a name that is too long: what no command worded better.
        if error.errno not in DISK_ERRORS:
            raise
        named = f"{error.filename}: " if error.filename else ""
        print(f"tercet: error: {named}{error.strerror}", file=sys.stderr)
        return MISTAKE


def _rank() -> str:
    """Which of several processes speaks; of the first, and of one alone, nothing."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage("", COMMANDS))
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"tercet {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    group = [known for known in COMMANDS if known.startswith(f"{name} ")]
    if group:
        if not rest or rest[0] in ("-h", "--help", "help"):
            print(_usage(f"{name} ", group))
            return 0
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(group or COMMANDS)}"
        raise TercetError(f"no command {name!r}; {hint}")
    COMMANDS[name].load(name)(rest)
    return 0


def _usage(group: str, names: Iterable[str]) -> str:
    names = list(names)
    width = max(len(name) for name in names)
    lines = [
        f"usage: tercet {group}COMMAND [...]",
        "",
        "Vision-language models by triple contrastive learning.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<{width}}  {COMMANDS[name].meaning}" for name in names]
    lines += ["", "`tercet COMMAND --help` shows every flag of a command; `tercet demo` is the place to start."]
    return "\n".join(lines)
