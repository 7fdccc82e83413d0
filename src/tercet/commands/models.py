"""Which model a command means."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.config import Config
from tercet.errors import TercetError

if TYPE_CHECKING:
    from tercet.model.tercet import Tercet


DEMO_MODEL = "runs/demo/model"


def load_chosen(model: str | None, local_only: bool = False) -> Tercet:
    """The model that --model names, or else the demo's, on the best device; `local_only` never asks the hub."""
    if model is None:
        if not Path(DEMO_MODEL).is_dir():
            raise TercetError(f"name a model with --model; the default, {DEMO_MODEL}, is what `make demo` trains")
        model = DEMO_MODEL

    from tercet import load
    from tercet.device import resolve_device

    return load(model, local_only=local_only).to(resolve_device().device)


def lasting_name(model: str) -> str:
    """A name of the model that holds in any working folder: an absolute path, or the hub id as it is."""
    return str(Path(model).expanduser().absolute()) if Path(model).expanduser().exists() else model


def model_and_config(model: str, overrides: dict[str, Any]) -> tuple[str, Config]:
    """Where the model lies, and the config of its run when it lies in one: a run folder may be named for its model."""
    from tercet.config_io import default_config, load_config

    folder = Path(model)
    if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
        return str(folder / "model"), load_config(folder, overrides)
    if folder.name == "model" and (folder.parent / "config.yaml").is_file():
        return model, load_config(folder.parent, overrides)
    return model, default_config(overrides)


def warn_untrained_matching(model: Tercet, consequence: str) -> None:
    """Say on stderr what it means that the model's matching head was not trained, where it was not."""
    if not model.matches:
        print(f"this model's matching head was not trained (itm was off): {consequence}", file=sys.stderr)
