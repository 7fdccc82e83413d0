"""Recipes and config files: layers of YAML laid over one another, and mistakes told in one line that names the key.

The lowest layer is the recipe at the root of the `extends` chain, the highest the flags of the command line.  Each
layer holds only the keys that were written; the preset that `model.size` names lies beneath all of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tercet.config import PRESET_KEYS, Config, Section, merge
from tercet.errors import TercetError

FLAGS = "the flags"


@dataclass(frozen=True)
class Layer:
    """The keys that one file (or the command line) wrote, and its name for messages."""

    name: str
    keys: dict[str, Any]


def load_config(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a recipe with `overrides` laid over it.

    Args:
        recipe: name of a packaged recipe, path of a YAML file, or a run folder (its config.yaml is read).
        overrides: nested sections or dotted keys (`{"optim.lr": 3e-4}`), as flags give them.

    Raises:
        TercetError: unknown recipe, missing or malformed file, unknown key, wrong type or value.
    """
    layers = _read_chain(recipe)
    if overrides:
        layers.append(Layer(FLAGS, _nest(overrides)))
    return build_config(layers)


def default_config(overrides: Mapping[str, Any] | None = None) -> Config:
    """The defaults with `overrides` laid over them, for commands without a recipe."""
    return build_config([Layer("defaults", {}), Layer(FLAGS, _nest(overrides or {}))])


def build_config(layers: list[Layer]) -> Config:
    """Lay the layers over one another, the last on top, and validate the result.

    Raises:
        TercetError: names the key, the layer that wrote it and the nearest right key.
    """
    keys: dict[str, Any] = {}
    for layer in layers:
        keys = merge(_release_preset(keys, layer.keys), layer.keys)
    try:
        return Config.model_validate(keys)
    except ValidationError as error:
        raise TercetError(_explain(error, layers)) from None


def dump_config(config: Config) -> str:
    """The whole config as YAML; `load_config` of it gives an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def recipe_names() -> list[str]:
    """Names of the packaged recipes, the demo first."""
    names = (entry.name.removesuffix(".yaml") for entry in _recipes().iterdir() if entry.name.endswith(".yaml"))
    return sorted(names, key=lambda name: (name != "demo", name))


def recipe_meaning(name: str) -> str:
    """The one-line meaning of a packaged recipe: its first comment."""
    first = _recipes().joinpath(f"{name}.yaml").read_text("utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def config_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every leaf of the tree, in the order of the tree."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from config_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def nearest(word: str, known: list[str]) -> str | None:
    """The known dotted name nearest to `word`: by its whole name, else by its last part."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(word.rsplit(".", 1)[-1], list(by_last), n=1, cutoff=0.6)
    if close:
        return by_last[close[0]]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return close[0] if close else None


def _recipes() -> Any:
    return resources.files("tercet").joinpath("recipes")


def _read_chain(recipe: str | Path) -> list[Layer]:
    """The recipe and what it extends, the root first."""
    layers: list[Layer] = []
    seen: list[str] = []
    wanted, folder = str(recipe), Path()
    while True:
        try:
            name, text, folder = _read(wanted, folder)
        except TercetError as error:
            raise TercetError(f"{seen[-1]}: extends: {error}" if seen else str(error)) from error
        if name in seen:
            raise TercetError(f"{name}: extends itself through {' -> '.join([*seen, name])}; break the circle")
        seen.append(name)
        keys = _parse(text, name)
        parent = keys.pop("extends", None)
        layers.insert(0, Layer(name, keys))
        if parent is None:
            return layers
        if not isinstance(parent, str):
            raise TercetError(f"{name}: extends: {parent!r} is not the name of a recipe or the path of a file")
        wanted = parent


def _read(wanted: str, folder: Path) -> tuple[str, str, Path]:
    """Name for messages, text, and the folder that relative parents start from."""
    try:
        path = folder / Path(wanted).expanduser()
        if path.is_dir() and (path / "config.yaml").is_file():
            path = path / "config.yaml"
        path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for a file; the home of a user who is not there
        raise TercetError(f"{_shown(wanted)}: names no file ({getattr(error, 'strerror', None) or error})") from error
    if wanted in recipe_names():
        return f"{wanted}.yaml", _recipes().joinpath(f"{wanted}.yaml").read_text("utf-8"), folder
    if not path.is_file():
        raise TercetError(_no_recipe(wanted, path))
    try:
        return str(path), path.read_text("utf-8"), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise TercetError(f"{path}: cannot be read as text ({error})") from error


def _no_recipe(wanted: str, path: Path) -> str:
    if path.is_dir():
        return f"{wanted} is a folder without config.yaml; name a recipe, a YAML file or a run folder"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        beside = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), beside, n=1)
        return f"no file {path}" + (f"; did you mean {close[0]}?" if close else "; check the path")
    names = recipe_names()
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(names)}"
    return f"no recipe or file named {wanted!r}; {hint}"


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        keys = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise TercetError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise TercetError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise TercetError(f"{name}: nested too deep to be a config") from error
    except Exception as error:  # a tag such as !!int on what is none makes the constructors raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TercetError(f"{name}: a value that its tag does not fit ({reason})") from error
    if keys is None:
        return {}
    if not isinstance(keys, dict):
        raise TercetError(f"{name}: holds a {type(keys).__name__}, not sections with keys such as 'optim:'")
    return keys


def _nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in overrides.items():
        for part in reversed(dotted.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def _release_preset(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Drop the widths, depths and heads of the lower layers when a higher one names a preset.

    They would else win over it, and `--model.size` laid over a resolved config would change nothing.
    """
    model, chosen = lower.get("model"), upper.get("model")
    if not isinstance(model, dict) or not isinstance(chosen, dict) or "size" not in chosen:
        return lower
    kept: dict[str, Any] = {}
    for key, value in model.items():
        decided = PRESET_KEYS.get(key, ())
        if isinstance(value, dict):
            kept[key] = {name: size for name, size in value.items() if name not in decided}
        elif key != "embed_dim":
            kept[key] = value
    return {**lower, "model": kept}


def _explain(error: ValidationError, layers: list[Layer]) -> str:
    """One line for the first mistake, and the number of the others."""
    details = error.errors(include_url=False)
    first = details[0]
    path = _named_path(first["loc"])
    origin = _origin(path, layers)
    key = ".".join(path)
    where = f"{origin}: {key}"
    if origin == FLAGS:
        where = f"--{key}" if key in dict(config_fields()) else key
    more = f" ({len(details) - 1} more after it)" if len(details) > 1 else ""
    return f"{where}: {_word(first, key)}{more}"


def _named_path(location: tuple[int | str, ...]) -> list[str]:
    """The keys of a pydantic location, without positions in lists and branches of unions."""
    path: list[str] = []
    section: Any = Config
    for part in location:
        path.append(str(part))
        if not (isinstance(section, type) and issubclass(section, Section)) or part not in section.model_fields:
            break
        section = section.model_fields[str(part)].annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            break
    return path


def _origin(path: list[str], layers: list[Layer]) -> str:
    """The highest layer that wrote the key, or failing that, its section."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            found: Any = layer.keys
            for part in path[:length]:
                found = found.get(part, _ABSENT) if isinstance(found, dict) else _ABSENT
            if found is not _ABSENT:
                return layer.name
    return layers[-1].name


_ABSENT = object()

# Keys of earlier versions by section, which configs in old run folders and recipes still have.
MOVED_KEYS: dict[str, dict[str, str | None]] = {
    "objectives": {
        "mask_probability": "mlm_probability",
        "alpha_ramp": "alpha_warmup",
        **dict.fromkeys(("alignment", "second_text_mask", "local_grid")),
    },
    "data": dict.fromkeys(("scenes", "augment_on")),
    "optim": {"accumulate": "grad_accum_steps"},
    "train": {"recompute": "grad_checkpointing"},
}

_KINDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list of two numbers",
    "model": "a section with keys of its own",
    "finite": "a finite number",
}

_BOUNDS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "{le:g} or less",
}


def _word(detail: ErrorDetails, key: str) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        close = nearest(key, [name for name, _ in config_fields()])
        section, _, name = key.partition(".")
        if name in MOVED_KEYS.get(section, ()):
            new = MOVED_KEYS[section][name]
            return f"is now {section}.{new}" if new else "no longer exists; remove the line"
        if close == key:
            return f"write the key under its section, as '{key.replace('.', ': {', 1)}: ...}}'"
        return "unknown key" + (f"; did you mean {close}?" if close else "; see tercet train --help")
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        return f"{_shown(value)} is none of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    if kind == "value_error":
        return str(context["error"])
    if kind in ("too_short", "too_long", "missing"):
        return f"{_shown(value)} has the wrong number of values"
    for prefix, wanted in _KINDS.items():
        if kind.startswith(prefix):
            return f"{_shown(value)} is not {wanted}"
    if kind in _BOUNDS:
        return f"{_shown(value)} must be {_BOUNDS[kind].format(**context)}"
    return f"{_shown(value)}: {detail['msg']}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


class _Loader(yaml.SafeLoader):
    """Scalars by the core schema of YAML 1.2: `1e-4` is a number, `no` and `off` are words, `010` is ten."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # A few aliases of aliases stand for more values than there is memory, and no config needs one.
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, f"an alias (*{event.anchor}); write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that YAML 1.1 or 1.2 would read as something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML leaves some line breaks of Unicode (U+0085 among them) bare outside double quotes, and reads them as space.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_CORE = (
    ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789.")),
    ("tag:yaml.org,2002:float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), list("-+.")),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
_Dumper.add_representer(str, _represent_text)
