"""Vision-language models by triple contrastive learning: train them on your own pairs, and use them.

The names below load what they need when they are first read, so `import tercet` itself is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tercet.errors import TercetError
from tercet.version import __version__

if TYPE_CHECKING:
    from tercet.model.folder import load_model as load
    from tercet.model.tercet import Tercet

__all__ = ["Tercet", "TercetError", "__version__", "load"]

_LAZY = {"Tercet": ("tercet.model.tercet", "Tercet"), "load": ("tercet.model.folder", "load_model")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tercet' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
