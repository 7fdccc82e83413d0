"""How a command line becomes arguments: the parts that commands share, and the parsing.

Flags that name a key of the config (`--optim.lr 3e-4`, `--data.train a.json b.json`) are split off first: they lie
over the recipe as one more layer and are validated with it, so a mistake reads the same in a file and in a flag.
Tyro parses the rest and draws the help of both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from pydantic import Field
from pydantic.fields import FieldInfo

from tercet.config import ClassifyConfig, Config, DataConfig, EvaluateConfig, Section, VqaConfig
from tercet.config_io import config_fields, nearest
from tercet.errors import TercetError

FLAT = tyro.conf.arg(name="")


class DataKeys(Section):
    """The keys that say how captions and images are read."""

    data: DataConfig = Field(default_factory=DataConfig, description="pairs")


class DeviceKeys(Section):
    """Where a model runs."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA where there is one")


class EvaluateKeys(DataKeys):
    """The keys that an evaluation reads."""

    train: DeviceKeys = Field(default_factory=DeviceKeys, description="where the model runs")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="evaluation")
    vqa: VqaConfig = Field(default_factory=VqaConfig, description="visual question answering")
    classify: ClassifyConfig = Field(default_factory=ClassifyConfig, description="classification")


ConfigFlags = Annotated[Config, FLAT, tyro.conf.FlagConversionOff]


ImageArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
ModelFlag = Annotated[str | None, tyro.conf.arg(metavar="MODEL")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # on where the flag stands, with no flag to put it off


Arguments = TypeVar("Arguments")

_TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def parse(kind: type[Arguments], command: str, arguments: Sequence[str], config: Config | None = None) -> Arguments:
    """Parse what `split_flags` left; `--help` prints and exits, showing the values of `config` as defaults.

    Raises:
        TercetError: an unknown flag with the nearest right one, or in one line what else is wrong.
    """
    _refuse_unknown(arguments, options_of(kind))
    complaint = io.StringIO()
    # Only the commands that train, which have no required argument, show a recipe's values.
    default: Any = tyro.MISSING_NONPROP if config is None else kind(**{"config": config})
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=f"tercet {command}", args=list(arguments), default=default, use_underscores=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise TercetError(f"{_sentence(complaint.getvalue())}; see tercet {command} --help") from None


def split_flags(arguments: Sequence[str], kind: type) -> tuple[dict[str, Any], list[str]]:
    """Part the flags that set config keys from a command's own arguments.

    A list takes every value up to the next flag, a pair two, anything else one; `--train.compile` alone means true.
    `--key=value` and hyphens for underscores are read too.

    Args:
        arguments: the command line behind the command's name.
        kind: the command's dataclass; its field `config` tells which keys it takes.

    Returns:
        Dotted keys with their values as text, and the arguments that are left.

    Raises:
        TercetError: a flag that neither the config nor the command knows, or a flag without its value.
    """
    keys = _keys_of(kind)
    options = options_of(kind)
    overrides: dict[str, Any] = {}
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        token = arguments[position]
        position += 1
        flag, equals, inline = token.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not token.startswith("--") or flag in options:
            rest.append(token)
            continue
        if key not in keys:
            raise TercetError(_unknown(flag, options, keys))
        values = [inline] if equals else _following(arguments, position, _count(keys[key]))
        position += 0 if equals else len(values)
        overrides[key] = _value(key, keys[key], values)
    return overrides, rest


def options_of(kind: type) -> list[str]:
    """The command's own flags."""
    names = [part.name for part in dataclasses.fields(kind) if part.name != "config"]
    return [
        "--help",
        *(f"--{name}" for name in names),
        *(f"--{name.replace('_', '-')}" for name in names if "_" in name),
    ]


def _keys_of(kind: type) -> dict[str, FieldInfo]:
    """The config keys that the command takes as flags."""
    for part in dataclasses.fields(kind):
        if part.name == "config":
            return dict(config_fields(type(part.default_factory())))  # pyright: ignore[reportCallIssue]
    return {}


def _refuse_unknown(arguments: Sequence[str], options: Collection[str]) -> None:
    for token in arguments:
        flag = token.partition("=")[0]
        if flag.startswith("--") and flag not in options:
            raise TercetError(_unknown(flag, options, {}))


def _unknown(flag: str, options: Collection[str], keys: Collection[str]) -> str:
    key = flag.removeprefix("--").replace("-", "_")
    inside = [name for name in keys if name.startswith(f"{key}.")]
    if inside:
        return f"{flag} is a section; set one of its keys, such as --{inside[0]}"
    own = difflib.get_close_matches(flag, list(options), n=1, cutoff=0.7)
    close = own[0] if own else nearest(key, list(keys))
    if close is None:
        return f"unknown flag {flag}; see --help"
    return f"unknown flag {flag}; did you mean --{close.removeprefix('--')}?"


def _sentence(drawing: str) -> str:
    """What a message says between its title and its first rule; drawn in a frame, or plainly without UTF-8."""
    lines = [line.strip("│╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", drawing).splitlines()[1:]]
    words: list[str] = []
    for line in lines:
        if set(line) <= set("─-"):
            if words:
                break
            continue
        words.append(line)
    return " ".join(words).rstrip(".")


def _count(field: FieldInfo) -> int | None:
    """Values that a flag takes; None: as many as follow."""
    origin = get_origin(field.annotation)
    if origin is list:
        return None
    return len(get_args(field.annotation)) if origin is tuple else 1


def _following(arguments: Sequence[str], start: int, count: int | None) -> list[str]:
    values: list[str] = []
    for token in arguments[start:]:
        if token.startswith("--") or len(values) == count:
            break
        values.append(token)
    return values


def _value(key: str, field: FieldInfo, values: list[str]) -> str | list[str]:
    count = _count(field)
    if count is None:
        return values
    if field.annotation is bool and (not values or values[0].lower() not in _TRUTHS):
        if values:
            raise TercetError(f"--{key}: {values[0]!r} is not true or false")
        return "true"
    if len(values) < count:
        wanted = "a value" if count == 1 else f"{count} values"
        raise TercetError(f"--{key} needs {wanted}: {field.description}")
    return values[0] if count == 1 else values
