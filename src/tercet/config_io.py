"""Recipes and config files: YAML layers that override one another, and one-line errors that name file and key.

The first layer is the recipe at the root of the `extends` chain, the last the flags of the command line.  Each layer
holds only the keys that were written, and its values are text as in a flag; `tercet.config` converts them.  The preset
that `model.size` names comes before all layers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
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
    """The config of a recipe, changed by `overrides`.

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
    """The defaults, changed by `overrides`, for commands without a recipe."""
    return build_config([Layer("defaults", {}), Layer(FLAGS, _nest(overrides or {}))])


def build_config(layers: list[Layer]) -> Config:
    """Merge the layers, where a later one overrides an earlier one, and validate the result.

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
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    last = word.rsplit(".", 1)[-1]
    return _close(word, known, 0.75) or by_last.get(_close(last, by_last, 0.6) or "") or _close(word, known, 0.5)


def _close(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def _recipes() -> Any:
    return resources.files("tercet").joinpath("recipes")


def _read_chain(recipe: str | Path) -> list[Layer]:
    """The recipe and what it extends, the root first."""
    layers: list[Layer] = []
    wanted, folder = str(recipe), Path()
    while True:
        seen = [layer.name for layer in layers]
        try:
            name, text, folder = _read(wanted, folder)
        except TercetError as error:
            raise TercetError(f"{seen[0]}: extends: {error}" if seen else str(error)) from error
        if name in seen:
            circle = " -> ".join([*reversed(seen), name])
            raise TercetError(f"{name}: extends itself through {circle}; break the circle")
        keys = _parse(text, name)
        wanted = keys.pop("extends", None)
        layers.insert(0, Layer(name, keys))
        if wanted is None:
            return layers
        if not isinstance(wanted, str):
            raise TercetError(f"{name}: extends: {wanted!r} is not the name of a recipe or the path of a file")


def _read(wanted: str, folder: Path) -> tuple[str, str, Path]:
    """Name for messages, text, and the folder that relative parents start from."""
    if wanted in recipe_names():
        return f"{wanted}.yaml", _recipes().joinpath(f"{wanted}.yaml").read_text("utf-8"), folder
    try:
        path = folder / Path(wanted).expanduser()
        if path.is_dir() and (path / "config.yaml").is_file():
            path = path / "config.yaml"
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for a file; the home of a user who does not exist
        raise TercetError(f"{_shown(wanted)}: names no file ({getattr(error, 'strerror', None) or error})") from error
    if not found:
        raise TercetError(_no_recipe(wanted, path))
    try:
        return str(path), path.read_text("utf-8"), path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise TercetError(f"{path}: cannot be read as text ({error})") from error


def _no_recipe(wanted: str, path: Path) -> str:
    if path.is_dir():
        return f"{wanted} is a folder without config.yaml; name a recipe, a YAML file or a run folder"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        close = _close(str(path), map(str, path.parent.glob("*.y*ml")), 0.6)
        return f"no file {path}; " + (f"did you mean {close}?" if close else "check the path")
    close = _close(wanted, recipe_names())
    hint = f"did you mean {close}?" if close else f"the recipes are {', '.join(recipe_names())}"
    return f"no recipe or file named {wanted!r}; {hint}"


def _parse(text: str, name: str) -> dict[str, Any]:
    """The sections and keys of a YAML file; every value is text or None, or a list or section of such."""
    try:
        keys = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise TercetError(f"{name}{line}: not valid YAML: {reason}") from error
    except RecursionError as error:
        raise TercetError(f"{name}: nested too deep to be a config") from error
    if keys is not None and not isinstance(keys, dict):
        raise TercetError(f"{name}: holds a {type(keys).__name__}, not sections with keys such as 'optim:'")
    return keys or {}


def _nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in overrides.items():
        for part in reversed(dotted.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def _release_preset(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Drop the widths, depths and heads of the lower layers when a higher one names a preset.

    They would otherwise override it, and `--model.size` would change nothing in a resolved config.
    """
    model, chosen = lower.get("model"), upper.get("model")
    if not isinstance(model, dict) or not isinstance(chosen, dict) or "size" not in chosen:
        return lower
    kept = {key: value for key, value in model.items() if key != "embed_dim"}
    for part, decided in PRESET_KEYS.items():
        if isinstance(kept.get(part), dict):
            kept[part] = {key: value for key, value in kept[part].items() if key not in decided}
    return {**lower, "model": kept}


def _explain(error: ValidationError, layers: list[Layer]) -> str:
    """One line for the first mistake, and the number of the others."""
    first, *others = error.errors(include_url=False)
    path = [part for part in first["loc"] if isinstance(part, str)]  # without positions in a list
    origin, key = _origin(path, layers), ".".join(path)
    where = f"{origin}: {key}"
    if origin == FLAGS:
        where = f"--{key}" if key in dict(config_fields()) else key
    return f"{where}: {_problem(first, key)}" + (f" ({len(others)} more after it)" if others else "")


def _origin(path: list[str], layers: list[Layer]) -> str:
    """The last layer that wrote the key, or failing that, its section."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            found: Any = layer.keys
            for part in path[: length - 1]:
                found = found.get(part) if isinstance(found, dict) else None
            if isinstance(found, dict) and path[length - 1] in found:
                return layer.name
    return layers[-1].name


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


def _problem(detail: ErrorDetails, key: str) -> str:
    """What is wrong with the value of a key, and how to fix it."""
    kind, value, context = detail["type"], _shown(detail["input"]), detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(key)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        close = _close(str(detail["input"]), choices)
        return f"{value} is none of {', '.join(choices)}" + (f"; did you mean {close}?" if close else "")
    if kind == "value_error":
        return str(context["error"])
    if kind in ("too_short", "too_long", "missing"):
        return f"{value} has the wrong number of values"
    if kind in _BOUNDS:
        return f"{value} must be {_BOUNDS[kind].format(**context)}"
    wanted = next((wanted for prefix, wanted in _KINDS.items() if kind.startswith(prefix)), None)
    return f"{value} is not {wanted}" if wanted else f"{value}: {detail['msg']}"


def _unknown_key(key: str) -> str:
    section, _, name = key.partition(".")
    if name in MOVED_KEYS.get(section, ()):
        new = MOVED_KEYS[section][name]
        return f"is now {section}.{new}" if new else "no longer exists; remove the line"
    close = nearest(key, [name for name, _ in config_fields()])
    if close == key:
        return f"write the key under its section, as '{key.replace('.', ': {', 1)}: ...}}'"
    return "unknown key" + (f"; did you mean {close}?" if close else "; see tercet train --help")


def _shown(value: object) -> str:
    """A value as messages show it: numbers bare, other text in quotes, and nothing at length."""
    if isinstance(value, list):
        text = f"[{', '.join(map(_shown, value))}]"
    else:
        text = value if isinstance(value, str) and re.fullmatch(r"[-+.]?\d[-+.\deE]*", value) else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


class _Loader(yaml.BaseLoader):
    """Reads every scalar as text, and a plain `null`, `~` or nothing as None."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # A few aliases of aliases stand for more values than there is memory, and no config needs one.
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, f"an alias (*{event.anchor}); write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:  # an empty or null scalar is None
        text = super().construct_scalar(node)
        return None if node.style is None and text in ("null", "Null", "NULL", "~", "") else text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        keys: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep)
            if not isinstance(key, str) or key in keys:
                problem = f"key {key!r} " + ("appears twice" if isinstance(key, str) else "is not text")
                raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
            keys[key] = self.construct_object(value_node, deep)
        return keys


class _Dumper(yaml.SafeDumper):
    """Puts text with unusual characters in double quotes."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes some line breaks of Unicode (U+0085 among them) bare outside double quotes, and reads them as space.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
