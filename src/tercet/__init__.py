"""Vision-language models by triple contrastive learning: train them on your own pairs, and use them.

Each name below imports what it needs when it is first read, so `import tercet` itself is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tercet.errors import TercetError
from tercet.version import __version__

if TYPE_CHECKING:
    from tercet.model.tercet import Tercet
    from tercet.predictor import Predictor, load
    from tercet.search.index import Index

__all__ = ["Index", "Predictor", "Tercet", "TercetError", "__version__", "load"]

_MODULES = {
    "Index": "tercet.search.index",
    "Predictor": "tercet.predictor",
    "Tercet": "tercet.model.tercet",
    "load": "tercet.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tercet' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
