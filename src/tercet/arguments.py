"""From a command's function to its command line.

The signature says it all: parameters before the `*` are positional arguments, those after it are flags, and the
docstring's `Args:` are their help.  `**overrides: ConfigKeys` lets a command take config keys as flags too
(`--optim.lr 3e-4`); they reach the function as text and are validated with the recipe, so that a mistake reads the same
in a file and in a flag.  The config is imported where it is needed, since pydantic takes a third of a second.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from tercet.errors import TercetError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from tercet.config import Config

# The keys of `**overrides`: all of them, or those below some names.
ConfigKeys = Annotated[Any, ""]
DataKeys = Annotated[Any, "data"]
EvaluateKeys = Annotated[Any, "data", "evaluate", "vqa", "classify", "train.device"]

HELP = {"-h", "--help"}
METAVARS = {int: "N", float: "X"}
TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def call(function: Callable[..., None], command: str, words: Sequence[str]) -> None:
    """Call a command's function with what its command line says, or print its help.

    Raises:
        TercetError: an unknown flag, with the nearest right one, or an argument that is missing or wrong.
    """
    parser = CommandParser(function, command)
    if HELP & set(words):
        parser = CommandParser(function, command, _shown_config(parser, command, words))
        print(parser.format_help().rstrip())
        return
    function(**parser.read(words))


class CommandParser(argparse.ArgumentParser):
    """The arguments of one command; `config` gives the defaults of config keys that the help shows."""

    def __init__(self, function: Callable[..., None], command: str, config: Config | None = None) -> None:
        description, meanings = _read_docstring(function)
        super().__init__(prog=f"tercet {command}", description=description.replace("%", "%%"), allow_abbrev=False)
        self.keys: dict[str, FieldInfo] = {}
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                self.usage = self.format_usage().removeprefix("usage: ").rstrip() + " [--section.key VALUE ...]"
                self._add_keys(get_args(hints[name])[1:], config)
            else:
                self._add_parameter(parameter, hints[name], meanings[name])

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Arguments by the names of the parameters, and the config keys that were given by their dotted names."""
        end = list(words).index("--") if "--" in words else len(words)
        words = [*map(self._spell, words[:end]), *words[end:]]
        found, rest = self.parse_known_args(words)
        # Positional arguments that stand between flags need the other way, whose errors say less.
        return vars(self.parse_intermixed_args(words) if rest else found)

    def error(self, message: str) -> NoReturn:
        """What argparse found wrong, as this package's error."""
        message = message.removeprefix("argument ").replace("unrecognized arguments", "unexpected argument")
        raise TercetError(f"{message}; see {self.prog} --help")

    def _add_parameter(self, parameter: inspect.Parameter, annotation: Any, meaning: str) -> None:
        name, parts = parameter.name, get_args(annotation)
        kind = parts[0] if NoneType in parts else annotation
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        if kind is bool:
            self.add_argument(f"--{name.replace('_', '-')}", dest=name, action="store_true", help=_help(meaning, None))
            return
        settings: dict[str, Any] = {"help": _help(meaning, default), "default": default}
        many = get_origin(kind) is list
        if many:
            kind = get_args(kind)[0]
        if get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        else:
            settings |= {
                "type": kind,
                "metavar": METAVARS.get(kind) or (name.removesuffix("s") if many else name).upper(),
            }
        flag = parameter.kind is parameter.KEYWORD_ONLY
        if many:
            settings["nargs"] = "+" if required else "*"
        elif not required and not flag:
            settings["nargs"] = "?"
        if flag:
            short = [f"-{name}"] if len(name) == 1 else []
            self.add_argument(*short, f"--{name.replace('_', '-')}", dest=name, required=required, **settings)
        else:
            self.add_argument(name, **settings)

    def _add_keys(self, prefixes: Sequence[str], config: Config | None) -> None:
        """Add the config keys below `prefixes` as flags, grouped by section."""
        from tercet.config_io import config_fields, default_config

        config = config or default_config()
        groups: dict[str, Any] = {}
        for key, field in config_fields():
            if not any(f"{key}.".startswith(f"{prefix}." if prefix else "") for prefix in prefixes):
                continue
            section, _, name = key.rpartition(".")
            owner = config
            for part in filter(None, section.split(".")):
                owner = getattr(owner, part)
            value = getattr(owner, name)
            if section not in groups:
                groups[section] = self.add_argument_group(section or "run", (type(owner).__doc__ or "").strip())
            groups[section].add_argument(
                f"--{key}",
                default=argparse.SUPPRESS,
                help=_help(str(field.description), str(value).lower() if isinstance(value, bool) else value),
                **_reading(field),
            )
            self.keys[key] = field

    def _spell(self, word: str) -> str:
        """A flag with hyphens and underscores as it is defined.

        Raises:
            TercetError: no such flag.
        """
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag == "--":
            return word
        flags = self._option_string_actions
        for spelling in (flag, f"--{flag[2:].replace('_', '-')}", f"--{flag[2:].replace('-', '_')}"):
            if spelling in flags:
                return f"{spelling}{equals}{value}"
        from tercet.config_io import nearest

        key = flag[2:].replace("-", "_")
        inside = next((name for name in self.keys if name.startswith(f"{key}.")), None)
        if inside:
            raise TercetError(f"{flag} is a section; set one of its keys, such as --{inside}")
        own = [name for name in flags if name.startswith("--") and name[2:] not in self.keys]
        close = difflib.get_close_matches(flag, own, n=1, cutoff=0.7)
        found = close[0][2:] if close else nearest(key, list(self.keys))
        raise TercetError(
            f"unknown flag {flag}; " + (f"did you mean --{found}?" if found else f"see {self.prog} --help")
        )


def _shown_config(parser: CommandParser, command: str, words: Iterable[str]) -> Config | None:
    """The config whose values the help shows: the recipe's that is named beside --help, with the other flags."""
    if not parser.keys:
        return None
    from tercet.config_io import default_config, load_config

    try:
        given = parser.read([word for word in words if word not in HELP])
    except TercetError:
        given = {}
    overrides = {key: value for key, value in given.items() if key in parser.keys}
    recipe = "demo" if command == "demo" else given.get("recipe")
    return load_config(recipe, overrides) if recipe else default_config(overrides)


def _reading(field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a config key: always as text, which the config validates."""
    origin, choices = get_origin(field.annotation), get_args(field.annotation)
    if origin is list:
        return {"nargs": "*", "metavar": "VALUE"}
    if origin is tuple:
        return {"nargs": len(choices), "metavar": "X"}
    if field.annotation is bool:
        return {"nargs": "?", "const": "true", "type": _truth, "metavar": "true|false"}
    if origin is Literal:
        return {"metavar": "|".join(choices)}
    return {"metavar": next((METAVARS[kind] for kind in (field.annotation, *choices) if kind in METAVARS), "TEXT")}


def _truth(word: str) -> str:
    if word.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"{word!r} is not true or false")
    return word


def _help(meaning: str, default: object) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    text = meaning if default is None or not shown else f"{meaning} (default: {shown})"
    return text.replace("%", "%%")


def _read_docstring(function: Callable[..., None]) -> tuple[str, dict[str, str]]:
    """The description, and the meaning of each parameter under `Args:`."""
    text = inspect.getdoc(function) or ""
    description, _, rest = text.partition("\nArgs:\n")
    parts = re.split(r"^    (\w+): ", rest, flags=re.MULTILINE)[1:]
    meanings = {
        name: " ".join(meaning.split()).rstrip(".") for name, meaning in zip(parts[::2], parts[1::2], strict=True)
    }
    return description.strip(), meanings
